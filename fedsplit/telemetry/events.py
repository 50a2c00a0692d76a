"""The events of a run and of a trunk, and the state of a trunk that sinks may read at any time."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedsplit.telemetry.round import RoundStats


@dataclass(frozen=True, slots=True, kw_only=True)
class RunBegan:
    """A run begins, or is resumed.

    `settings` are those that decide its numbers, by dotted name, and `budget_bits` is the bound of
    `privacy.budget_bits` (0: none).
    """

    name: str
    run_id: str
    rounds: int
    budget_bits: float
    settings: Mapping[str, object] = field(hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTaken:
    """A trunk has taken a step with the contributions of some clients.

    Attributes:
        version: The parameter version after the step.
        clients: The names of the clients.
        num_tokens: The tokens that the clients contributed.
        taken: The optimizer steps of this step, more than one with `train.trunk_steps`.
        lr: The learning rate.
        gradient_norm: The mean norm of the clients' gradients before clipping, weighted as the
            gradients are.
        waits_s: The seconds that each contribution has waited for this step.
    """

    version: int
    clients: tuple[str, ...]
    num_tokens: int
    taken: int
    lr: float
    gradient_norm: float
    waits_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Contributed:
    """A client has sent its part of a step.

    The `outcome` is `used`, `late` (used, though older than the last step), `stale` (refused,
    because it is too old) or `refused` (for its numbers). `staleness` counts the steps that were
    taken since it began, and is 0 for one that was refused.
    """

    client: str
    outcome: str
    staleness: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRun:
    """A trunk has run the calls of some sessions at once.

    Attributes:
        kind: forward, backward, step, evaluate or generate.
        sessions: The number of sessions.
        tokens: The sequences times tokens that ran through the blocks.
        queues_s: The seconds for which each new call was ready to run before the pass.
        compute_s: The seconds of the pass.
    """

    kind: str
    sessions: int
    tokens: int
    queues_s: tuple[float, ...]
    compute_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestAnswered:
    """A server has answered a request, in so many seconds; `code` is OK, or that of the error.

    The `kind` is that of the request, such as forward, or `admission` for a call that was refused
    before its request was read.
    """

    kind: str
    code: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FramesMoved:
    """A server has received the frames of a request and sent those of its reply.

    The bytes are those of whole frames, and the codecs those of the tensors in them. The `kind` of
    frames that are no request is `invalid`.
    """

    kind: str
    received_bytes: int
    received_codec: str
    sent_bytes: int
    sent_codec: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientStepTaken:
    """A client has taken a training step of so many sequences and tokens."""

    client: str
    seconds: float
    samples: int
    tokens: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRetried:
    """An attempt of a client at a request failed with the error of this `code`; it tries again."""

    code: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenArrived:
    """The trunk's output for the next token has reached a client that generates.

    `seconds` are those since the prompt was sent for the first token (`is_first`), and those since
    the token before for others.
    """

    seconds: float
    is_first: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanEnded:
    """A span of a trace has ended; `fedsplit.telemetry.spans` describes them.

    Attributes:
        name: What took the time.
        trace_id, span_id: The ids of its trace, 16 bytes, and its own, 8 bytes.
        parent_id: The id of the span above it; empty for the first one of a trace.
        began_ns, ended_ns: Nanoseconds since 1970.
        code: OK, or that of the error that ended it.
        fields: What it is about, such as the client, the session and the call.
    """

    name: str
    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    began_ns: int
    ended_ns: int
    code: str
    fields: Mapping[str, object] = field(hash=False)


Event = (
    RunBegan
    | RoundStats
    | StepTaken
    | Contributed
    | PassRun
    | RequestAnswered
    | FramesMoved
    | ClientStepTaken
    | RequestRetried
    | TokenArrived
    | SpanEnded
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheState:
    """A cache of a trunk: the stash of graphs, or the keys and values of sessions that generate.

    `hits` and `misses` count what was looked up, and `evictions` what was dropped to make room.
    """

    num_bytes: int
    limit_bytes: int
    hits: int
    misses: int
    evictions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrunkState:
    """The state of a trunk at one time.

    Attributes:
        is_running: Whether it serves; a trunk that failed does not.
        version: The parameter version.
        sessions: The open sessions.
        clients: The clients that are in the middle of training.
        waiting: The calls that wait for a barrier.
        idle_s: The seconds for which these clients have waited for a step; 0 if none trains.
        interval_s: The usual seconds from one step to the next; 0 before the second step.
        clipped: The gradients that the guard clipped.
        refused: The gradients that it refused.
        quarantines: The times that it excluded a client.
        stash: The graphs that wait for their backward.
        kv_cache: The keys and values.
    """

    is_running: bool
    version: int
    sessions: int
    clients: int
    waiting: int
    idle_s: float
    interval_s: float
    clipped: int
    refused: int
    quarantines: int
    stash: CacheState
    kv_cache: CacheState
