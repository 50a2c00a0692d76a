"""The records that the clients of a run get from its server, with the messages of Flower."""

from collections.abc import Collection

from flwr.app import Message

from fedsplit.flower.records import Hello, JoinInfo
from fedsplit.flower.share import Preparation
from fedsplit.flower.trunk_server import TrunkServer
from fedsplit.spec import RunSpec


class Invitations:
    """Makes what a client needs to take part in a run.

    Args:
        run: The run.
        tokenizer: A tokenizer as JSON for clients to use; empty if the model brings its own.
        labels: The classes of a classifier.

    Attributes:
        run_id: The id by which clients find their checkpoints.
        lr_scale: The factor on the clients' learning rate.
    """

    def __init__(self, run: RunSpec, tokenizer: str, labels: tuple[str, ...]) -> None:
        self.run_id = ""
        self.lr_scale = 1.0
        self._run = run
        self._tokenizer = tokenizer
        self._labels = labels

    @property
    def preparation(self) -> Preparation:
        """What the further servers of the run build their trunk from."""
        return Preparation(tokenizer=self._tokenizer, labels=self._labels)

    @property
    def hello(self) -> Hello:
        """The first message to a client."""
        return Hello(
            run_id=self.run_id,
            config=self._run.fingerprint,
            tokenizer=self._tokenizer,
            labels=self._labels,
        )

    def add_to(
        self,
        message: Message,
        client: str,
        number: int,
        server: TrunkServer,
        *,
        state: int,
        next_state: int,
        kept_states: Collection[int],
    ) -> None:
        """Add to a message of a round what its client needs to work with the trunk.

        Args:
            message: The message.
            client: The client that it is for.
            number: The round.
            server: The server of the trunk.
            state: The id of the client's state to begin with.
            next_state: The id of its state after this work; 0 if the state does not change.
            kept_states: The ids of its states that the run may go back to.
        """
        address, *others = server.addresses_for(client)
        join_info = JoinInfo(
            client=client,
            round=number,
            address=address,
            other_addresses=tuple(others),
            token=server.service.admit(client),
            config=self._run.fingerprint,
            tokenizer=self._tokenizer,
            run_id=self.run_id,
            labels=self._labels,
            state=state,
            next_state=next_state,
            kept_states=tuple(sorted(kept_states)),
            lr_scale=self.lr_scale,
        )
        message.content = join_info.put_into(message.content)
