"""The delta codec: encodes activations as deltas to references, at the client and at the trunk.

Wang et al. 2022, "Fine-tuning Language Models over Slow Networks using Activation Quantization with
Guarantees" (AQ-SGD), arXiv 2206.01299. The reference of an example holds the values that
the receivers decoded the last time: the smashed data at the trunk, and the trunk's output at the
client. The sender sends the delta to the reference, and the decoded value is the next reference.

The name of a reference is a digest of its values, so references cannot be confused. The client
decides which references a forward uses. A trunk that has lost a reference answers `HistoryLost`,
and the client sends it again. So a loss costs bytes and changes no number.

Shapes: B sequences, T tokens, D hidden width.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedsplit.errors import BadTensor, ConfigError, HistoryLost, ProtocolError
from fedsplit.spec import WireSpec
from fedsplit.wire.codec import as_received
from fedsplit.wire.messages import ForwardReply, ForwardRequest

NEW = 0
"""In place of a reference's name: there is none yet; keep the decoded value as the next one."""

UNKEPT = -1
"""In place of a reference's name: there is none, and none shall be kept."""

_WAYS = ("up", "down")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reference:
    """The last decoded values of one example, up and down, as bfloat16; and their name."""

    up_TD: Tensor
    down_TD: Tensor
    name: int

    @staticmethod
    def of(up_TD: Tensor, down_TD: Tensor) -> "Reference":
        """The reference that holds these values."""
        # Cloned, since views of the rows would keep the memory of the whole batch.
        up_TD, down_TD = (each.detach().cpu().bfloat16().clone() for each in (up_TD, down_TD))
        digest = hashlib.blake2b(digest_size=8)
        for each in (up_TD, down_TD):
            digest.update(each.view(torch.uint8).numpy().data)
        # At most 63 bits and never 0: a name fits into an int64 and is neither NEW nor UNKEPT.
        return Reference(
            up_TD=up_TD, down_TD=down_TD, name=1 + (int.from_bytes(digest.digest(), "little") >> 1)
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return self.up_TD.nbytes + self.down_TD.nbytes


# --- the client's side --------------------------------------------------------------------------


class DeltaEncoder:
    """Encodes a client's training forwards, and decodes their replies.

    A step may be repeated, so its values become references only with `commit`. References are kept
    for the first examples, as many as `wire.history_bytes` hold. All other examples, and all
    examples of a run without `wire.history_bytes`, are sent whole.

    Args:
        wire: The run's wire.
        state: The references to continue from, as `state` returned them before.
    """

    def __init__(self, wire: WireSpec, state: Mapping[str, Tensor]) -> None:
        self._codec = wire.up
        self._budget = wire.history_bytes
        self._kept: dict[int, Reference] = {}
        self._named: dict[int, Reference] = {}
        self._admitted: set[int] = set()
        self._thread = threading.local()
        self.load_state(state)

    @property
    def state(self) -> dict[str, Tensor]:
        """The references, by name; bfloat16 is viewed as int16, for stores without bfloat16."""
        return {
            f"{example}/{way}": tensor_TD.view(torch.int16)
            for example, reference in self._kept.items()
            for way, tensor_TD in zip(_WAYS, (reference.up_TD, reference.down_TD), strict=True)
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the references that `state` returned."""
        self._kept = {}
        self._next = {
            int(name): Reference.of(*(state[f"{name}/{way}"].view(torch.bfloat16) for way in _WAYS))
            for name in dict.fromkeys(name.split("/")[0] for name in state)
        }
        self.commit()

    @contextmanager
    def of(self, examples_B: Tensor) -> Iterator[None]:
        """A context in which forwards of this thread are of these examples, row by row."""
        self._thread.examples = examples_B.tolist()
        try:
            yield
        finally:
            del self._thread.examples

    def encode(self, request: ForwardRequest) -> ForwardRequest:
        """A forward as the delta to the references of its examples.

        Raises:
            ProtocolError: The numbers of examples and sequences differ.
            ConfigError: The budget does not hold a single reference.
        """
        whole_BTD, examples = request.smashed_BTD, self._examples
        if not examples or not self._budget:
            return request
        if len(examples) != len(whole_BTD):
            raise ProtocolError(
                f"{len(examples)} examples were named for {len(whole_BTD)} sequences"
            )
        references = [self._reference_of(example, whole_BTD) for example in examples]
        names = [
            reference.name if reference else self._new_name(example, whole_BTD)
            for example, reference in zip(examples, references, strict=True)
        ]
        if set(names) == {UNKEPT}:
            return request
        base_BTD, _ = _stacked(references, whole_BTD)
        return replace(request, bases_B=torch.tensor(names), base_BTD=base_BTD)

    def with_references(self, request: ForwardRequest) -> ForwardRequest:
        """The same forward with the references that the trunk has lost."""
        return replace(request, references=self._stacked_for(request))

    def decode(self, request: ForwardRequest, reply: ForwardReply) -> ForwardReply:
        """The decoded reply; the decoded values become the next references with `commit`."""
        if request.bases_B is None:
            return reply
        up_BTD, down_BTD = self._stacked_for(request)
        # The client computes what the trunk decoded, so that both have the same reference.
        up_BTD = as_restored(request.smashed_BTD, self._codec, up_BTD)
        down_BTD = _restored(reply.trunk_out_BTD, down_BTD)
        numbers = zip(self._examples, request.bases_B.tolist(), strict=True)
        for (example, name), up_TD, down_TD in zip(numbers, up_BTD, down_BTD, strict=True):
            if name != UNKEPT:
                self._next[example] = Reference.of(up_TD, down_TD)
        return replace(reply, trunk_out_BTD=down_BTD)

    def commit(self) -> None:
        """Make the values of the step that was taken the references from now on."""
        self._kept |= self._next
        self._named = {reference.name: reference for reference in self._kept.values()}
        self._num_bytes = sum(reference.num_bytes for reference in self._kept.values())
        self.rollback()

    def rollback(self) -> None:
        """Drop the values since the last step that was taken."""
        self._next = {}
        self._admitted = set()

    @property
    def _examples(self) -> list[int]:
        examples: list[int] = getattr(self._thread, "examples", [])
        return examples

    def _reference_of(self, example: int, whole_BTD: Tensor) -> Reference | None:
        reference = self._kept.get(example)
        return reference if reference and reference.up_TD.shape == whole_BTD.shape[1:] else None

    def _new_name(self, example: int, whole_BTD: Tensor) -> int:
        """`NEW` if the budget has room for one more example, else `UNKEPT`."""
        size = 2 * torch.bfloat16.itemsize * whole_BTD[0].numel()
        if size > self._budget:
            raise ConfigError(
                f"wire.history_bytes={self._budget} holds no example, of which each takes {size} "
                "bytes here; set as many for each of the client's examples, or 0 for no history"
            )
        num_bytes = self._num_bytes + len(self._admitted | {example}) * size
        if example in self._kept or num_bytes > self._budget:
            return UNKEPT
        self._admitted.add(example)
        return NEW

    def _stacked_for(self, request: ForwardRequest) -> tuple[Tensor, Tensor]:
        names = [] if request.bases_B is None else request.bases_B.tolist()
        return _stacked([self._named.get(name) for name in names], request.smashed_BTD)


# --- the trunk's side ---------------------------------------------------------------------------


class DeltaDecoder:
    """Decodes the training forwards of all clients, and encodes their replies.

    Several threads may use it. It may drop any reference, because clients send lost ones again.

    Args:
        budget_bytes: Bytes for the references of one client. References that have a successor are
            dropped first, then the least recently used.
        max_clients: The number of budgets for all clients together. The client whose last forward
            is the oldest loses its references first.
    """

    def __init__(self, budget_bytes: int, *, max_clients: int = 1) -> None:
        self._budget = budget_bytes
        self._max_bytes = budget_bytes * max_clients
        self._lock = threading.Lock()
        self._clients: OrderedDict[str, _ClientReferences] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Bytes of the references of all clients."""
        return sum(references.num_bytes for references in tuple(self._clients.values()))

    def in_use(self) -> dict[str, str]:
        """Return how much of each budget is in use, by the setting that limits it."""
        held = [references.num_bytes for references in tuple(self._clients.values())]
        return {
            "histories": f"{sum(held)} of {self._max_bytes}",
            "wire.history_bytes": f"{max(held, default=0)} of {self._budget}",
        }

    def decode(self, client: str, request: ForwardRequest) -> "DecodedForward":
        """The decoded forward of a client; it also encodes the reply.

        Raises:
            HistoryLost: A reference is not here.
            BadTensor: A reference that came with the request is not the one that it names.
        """
        if request.bases_B is None:
            return DecodedForward(request)
        with self._lock:
            kept = self._clients.setdefault(client, _ClientReferences(self._budget))
            self._clients.move_to_end(client)
            while self.num_bytes > self._max_bytes:
                self._clients.popitem(last=False)
        names = request.bases_B.tolist()
        up_BTD, down_BTD = _stacked(kept.found(names, request.references), request.smashed_BTD)
        smashed_BTD = _restored(request.smashed_BTD, up_BTD)
        whole = replace(request, smashed_BTD=smashed_BTD, bases_B=None, references=())
        return DecodedForward(whole, kept, names, down_BTD)

    def forget(self, client: str) -> None:
        """Drop the references of a client."""
        with self._lock:
            self._clients.pop(client, None)


@dataclass(frozen=True, slots=True, eq=False)
class DecodedForward:
    """A decoded forward, `whole`, and the references that its reply is encoded with, if any."""

    whole: ForwardRequest
    kept: "_ClientReferences | None" = None
    names: Sequence[int] = ()
    down_BTD: Tensor | None = None

    def encode(self, reply: ForwardReply) -> ForwardReply:
        """The encoded reply; the values that its client will decode are kept as references."""
        if self.kept is None or self.down_BTD is None:
            return reply
        arrived_BTD = as_restored(reply.trunk_out_BTD, reply.codec, self.down_BTD)
        pairs = zip(self.whole.smashed_BTD, arrived_BTD, strict=True)
        for name, pair in zip(self.names, pairs, strict=True):
            if name != UNKEPT:
                self.kept.keep(Reference.of(*pair), name)
        return replace(reply, base_BTD=self.down_BTD)


@dataclass(slots=True)
class _ClientReferences:
    """The references of one client, in the order in which they are dropped."""

    budget: int
    named: "OrderedDict[int, Reference]" = field(default_factory=OrderedDict)
    num_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def found(self, names: Sequence[int], sent: Sequence[Tensor]) -> list[Reference | None]:
        """The references of these names, kept or sent; None in place of `NEW` and `UNKEPT`."""
        known = {each.name: each for each in map(Reference.of, *sent)} if sent else {}
        with self.lock:
            known |= {name: self.named[name] for name in names if name in self.named}
        if lost := set(names) - {NEW, UNKEPT, *known}:
            if sent:
                raise BadTensor(
                    f"the activations that were sent again for {len(lost)} of {len(names)} "
                    "sequences are not those that the forward names; send the named ones"
                )
            raise HistoryLost(
                f"{len(lost)} of {len(names)} sequences are deltas to activations that this trunk "
                "has lost; send those again"
            )
        return [known.get(name) for name in names]

    def keep(self, reference: Reference, before: int) -> None:
        """Keep a reference as the successor of another one."""
        with self.lock:
            # A repeated step still uses the old reference, so it is only the first to be dropped.
            if before in self.named:
                self.named.move_to_end(before, last=False)
            self._drop(reference.name)
            self.named[reference.name] = reference
            self.num_bytes += reference.num_bytes
            while self.num_bytes > self.budget:
                self._drop(next(iter(self.named)))

    def _drop(self, name: int) -> None:
        reference = self.named.pop(name, None)
        self.num_bytes -= reference.num_bytes if reference else 0


# --- both sides ---------------------------------------------------------------------------------


def as_restored(tensor_BTD: Tensor, codec: str, base_BTD: Tensor) -> Tensor:
    """The value that the receiver decodes for a tensor sent as its delta to `base_BTD`."""
    return _restored(as_received(tensor_BTD, codec, base_BTD), base_BTD)


def _restored(delta_BTD: Tensor, base_BTD: Tensor) -> Tensor:
    return base_BTD.to(delta_BTD) + delta_BTD


def _stacked(references: Sequence[Reference | None], like_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """The references of a batch's sequences, up and down; zeros where there is none."""
    up_BTD, down_BTD = (torch.zeros(like_BTD.shape, dtype=torch.bfloat16) for _ in range(2))
    for up_TD, down_TD, reference in zip(up_BTD, down_BTD, references, strict=True):
        if reference is not None:
            up_TD.copy_(reference.up_TD)
            down_TD.copy_(reference.down_TD)
    return up_BTD, down_BTD
