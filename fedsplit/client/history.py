"""The client's history of its examples: it decides what a trunk goes by, and can give it again."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from fedsplit.errors import ConfigError, ProtocolError
from fedsplit.spec import WireSpec
from fedsplit.wire.history import NEW, UNKEPT, Base, restored, sent, stacked
from fedsplit.wire.messages import ForwardReply, ForwardRequest

_WAYS = ("up", "down")


class History:
    """What the receivers have had of a client's examples, as of its last step.

    A step may be repeated, so what crosses in it counts only once it is `taken`. Whose examples
    came first are kept, as many as `wire.history_bytes` hold; all others travel whole.

    Args:
        wire: The run's wire.
        state: What `state` said before.
    """

    def __init__(self, wire: WireSpec, state: Mapping[str, Tensor]) -> None:
        self._codec = wire.up
        self._budget = wire.history_bytes
        self._bases: dict[int, Base] = {}
        self._named: dict[int, Base] = {}
        self._admitted: set[int] = set()
        self._here = threading.local()
        self._next = {
            int(name): Base.of(*(state[f"{name}/{way}"].view(torch.bfloat16) for way in _WAYS))
            for name in dict.fromkeys(name.split("/")[0] for name in state)
        }
        self.taken()

    @property
    def state(self) -> dict[str, Tensor]:
        """All of it, by name; bfloat16 is shown as int16, which every store can hold."""
        return {
            f"{example}/{way}": tensor_TD.view(torch.int16)
            for example, base in self._bases.items()
            for way, tensor_TD in zip(_WAYS, (base.up_TD, base.down_TD), strict=True)
        }

    @contextmanager
    def of(self, examples_B: Tensor) -> Iterator[None]:
        """A block whose forwards, in this thread, are of these examples, row by row."""
        self._here.examples = examples_B.tolist()
        try:
            yield
        finally:
            del self._here.examples

    def differing(self, request: ForwardRequest) -> ForwardRequest:
        """A forward as the difference from what the trunk has had of its examples.

        Raises:
            ProtocolError: They are not as many as its sequences.
            ConfigError: There is no room for a single one.
        """
        whole_BTD, examples = request.smashed_BTD, self._examples
        if not examples or not self._budget:
            return request
        if len(examples) != len(whole_BTD):
            raise ProtocolError(
                f"{len(examples)} examples were named for {len(whole_BTD)} sequences"
            )
        bases = [self._base_of(example, whole_BTD) for example in examples]
        names = [
            base.name if base else self._admitted_as(example, whole_BTD)
            for example, base in zip(examples, bases, strict=True)
        ]
        if set(names) == {UNKEPT}:
            return request
        base_BTD, _ = stacked(bases, whole_BTD)
        return replace(request, bases_B=torch.tensor(names), base_BTD=base_BTD)

    def complete(self, request: ForwardRequest) -> ForwardRequest:
        """The same with the bases, which the trunk has lost."""
        return replace(request, references=self._stacked(request))

    def received(self, request: ForwardRequest, reply: ForwardReply) -> ForwardReply:
        """The reply, whole; what went and came are the examples' next bases."""
        if request.bases_B is None:
            return reply
        up_BTD, down_BTD = self._stacked(request)
        up_BTD = sent(request.smashed_BTD, self._codec, up_BTD)
        down_BTD = restored(reply.trunk_out_BTD, down_BTD)
        numbers = zip(self._examples, request.bases_B.tolist(), strict=True)
        for (example, name), up_TD, down_TD in zip(numbers, up_BTD, down_BTD, strict=True):
            if name != UNKEPT:
                self._next[example] = Base.of(up_TD, down_TD)
        return replace(reply, trunk_out_BTD=down_BTD)

    def taken(self) -> None:
        """Go by what has crossed: the step that it was for has been taken."""
        self._bases |= self._next
        self._named = {base.name: base for base in self._bases.values()}
        self._num_bytes = sum(base.num_bytes for base in self._bases.values())
        self.dropped()

    def dropped(self) -> None:
        """Forget what has crossed since the last step that was taken."""
        self._next = {}
        self._admitted = set()

    @property
    def _examples(self) -> list[int]:
        examples: list[int] = getattr(self._here, "examples", [])
        return examples

    def _base_of(self, example: int, whole_BTD: Tensor) -> Base | None:
        base = self._bases.get(example)
        return base if base and base.up_TD.shape == whole_BTD.shape[1:] else None

    def _admitted_as(self, example: int, whole_BTD: Tensor) -> int:
        """Whether there is room for one more example: what stands in place of its base's name."""
        size = 2 * torch.bfloat16.itemsize * whole_BTD[0].numel()
        if size > self._budget:
            raise ConfigError(
                f"wire.history_bytes={self._budget} holds no example, of which each takes {size} "
                "bytes here; set as many for each of the client's examples, or 0 for no history"
            )
        num_bytes = self._num_bytes + len(self._admitted | {example}) * size
        if example in self._bases or num_bytes > self._budget:
            return UNKEPT
        self._admitted.add(example)
        return NEW

    def _stacked(self, request: ForwardRequest) -> tuple[Tensor, Tensor]:
        names = [] if request.bases_B is None else request.bases_B.tolist()
        return stacked([self._named.get(name) for name in names], request.smashed_BTD)
