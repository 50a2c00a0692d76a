"""The records that the clients of a run get from its server, with the messages of Flower."""

from collections.abc import Mapping

import torch
from flwr.app import Message
from torch import Tensor

from fedsplit.flower.records import Hello, JoinInfo
from fedsplit.flower.trunk_server import TrunkServer
from fedsplit.runs.history import History
from fedsplit.spec import RunSpec


class Invitations:
    """Makes what a client needs to take part in a run.

    Args:
        run: The run.
        tokenizer: A tokenizer as JSON for clients to use; empty if the model brings its own.
        labels: The classes of a classifier.

    Attributes:
        run_id: The id by which clients find their checkpoints.
        history: The rounds that the run went back to.
        lr_scale: The factor on the clients' learning rate.
    """

    def __init__(self, run: RunSpec, tokenizer: str, labels: tuple[str, ...]) -> None:
        self.run_id = ""
        self.history = History()
        self.lr_scale = 1.0
        self._run = run
        self._tokenizer = tokenizer
        self._labels = labels

    def state(self) -> dict[str, Tensor]:
        """Return the state at the end of a round, by name."""
        return {
            "lr_scale": torch.tensor(self.lr_scale, dtype=torch.float64),
            "branches": torch.tensor(self.history.branches, dtype=torch.int64),
            "rounds": torch.tensor(self.history.rounds, dtype=torch.int64),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state that `state` returned."""
        self.lr_scale = state["lr_scale"].item()
        branches, rounds = state["branches"].tolist(), state["rounds"].tolist()
        self.history = History(branches=tuple(branches), rounds=tuple(rounds))

    @property
    def hello(self) -> Hello:
        """The first message to a client."""
        return Hello(
            run_id=self.run_id,
            config=self._run.fingerprint,
            tokenizer=self._tokenizer,
            labels=self._labels,
            history=self.history,
        )

    def add_to(
        self, message: Message, client: str, number: int, server: TrunkServer, oldest: int
    ) -> None:
        """Add to a message of a round what its client needs to work with the trunk.

        Args:
            message: The message.
            client: The client that it is for.
            number: The round.
            server: The server of the trunk.
            oldest: The oldest round that the run may go back to.
        """
        join_info = JoinInfo(
            client=client,
            round=number,
            address=server.address,
            token=server.service.admit(client),
            config=self._run.fingerprint,
            tokenizer=self._tokenizer,
            run_id=self.run_id,
            labels=self._labels,
            history=self.history,
            lr_scale=self.lr_scale,
            oldest=oldest,
        )
        message.content = join_info.put_into(message.content)
