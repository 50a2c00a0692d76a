"""What the trunk and its clients have had of their examples, as far as the trunk remembers it.

It may forget anything: see `fedsplit.wire.history`. Shapes: B sequences, T tokens, D hidden width.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedsplit.errors import BadTensor, HistoryLost
from fedsplit.wire.history import NEW, UNKEPT, Base, restored, sent, stacked
from fedsplit.wire.messages import ForwardReply, ForwardRequest


class Histories:
    """The bases of every client's examples, by name.

    Args:
        budget_bytes: What those of one client may take. First go those that have a successor, then
            those that were of use the longest ago.
        max_clients: All clients together may take this many budgets; the clients that were heard
            the longest ago lose theirs first.
    """

    def __init__(self, budget_bytes: int, *, max_clients: int = 1) -> None:
        self._budget = budget_bytes
        self._max_bytes = budget_bytes * max_clients
        self._lock = threading.Lock()
        self._clients: OrderedDict[str, _Bases] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Bytes of all clients' bases."""
        return sum(bases.num_bytes for bases in self._clients.values())

    def of(self, client: str, request: ForwardRequest) -> "Forward":
        """A forward of a client, with the bases that it goes by.

        Raises:
            HistoryLost: One is not there (any more).
            BadTensor: What was brought for one is another.
        """
        if request.bases_B is None:
            return Forward(request)
        with self._lock:
            bases = self._clients.setdefault(client, _Bases(self._budget))
            self._clients.move_to_end(client)
            while self.num_bytes > self._max_bytes:
                self._clients.popitem(last=False)
        names = request.bases_B.tolist()
        up_BTD, down_BTD = stacked(bases.found(names, request.references), request.smashed_BTD)
        smashed_BTD = restored(request.smashed_BTD, up_BTD)
        whole = replace(request, smashed_BTD=smashed_BTD, bases_B=None, references=())
        return Forward(whole, _Basis(bases, names, down_BTD))

    def forget(self, client: str) -> None:
        """Forget a client."""
        with self._lock:
            self._clients.pop(client, None)


@dataclass(frozen=True, slots=True, eq=False)
class Forward:
    """A forward, whole, and what its reply travels as a difference from, if anything."""

    whole: ForwardRequest
    basis: "_Basis | None" = None

    def answer(self, reply: ForwardReply) -> ForwardReply:
        """The reply as it travels; what its client makes of it is kept as the next bases."""
        if self.basis is None:
            return reply
        base_BTD = self.basis.down_BTD
        arrived_BTD = sent(reply.trunk_out_BTD, reply.codec, base_BTD)
        pairs = zip(self.whole.smashed_BTD, arrived_BTD, strict=True)
        for name, pair in zip(self.basis.names, pairs, strict=True):
            if name != UNKEPT:
                self.basis.bases.keep(Base.of(*pair), name)
        return replace(reply, base_BTD=base_BTD)


@dataclass(frozen=True, slots=True, eq=False)
class _Basis:
    bases: "_Bases"
    names: Sequence[int]
    down_BTD: Tensor


@dataclass(slots=True)
class _Bases:
    """Those of one client, the first to go first."""

    budget: int
    named: "OrderedDict[int, Base]" = field(default_factory=OrderedDict)
    num_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def found(self, names: Sequence[int], references: Sequence[Tensor]) -> list[Base | None]:
        """The bases of these names, of which some may have been brought; none where none is."""
        known = {base.name: base for base in map(Base.of, *references)} if references else {}
        with self.lock:
            known |= {name: self.named[name] for name in names if name in self.named}
        if lost := set(names) - {NEW, UNKEPT, *known}:
            if references:
                raise BadTensor(
                    f"the activations that were sent again for {len(lost)} of {len(names)} "
                    "sequences are others than the forward goes by"
                )
            raise HistoryLost(
                f"{len(lost)} of {len(names)} sequences go by activations that are not here (any "
                "more); send those again"
            )
        return [known.get(name) for name in names]

    def keep(self, base: Base, before: int) -> None:
        """Keep a base in place of the one before it, which may be asked for once more."""
        with self.lock:
            if before in self.named:
                self.named.move_to_end(before, last=False)
            self._drop(base.name)
            self.named[base.name] = base
            self.num_bytes += base.num_bytes
            while self.num_bytes > self.budget:
                self._drop(next(iter(self.named)))

    def _drop(self, name: int) -> None:
        base = self.named.pop(name, None)
        self.num_bytes -= base.num_bytes if base else 0
