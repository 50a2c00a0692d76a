"""In the trunk's place, for a model that is not split: the baselines train with the same loop."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from fedsplit.randomness import draws

T = TypeVar("T")


class NoTrunk:
    """Answers what `fedsplit.client.trainer` asks a `RemoteTrunk`, for a model that holds all.

    Args:
        model: The unsplit model.
        client: Who trains it.
    """

    next_call = 0
    trunk_sq_norm = 0.0
    encoder_state: Mapping[str, Tensor] = MappingProxyType({})
    autocast = ""

    def __init__(self, model: PreTrainedModel, *, client: str) -> None:
        self.client = client
        self.draws = draws(model)

    def open(self, round: int = 0, *, training: bool = True, first_call: int = 0) -> int:
        """Nothing is opened; the version never changes."""
        return 0

    @contextmanager
    def session(
        self, round: int = 0, *, training: bool = True, first_call: int = 0
    ) -> Iterator[None]:
        """A block like any other."""
        yield

    def examples(self, numbers_B: Tensor) -> AbstractContextManager[None]:
        """A block like any other: nothing crosses."""
        return nullcontext()

    def run_pieces(self, pieces: Sequence[Callable[[], T]]) -> list[T]:
        """Do pieces of a step, one after another: nothing is waited for."""
        return [piece() for piece in pieces]

    def step(
        self, *, step: int, num_tokens: int, client_sq_norm: float, loss_scale: float = 1.0
    ) -> None:
        """There is nobody to step with."""
