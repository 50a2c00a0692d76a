"""The nodes of a run: their names and configuration, and which of them a strategy may choose."""

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import replace

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedsplit.errors import ConfigError, DeadlineExceeded, FedsplitError, ModelMismatch
from fedsplit.flower.reply import Identity, content_of, identity_of, peer_text
from fedsplit.flower.strategy.invitations import Invitations
from fedsplit.flower.strategy.tracker import MessageTracker
from fedsplit.model.identity import difference
from fedsplit.spec import RunSpec

log = logging.getLogger(__name__)

_POLL_S = 0.1
"""Seconds between two looks at the connected nodes."""

_LOOK_S = 1.0
"""Seconds between two looks while replies are awaited."""

# By default a SuperLink forgets its nodes, and refuses those that it does not know.
_START_AGAIN = " A SuperNode ends when its SuperLink is started again: start it again too."


class NodeRegistry:
    """The nodes of a run by name.

    Args:
        grid: Flower's grid.
        run: The run that they must be configured for.
        invitations: The first message to each node.
        state_of: Returns the id of a client's last state, or 0. Only the client and this server
            know it, so a new node that has it is the client, started again.
    """

    def __init__(
        self,
        grid: Grid,
        run: RunSpec,
        invitations: Invitations,
        state_of: Callable[[str], int] = lambda client: 0,
    ) -> None:
        self._grid = grid
        self._run = run
        self._invitations = invitations
        self._state_of = state_of
        self._replaced: set[int] = set()
        self._looked_at = 0.0
        self._clients = frozenset(run.client_names)
        self._names: dict[int, str] = {}
        # The answers of nodes that have no name yet.
        self._unnamed: dict[int, Identity] = {}
        self._states: dict[str, frozenset[int]] = {}
        self._first_messages = MessageTracker(grid)
        self._asked: set[int] = set()
        # The nodes that have not answered their first message, by the id of the message.
        self._waiting: dict[str, int] = {}

    def register_all(self) -> None:
        """Wait until all clients of the run are connected, and register them.

        A node that does not answer or cannot take part, such as one that has died or belongs to
        another run, is left out if there are enough others.

        Raises:
            DeadlineExceeded: Too few clients connected, or answered, in time.
            ConfigError: A client cannot take part, or two clients have one name.
            ModelMismatch: A client is configured for another run.
        """
        wanted = self._run.num_nodes
        nodes = self._wait_for(wanted)
        self._ask(nodes)
        errors = self._answers_of(nodes, wanted)
        self._assign_names(nodes)
        names = [self._names[node] for node in nodes if node in self._names]
        if len(set(names)) >= wanted:
            self._log(errors)
            return
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(
                f"{len(nodes)} nodes are connected, but more than one says it is "
                f"{sorted(twice)[0]}; give each its own partition-id"
            )
        for error in errors.values():
            raise error
        silent = [str(node) for node in nodes if node not in self._names]
        raise DeadlineExceeded(
            f"{len(silent)} of {len(nodes)} nodes did not answer within "
            f"{self._run.launch.start_timeout_s:.0f} s: {', '.join(silent)}; look at their logs, "
            "or raise launch.start_timeout_s on a slow machine"
        )

    def present(self) -> dict[str, int]:
        """Return the connected nodes that have answered by name, sorted by name; ask new ones.

        Raises:
            DeadlineExceeded: No node is connected for `launch.start_timeout_s`.
        """
        return self._named(self._wait_for(1))

    def _named(self, nodes: list[int]) -> dict[str, int]:
        new = [node for node in nodes if node not in self._asked]
        self._ask(new)
        # A new node that does not answer must not hold up the others.
        is_known = not self._names.keys().isdisjoint(nodes)
        self._log(self._take_answers() if is_known else self._answers_of(new, len(new)))
        self._assign_names(nodes)
        found: dict[str, int] = {}
        # In the order of registration: a node cannot take the name of one that is connected.
        for node, name in self._names.items():
            if node in nodes and node not in self._replaced:
                found.setdefault(name, node)
        return dict(sorted(found.items()))

    def replaced(self) -> Set[int]:
        """Return the nodes whose clients have come back as other nodes; ask new ones for it."""
        if time.monotonic() >= self._looked_at + _LOOK_S:
            self._looked_at = time.monotonic()
            self._ask([node for node in self._grid.get_node_ids() if node not in self._asked])
        if self._waiting:
            self._log(self._take_answers())
        return self._replaced

    def wait_for_all(self, timeout_s: float) -> Set[str]:
        """Wait until all clients of the run are connected, for at most `timeout_s` seconds.

        Returns:
            The names of those that are.
        """
        until, missing = time.monotonic() + timeout_s, 0
        while True:
            # Not `present`, which waits less long for the first of them.
            names = self._named(list(self._grid.get_node_ids())).keys()
            number = self._run.num_nodes - len(names)
            if not number or time.monotonic() > until:
                return names
            if number != missing:
                log.warning("The round waits for %d clients that are not connected", number)
            missing = number
            time.sleep(_POLL_S)

    @property
    def names(self) -> list[str]:
        """The names of all clients that were ever registered, sorted."""
        return sorted(set(self._names.values()))

    @property
    def states(self) -> Mapping[str, frozenset[int]]:
        """The ids of the states that each client could continue from when it was registered."""
        return self._states

    def name_of(self, node: int) -> str:
        """Return the name of a node's client; empty if the node is not registered."""
        return self._names.get(node, "")

    def _wait_for(self, wanted: int) -> list[int]:
        """Return the connected nodes as soon as there are `wanted` of them."""
        clients, patience = self._run.num_nodes, self._run.launch.start_timeout_s
        until = time.monotonic() + patience
        while len(nodes := list(self._grid.get_node_ids())) < wanted:
            if time.monotonic() > until:
                again = "" if nodes else _START_AGAIN
                raise DeadlineExceeded(
                    f"{len(nodes)} of clients={clients} are connected after {patience:.0f} s; "
                    f"start {clients - len(nodes)} more, or lower clients.{again} In a simulation: "
                    f"--federation-config 'num-supernodes={clients} init-args-num-cpus={clients} "
                    "client-resources-num-cpus=1'"
                )
            time.sleep(_POLL_S)
        return nodes

    def _ask(self, nodes: list[int]) -> None:
        """Ask nodes for their names and configuration, before any work is done."""
        hello = self._invitations.hello.content
        questions = [
            Message(hello, dst_node_id=node, message_type=f"{MessageType.QUERY}.hello")
            for node in nodes
        ]
        self._asked |= set(nodes)
        self._waiting |= zip(self._first_messages.send(questions), nodes, strict=True)

    def _answers_of(self, nodes: list[int], wanted: int) -> dict[int, FedsplitError]:
        """Register nodes until `wanted` have answered, or all, or `launch.start_timeout_s` is over.

        Returns:
            The errors of nodes that cannot take part, also of nodes that were asked earlier.
        """
        until = time.monotonic() + self._run.launch.start_timeout_s
        errors = self._take_answers()
        while not set(nodes).isdisjoint(self._waiting.values()) and time.monotonic() < until:
            names = {self._names[node] for node in nodes if node in self._names}
            if len(names) + len(self._unnamed.keys() & nodes) >= wanted:
                break
            errors |= self._take_answers()
        return errors

    def _take_answers(self) -> dict[int, FedsplitError]:
        errors: dict[int, FedsplitError] = {}
        for message_id, reply in self._first_messages.collect(self._waiting).items():
            node = self._waiting.pop(message_id)
            try:
                identity = self._identity_in(reply)
            except FedsplitError as error:
                errors[node] = error
                continue
            if identity.client:
                self._register(node, identity)
            else:
                self._unnamed[node] = identity
        return errors

    def _assign_names(self, nodes: list[int]) -> None:
        """Give nodes whose config has no partition the names that no connected node has."""
        taken = {self._names[n] for n in nodes if n in self._names and n not in self._replaced}
        known = set(self._names.values())
        # A client that is away keeps its name as long as another one is free.
        free = sorted(self._clients - taken, key=lambda name: (name in known, len(name), name))
        unnamed = [node for node in nodes if node in self._unnamed]
        for node, name in zip(unnamed, free, strict=False):
            log.info("Node %s has no partition-id, and becomes %s", node, name)
            self._register(node, replace(self._unnamed.pop(node), client=name))

    def _register(self, node: int, identity: Identity) -> None:
        if identity.states is None and self._run.train.save_every:
            log.warning(
                "%s keeps no state, because its SuperNode has no state-dir: this run cannot be "
                "resumed with it, and a SuperNode that is started again has new optimizer moments",
                identity.client,
            )
        self._replaced |= self._nodes_that_were(identity)
        # The first node of a name is the one that is used while it is connected.
        self._states.setdefault(identity.client, identity.states or frozenset())
        self._names[node] = identity.client

    def _nodes_that_were(self, identity: Identity) -> set[int]:
        """Return the earlier nodes of a client, if it proves by its state that it is the same."""
        state = self._state_of(identity.client)
        earlier = {node for node, name in self._names.items() if name == identity.client}
        if not earlier or not state or state not in (identity.states or ()):
            return set()
        log.info("%s was started again, as another node", identity.client)
        return earlier

    def _identity_in(self, reply: Message) -> Identity:
        """Return what the client that sent this first reply says of itself.

        Raises:
            ConfigError: It cannot take part.
            ModelMismatch: It is configured for another run.
            ProtocolError: The reply has no name of a client of this run.
        """
        if reply.has_error():
            # Flower's number, as in `flwr supernode list`; the client's name is not known yet.
            node, reason = reply.metadata.src_node_id, peer_text(reply.error.reason)
            raise ConfigError(f"the client of node {node} cannot take part: {reason}")
        identity = identity_of(content_of(reply), self._clients)
        if identity.config != self._run.fingerprint:
            settings = peer_text(difference(identity.settings, self._run.texts))
            raise ModelMismatch(
                f"{identity.client or 'a client'} runs configuration "
                f"{peer_text(identity.config)}, the server {self._run.fingerprint} ({settings}); "
                "start both from the same code, conf/ and overrides"
            )
        return identity

    def _log(self, errors: dict[int, FedsplitError]) -> None:
        for node, error in errors.items():
            log.warning("Node %s is left out: %s", node, error)


class GridView(Grid):
    """A grid that shows a strategy some of the nodes, always in the same order.

    Flower's strategies sample from the ids of the connected nodes, in the order of the grid. That
    order is random. The view shows the nodes that may be chosen, in the order of their clients'
    names. It forwards messages to the grid.

    Args:
        grid: The grid.
        nodes: Returns the nodes that may be chosen, in order.
        patience_s: How long a strategy may wait for more nodes, in seconds.
    """

    def __init__(self, grid: Grid, nodes: Callable[[], list[int]], patience_s: float) -> None:
        self._grid = grid
        self._nodes = nodes
        self._until = time.monotonic() + patience_s
        self._patience_s = patience_s

    def set_run(self, run: Run) -> None:
        """Forward to the grid."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The grid's run."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Forward to the grid."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> list[int]:
        """Return the nodes that may be chosen.

        Raises:
            ConfigError: The strategy has waited `patience_s` for more nodes.
        """
        nodes = self._nodes()
        # Flower's strategies poll this without a limit, so the limit is here.
        if time.monotonic() > self._until:
            raise ConfigError(
                f"after {self._patience_s:.0f} s there are {len(nodes)} nodes to choose from, and "
                "the strategy for the client weights still waits for more; lower its "
                "min_available_nodes, min_train_nodes and min_evaluate_nodes in "
                "client_weights.options"
            )
        return nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Forward to the grid."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Forward to the grid."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Forward to the grid."""
        return self._grid.send_and_receive(messages, timeout=timeout)


@contextmanager
def seeded_sampling(seed: str) -> Iterator[None]:
    """Seed Python's `random`, which Flower samples with, inside the block, and restore it after.

    >>> with seeded_sampling("a"):
    ...     one = random.random()
    >>> with seeded_sampling("a"):
    ...     one == random.random()
    True
    """
    # Flower's sampling takes no generator: it draws from the process's own.
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)
