"""The trunk's stand-in for a model that is not split, so that baselines use the same loop."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from fedsplit.client.instance import ServerInstance
from fedsplit.randomness import draws

T = TypeVar("T")


class NoTrunk:
    """Has the interface of `RemoteTrunk` that `ClientTrainer` uses, for an unsplit model.

    Args:
        model: The unsplit model.
        client: The name of the client that trains it.
    """

    next_call = 0
    trunk_sq_norm = 0.0
    encoder_state: Mapping[str, Tensor] = MappingProxyType({})
    autocast = ""

    def __init__(self, model: PreTrainedModel, *, client: str) -> None:
        self.client = client
        self.instance = ServerInstance(client)
        self.draws = draws(model)

    def open(self, round: int = 0, *, training: bool = True, first_call: int = 0) -> int:
        """Do nothing; return version 0, which never changes."""
        return 0

    @contextmanager
    def session(
        self, round: int = 0, *, training: bool = True, first_call: int = 0
    ) -> Iterator[None]:
        """A context that does nothing."""
        yield

    def examples(self, numbers_B: Tensor) -> AbstractContextManager[None]:
        """A context that does nothing, because nothing is sent."""
        return nullcontext()

    def run_pieces(self, pieces: Sequence[Callable[[], T]]) -> list[T]:
        """Run the micro-batches of a step one after another; return their results."""
        return [piece() for piece in pieces]

    def step(
        self, *, step: int, num_tokens: int, client_sq_norm: float, loss_scale: float = 1.0
    ) -> None:
        """Do nothing: there is no trunk to step."""
