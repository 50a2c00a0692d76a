"""The frozen requests and replies that cross between a client and its trunk.

Shapes: B sequences, T tokens, D hidden width. A request names the work it asks for by
(session, call, kind), and a retry re-uses that name; sessions, calls and versions count up.
Hidden states and their gradients travel as the `codec` of their message says.
"""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

PROTOCOL = 4
"""Version of the messages in this file; the two sides must agree."""

STAYS = {"stays": True}
"""Marks a field that is the sender's own: it says how the others travel."""

R = TypeVar("R", bound="Reply")


class Reply:
    """What the trunk answers."""

    __slots__ = ()


class Request(Generic[R]):
    """What a client asks; `R` is the type of its reply."""

    __slots__ = ()


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

    `autocast` is the precision of the trunk's matrix products, empty where it is the model's own:
    where it is float16, the client has to scale its losses.
    """

    session: str
    server_instance_id: str
    version: int
    limits: Limits
    autocast: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRequest(Request[OpenReply]):
    """Asks for a session. `model` is the fingerprint of config and cut, `config` that of the run.

    `round` names the part of the run that this session works on: with `client` and `call` it
    seeds the trunk's dropout. A session that is not `training` never counts in a barrier. One
    that is `generating` has a KV cache, with room for `cache_tokens` in every sequence if that is
    not 0; it need not know the run, and then names no `config`. `served` is the name under which
    the trunk is served, where a server has several; empty for its first.
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
    served: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ForwardReply(Reply):
    """The trunk's output and the parameter version it was made with.

    With a `base_BTD`, see the request, what arrives is the difference from it.
    """

    trunk_out_BTD: Tensor
    version: int
    codec: str = "none"
    base_BTD: Tensor | None = field(default=None, metadata=STAYS)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ForwardRequest(Request[ForwardReply]):
    """Smashed data on its way up; `training` keeps the graph for one backward.

    The mask is absent where it is all ones, and positions where the family makes its own.

    With `bases_B` what travels, both ways, are differences from what both sides have had of these
    examples before (`fedsplit.wire.delta`): each is the name of a base, or says that there is
    none. `references` are those bases, up and down, where the trunk has lost them. The sender's
    `base_BTD` does not travel: with it, `smashed_BTD` arrives as the difference from it.
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
    base_BTD: Tensor | None = field(default=None, metadata=STAYS)

    @property
    def is_delta(self) -> bool:
        """Whether the smashed data is a delta to references; see `fedsplit.wire.delta`."""
        return self.bases_B is not None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BackwardReply(Reply):
    """The smashed data's gradient (absent if not wanted).

    `trunk_sq_norm` is the squared norm of all that this session has accumulated since its last
    step, scaled as the losses were: the one float that clipping by the global norm needs.
    """

    grad_smashed_BTD: Tensor | None
    trunk_sq_norm: float
    codec: str = "none"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BackwardRequest(Request[BackwardReply]):
    """The gradient of the trunk's output, for the forward of the same `call`."""

    session: str
    call: int
    want_grad: bool
    grad_trunk_out_BTD: Tensor
    codec: str = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReply(Reply):
    """The contribution is taken; `version` is the one it will be, or was, part of."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRequest(Request[StepReply]):
    """Contributes the gradient accumulated since the last step.

    `call` is the last backward's, `step` the client's own count of optimizer steps (it places
    the learning rate), `num_tokens` the weight among clients and `client_sq_norm` the squared
    gradient norm of bottom and top. All gradients that crossed since the last step are
    `loss_scale` times what they should be; `client_sq_norm` is not.
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

    `entries` are the keys and values of the request's own tokens, if it brought its cache.
    """

    trunk_out_BTD: Tensor
    entries: tuple[KVCacheEntry, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GenerateRequest(Request[GenerateReply]):
    """Hidden states of the next tokens, for the session's KV cache to grow by.

    Before it does, the cache is cut to its first `past` tokens, and its sequences become those
    that `rows_B` names: that is all that beam search, cropping and starting over ask of it. The
    mask is over the new tokens alone, and absent where it is all ones; positions are absent where
    they count on from `past`. `record_past` keeps what a sliding window would forget, for the
    next request to go back.

    A `stateless` request brings the whole cache in `entries`, as it is to be, and the mask over
    all of it; the trunk keeps nothing.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseReply(Reply):
    """The session is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseRequest(Request[CloseReply]):
    """Ends a session: nobody waits for it, nothing is kept for it."""

    session: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GradientsReply(Reply):
    """Norms of the session's accumulated gradient per block, and on request the tensors."""

    norms: dict[str, float]
    names: tuple[str, ...]
    gradients: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientsRequest(Request[GradientsReply]):
    """Asks what the session has accumulated since its last step."""

    session: str
    tensors: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStateReply(Reply):
    """Where the trunk's training stands: `round` last opened, optimizer steps, learning rate."""

    round: int
    step: int
    lr: float
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStateRequest(Request[TrainingStateReply]):
    """Asks where training stands."""

    session: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceInfoReply(Reply):
    """What the server is: anyone may ask, so nothing here is secret.

    All but `served`, the names of the trunks it serves, is about the one that was asked for.
    """

    protocol: int
    server_instance_id: str
    model: str
    family: str
    blocks: str
    version: int
    sessions: int
    limits: Limits
    served: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceInfoRequest(Request[ServiceInfoReply]):
    """Asks what the server is, about its trunk of the name `served`; needs no session."""

    served: str = ""
