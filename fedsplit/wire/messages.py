"""The frozen requests and replies that cross between a client and its trunk.

Shapes: B sequences, T tokens, D hidden width. The identity of a request is (session, call,
kind), and a retry has the same identity. Calls and versions count up. Hidden states and their
gradients are encoded with the `codec` of their message.
"""

import re
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

from torch import Tensor

PROTOCOL = 7
"""Version of the messages in this file; both sides must have the same."""

AUTOCAST = ("bfloat16", "float16")
"""The precisions of matrix products that a client may ask for."""

STAYS = {"stays": True}
"""Metadata of a field that is not sent: it is for the sender's own encoder and checks."""

R = TypeVar("R", bound="Reply")


class Reply:
    """A reply of the trunk."""

    __slots__ = ()


class Request(Generic[R]):
    """A request of a client; `R` is the type of its reply.

    Attributes:
        kind: The name by which logs and metrics call it, such as service_info.
    """

    __slots__ = ()

    kind: ClassVar[str]

    def __init_subclass__(cls) -> None:
        words = re.sub("(?<!^)([A-Z])", r"_\1", cls.__name__.removesuffix("Request"))
        cls.kind = words.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The largest request the trunk takes: sequences, tokens in a sequence, hidden width.

    `session_tokens` bounds the tokens of all sequences of a session that generates, and
    `stateless_bytes` a request that brings its KV cache.
    """

    max_rows: int
    max_tokens: int
    hidden_size: int
    session_tokens: int
    stateless_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenReply(Reply):
    """A new session; `server_instance_id` is random per start of the server.

    `autocast` is the precision of the trunk's matrix products, or empty for that of its weights.
    If it is float16, the client has to scale its losses. The trunk saves its state when its version
    reaches a multiple of `save_every`; 0 means that it saves none. `kept_version` is the version up
    to which it has the steps that were taken at the `last_instance_id` of the request, if that is
    an earlier start.
    """

    session: str
    server_instance_id: str
    version: int
    limits: Limits
    autocast: str = ""
    save_every: int = 0
    kept_version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRequest(Request[OpenReply]):
    """Opens a session. `model` is the fingerprint of config and cut, `config` that of the run.

    `round` is the round of the run; with `client` and `call` it seeds the trunk's dropout. A
    session that is not `training` never counts in a barrier. A `generating` session has a KV cache
    with a capacity of `cache_tokens` in every sequence, or one that grows if that is 0; its
    `config` may be empty, since it does not depend on the run. `served_model_name` is the trunk's
    name at a server that has several, or empty for the first one.

    `identity` has digests of the weights that the client's part came from, and of its adapter
    (`fedsplit.model.identity`). A refused client repeats the request with the settings behind
    `model` and `config`, so that the trunk can name those that differ. `last_instance_id` is the
    `server_instance_id` of the client's session before, or empty.
    """

    protocol: int
    client: str
    model: str
    config: str
    hidden_size: int
    round: int
    training: bool
    generating: bool = False
    cache_tokens: int = 0
    served_model_name: str = ""
    identity: dict[str, str] = field(default_factory=dict)
    model_settings: dict[str, str] = field(default_factory=dict)
    run_settings: dict[str, str] = field(default_factory=dict)
    last_instance_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ForwardReply(Reply):
    """The trunk's output and the parameter version that computed it.

    With a `base_BTD` (see the request), the output is sent as its difference from that.
    """

    trunk_out_BTD: Tensor
    version: int
    codec: str = "none"
    base_BTD: Tensor | None = field(default=None, metadata=STAYS)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ForwardRequest(Request[ForwardReply]):
    """Smashed data for the trunk; with `training` the trunk keeps the graph for one backward.

    The trunk's modules are in training mode if `training` is set, and in evaluation mode if not;
    with `other_mode` it is the other way round. Dropout depends on the number of the call
    `calls_ago` calls before: 0, or the distance of the forward that this one repeats. `autocast` is
    the precision of the client's matrix products, for a trunk whose run has none; empty for that of
    the weights.

    The mask is absent if it is all ones, and positions are absent if the family makes its own.

    With `bases_B`, request and reply carry deltas to references (`fedsplit.wire.delta`): each
    number is the name of a sequence's reference, or 0 or -1 if there is none. `references` holds
    the values of these references, up and down, if the trunk has lost them. `base_BTD` is not sent:
    it is the value from which `smashed_BTD` is sent as a difference.
    """

    session: str
    call: int
    training: bool
    smashed_BTD: Tensor
    attention_mask_BT: Tensor | None = None
    position_ids_BT: Tensor | None = None
    codec: str = "none"
    bases_B: Tensor | None = None
    references: tuple[Tensor, ...] = ()
    other_mode: bool = False
    calls_ago: int = 0
    autocast: str = ""
    base_BTD: Tensor | None = field(default=None, metadata=STAYS)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BackwardReply(Reply):
    """The gradient of the smashed data, absent if it was not requested.

    `trunk_sq_norm` is the squared norm of the gradient that this session has accumulated since its
    last step, with the loss scale. Clipping by the global norm needs it.
    """

    grad_smashed_BTD: Tensor | None
    trunk_sq_norm: float
    codec: str = "none"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BackwardRequest(Request[BackwardReply]):
    """The gradient of the trunk's output, for the forward of the same `call`.

    `may_overflow` is not sent: it says that one side computes in float16, so that infinite
    gradients in the reply are no fault.
    """

    session: str
    call: int
    want_grad: bool
    grad_trunk_out_BTD: Tensor
    codec: str = "none"
    may_overflow: bool = field(default=False, metadata=STAYS)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReply(Reply):
    """The contribution is accepted; `version` is the parameter version that it is part of."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRequest(Request[StepReply]):
    """Contributes the gradient accumulated since the last step.

    `call` is that of the last backward, `step` the client's count of optimizer steps (for the
    learning rate schedule), `num_tokens` the weight among clients and `client_sq_norm` the squared
    gradient norm of bottom and top. All gradients since the last step are multiplied by
    `loss_scale`; `client_sq_norm` is not.
    """

    session: str
    call: int
    step: int
    num_tokens: int
    client_sq_norm: float
    loss_scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KVCacheEntry:
    """Keys and values of one block: B sequences, H heads, T tokens, E width of a head."""

    block: int
    keys_BHTE: Tensor
    values_BHTE: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GenerateReply(Reply):
    """The trunk's output for the last `logits_to_keep` tokens of the request.

    `entries` are the keys and values of the request's new tokens, if it was stateless.
    """

    trunk_out_BTD: Tensor
    entries: tuple[KVCacheEntry, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GenerateRequest(Request[GenerateReply]):
    """Hidden states of the next tokens, which the session's KV cache is extended by.

    Before that, the cache is cut to its first `past` tokens, and its sequences are replaced by
    those with the numbers `rows_B`. Beam search, cropping and starting over need no more. The mask
    is over the new tokens only, and absent if it is all ones; positions are absent if they count on
    from `past`. `record_past` keeps the entries that a sliding window would drop, so that the next
    request can go back.

    With a `source`, the session's cache becomes a copy of the first `past` tokens of that session
    of the same client, and then the sequences `rows_B` of these. `source_call` is the call of the
    source after which it held these tokens. The copy is refused with `SESSION_LOST` if the source
    has removed or moved tokens in a later call.

    A `stateless` request carries the whole cache in `entries` and the mask over all tokens; the
    trunk keeps nothing. `autocast` is the precision of the client's matrix products, and empty for
    that of the weights.
    """

    session: str
    call: int
    past: int
    logits_to_keep: int
    smashed_BTD: Tensor
    rows_B: Tensor | None = None
    attention_mask_BT: Tensor | None = None
    position_ids_BT: Tensor | None = None
    record_past: bool = False
    stateless: bool = False
    entries: tuple[KVCacheEntry, ...] = ()
    autocast: str = ""
    source: str = ""
    source_call: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseReply(Reply):
    """The session is closed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseRequest(Request[CloseReply]):
    """Closes a session: no barrier waits for it any more, and its state is dropped."""

    session: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GradientsReply(Reply):
    """Norms of the session's accumulated gradient per block, and on request the tensors."""

    norms: dict[str, float]
    names: tuple[str, ...]
    gradients: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientsRequest(Request[GradientsReply]):
    """Reads the gradient that the session has accumulated since its last step."""

    session: str
    tensors: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStateReply(Reply):
    """The state of the trunk's training: `round` last opened, optimizer steps, learning rate."""

    round: int
    step: int
    lr: float
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStateRequest(Request[TrainingStateReply]):
    """Reads the state of the trunk's training."""

    session: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceInfoReply(Reply):
    """Description of the server. No token is needed for it, so it contains no secret.

    `served_model_names` has the names of all trunks of the server; the other fields describe the
    trunk that the request names. `budgets`, by the setting that limits each, say how much is in
    use. `versions` has the server's versions of packages, and `time_s` its clock, in seconds since
    the epoch. These three are empty or 0 for callers without a token, who could use them for an
    attack.
    """

    protocol: int
    server_instance_id: str
    model: str
    family: str
    blocks: str
    version: int
    sessions: int
    limits: Limits
    served_model_names: tuple[str, ...]
    budgets: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    time_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceInfoRequest(Request[ServiceInfoReply]):
    """Reads the description of the server and of the named trunk; needs no session."""

    served_model_name: str = ""
