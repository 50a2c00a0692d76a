"""Who the nodes are: their names and configuration, and which of them a strategy may choose."""

import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from logging import WARNING

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedsplit.errors import ConfigError, DeadlineExceeded, FedsplitError, ModelMismatch
from fedsplit.flower.records import RESUMED
from fedsplit.spec import RunSpec

_POLL_S = 0.1


class Meeting:
    """The nodes of a run by name.

    Args:
        grid: Flower's grid.
        run: The run that they must be configured for.
        resumed: The round after which the run goes on; 0 for a new one.
    """

    def __init__(self, grid: Grid, run: RunSpec, resumed: int) -> None:
        self._grid = grid
        self._run = run
        self._resumed = resumed
        self._names: dict[int, str] = {}

    def begin(self) -> None:
        """Wait for all clients of the run and meet them.

        Raises:
            DeadlineExceeded: Too few clients connected, or answered, in time.
            ConfigError: A client cannot take part, or there are two of one name.
            ModelMismatch: A client is configured for another run.
        """
        nodes = self._await(self._run.num_nodes)
        self._meet(nodes)
        names = [self._names[node] for node in nodes]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(
                f"{len(nodes)} nodes are connected, but more than one says it is "
                f"{sorted(twice)[0]}; give each its own partition-id"
            )

    def present(self) -> dict[str, int]:
        """The nodes that are connected, by name and in its order; who is new is met first.

        Raises:
            DeadlineExceeded: None is connected for `launch.start_timeout_s`.
        """
        nodes = self._await(1)
        for node in [node for node in nodes if node not in self._names]:
            try:
                self._meet([node])
            except FedsplitError as error:
                log(WARNING, "Node %s is left out of this round: %s", node, error)
        return {name: node for name, node in sorted((self.name_of(n), n) for n in nodes) if name}

    def name_of(self, node: int) -> str:
        """The name of a node's client; empty if it never said it."""
        return self._names.get(node, "")

    def _await(self, wanted: int) -> list[int]:
        """The nodes that are connected, once there are as many as wanted."""
        clients, patience = self._run.num_nodes, self._run.launch.start_timeout_s
        until = time.monotonic() + patience
        while len(nodes := list(self._grid.get_node_ids())) < wanted:
            if time.monotonic() > until:
                raise DeadlineExceeded(
                    f"{len(nodes)} of clients={clients} are connected after {patience:.0f} s; "
                    f"start {clients - len(nodes)} more, or lower clients. In a simulation: "
                    f"--federation-config 'num-supernodes={clients} init-args-num-cpus={clients} "
                    "client-resources-num-cpus=1'"
                )
            time.sleep(_POLL_S)
        return nodes

    def _meet(self, nodes: list[int]) -> None:
        """Ask nodes for their names and configuration, before any work is done."""
        told = RecordDict({RESUMED: ConfigRecord({"round": self._resumed})})
        questions = [
            Message(told, dst_node_id=node, message_type=f"{MessageType.QUERY}.hello")
            for node in nodes
        ]
        patience = self._run.launch.start_timeout_s
        for reply in self._grid.send_and_receive(questions, timeout=patience):
            if reply.has_error():
                raise ConfigError(f"a client cannot take part: {reply.error.reason}")
            hello = reply.content.config_records["hello"]
            if hello["config"] != self._run.fingerprint:
                raise ModelMismatch(
                    f"{hello['client']!s} runs configuration {hello['config']!s}, the server "
                    f"{self._run.fingerprint}; start both from the same code, conf/ and overrides"
                )
            self._names[reply.metadata.src_node_id] = str(hello["client"])
        if silent := [node for node in nodes if node not in self._names]:
            raise DeadlineExceeded(
                f"{len(silent)} of {len(nodes)} nodes did not say within {patience:.0f} s who they "
                "are; look at their logs"
            )


class Choice(Grid):
    """A view of a grid for a strategy that samples: only some nodes, always in the same order.

    Flower's strategies sample from the ids of the nodes that are connected, in the order in which
    the grid has them, and both are chance. Here they find those that may be chosen, in the order
    of their clients' names. Messages go through it as through the grid.

    Args:
        grid: The grid.
        nodes: Finds the nodes that may be chosen, in order.
        patience_s: How long a strategy may wait for more of them.
    """

    def __init__(self, grid: Grid, nodes: Callable[[], list[int]], patience_s: float) -> None:
        self._grid = grid
        self._nodes = nodes
        self._until = time.monotonic() + patience_s
        self._patience_s = patience_s

    def set_run(self, run: Run) -> None:
        """As the grid does."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """As the grid has it."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """As the grid does."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> list[int]:
        """The nodes that may be chosen.

        Raises:
            ConfigError: The strategy has waited for more of them all the time there is.
        """
        nodes = self._nodes()
        if time.monotonic() > self._until:
            raise ConfigError(
                f"after {self._patience_s:.0f} s there are {len(nodes)} nodes to choose from, and "
                "the strategy for the halves still waits for more; lower its min_available_nodes, "
                "min_train_nodes and min_evaluate_nodes in halves.options"
            )
        return nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the grid does."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the grid does."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """As the grid does."""
        return self._grid.send_and_receive(messages, timeout=timeout)


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Let Python's own random numbers, which Flower samples with, depend on `name` alone.

    >>> with drawing("a"):
    ...     one = random.random()
    >>> with drawing("a"):
    ...     one == random.random()
    True
    """
    before = random.getstate()
    random.seed(name)
    try:
        yield
    finally:
        random.setstate(before)
