"""The server's loop of a round: sends work to clients, collects replies, and applies the policy."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from logging import INFO, WARNING

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedsplit.errors import BadTensor, Diverged, FedsplitError
from fedsplit.flower.client_arrays import packed, shapes_of, unpacked
from fedsplit.flower.npy import values_of
from fedsplit.flower.records import ARRAYS, WEIGHT
from fedsplit.flower.strategy.nodes import NodeRegistry
from fedsplit.flower.strategy.round_metrics import RoundMetrics, numbers_of
from fedsplit.flower.strategy.round_policy import (
    Decision,
    Drain,
    Event,
    Failed,
    Opened,
    Replied,
    RoundState,
    Share,
    Ticked,
    Work,
    advance,
)
from fedsplit.flower.strategy.tracker import MessageTracker
from fedsplit.flower.trunk_server import TrunkServer
from fedsplit.spec import RunSpec

_MISSED_ROUNDS = 3
"""Rounds in a row after which a client whose node is missing has left the run."""

_STALLED_S = 3600.0
"""Real seconds after which a round on a virtual clock is closed, whatever the virtual time is."""

Merge = Callable[[Sequence[tuple[Share, ArrayRecord, Message]], ArrayRecord], ArrayRecord]
"""Returns new client weights.

Its arguments are the shares, each with the weights its client started from and its reply, and the
current weights.
"""


class RoundCoordinator:
    """Sends work to the clients of a run and merges their replies, round after round.

    Args:
        grid: Flower's grid.
        registry: The nodes by name.
        run: The run.
        trunk_server: The trunk's server; its service gets the names of the clients with work.
        add_join_info: Adds to a message what a client needs to take part in a round.
        merge: Merges replies.
        rounds: The policy's state at the start.
        timeout_s: Real seconds that a round may take; None: what the policy allows.
    """

    def __init__(
        self,
        *,
        grid: Grid,
        registry: NodeRegistry,
        run: RunSpec,
        trunk_server: TrunkServer,
        add_join_info: Callable[[Message, str, int], None],
        merge: Merge,
        rounds: RoundState,
        timeout_s: float | None,
    ) -> None:
        self.rounds = rounds
        self.tracker = MessageTracker(grid)
        self.metrics = RoundMetrics()
        self._done: set[str] = set()
        self._missed: Counter[str] = Counter()
        self._registry = registry
        self._run = run
        self._service = trunk_server.service
        self._add_join_info = add_join_info
        self._merge = merge
        self._is_virtual = bool(run.policy.sim_slowdown)
        # A deadline in seconds of a virtual clock says nothing about real seconds.
        limit = _STALLED_S if self._is_virtual else run.policy.round_deadline_s
        self.timeout_s = limit if timeout_s is None else timeout_s
        self._until = 0.0
        self._announced_at = 0.0
        self._asked: dict[str, Work] = {}
        self._sent: dict[str, Message] = {}
        self._started: dict[int, ArrayRecord] = {}
        self._replies: dict[int, Message] = {}

    # --- clients ------------------------------------------------------------------------------

    def idle(self) -> dict[str, int]:
        """Return the nodes without work by the names of their clients, sorted by name."""
        nodes = self.tracker.busy_nodes()
        # A node with a message that was given up is still busy, though its work is not counted.
        names = {work.client for work in self.rounds.busy}
        return {
            name: node
            for name, node in self._registry.present().items()
            if name not in names and node not in nodes
        }

    def name_of(self, message: Message) -> str:
        """Return the client that a message is sent to."""
        return self._registry.name_of(message.metadata.dst_node_id)

    def ready(self) -> dict[str, int]:
        """Return those of the idle nodes whose clients have steps left to train."""
        return {name: node for name, node in self.idle().items() if name not in self._done}

    def is_done(self) -> bool:
        """Return whether all connected clients have taken all steps of the run."""
        return bool(self._done) and self._done >= self._registry.present().keys()

    def forget_departed(self) -> None:
        """Let the trunk drop its state for clients that are done or have left the run.

        A client has left once its node was missing after `_MISSED_ROUNDS` rounds in a row. If it
        comes back, its replica of the trunk starts from the mean, with new optimizer moments.
        """
        present = self._registry.present()
        for client in self._registry.names:
            self._missed[client] = 0 if client in present else self._missed[client] + 1
            if client in self._done or self._missed[client] >= _MISSED_ROUNDS:
                self._service.forget(client)

    # --- a round ------------------------------------------------------------------------------

    def catch_up(self, arrays: ArrayRecord) -> ArrayRecord:
        """Collect late replies between two rounds; if no client is ready, wait for one.

        Args:
            arrays: The client weights.

        Returns:
            The client weights after that.
        """
        self._until = time.monotonic() + self.timeout_s
        arrays, _ = self._poll(arrays)
        num_replies = 1
        while self.rounds.busy and not self.ready() and time.monotonic() < self._until:
            if num_replies:
                self._announce([])
            arrays, num_replies = self._poll(arrays)
        return arrays

    def work(
        self, number: int, messages: Sequence[Message], arrays: ArrayRecord, drain: Drain
    ) -> ArrayRecord:
        """Send clients work and merge their replies until the policy closes the round.

        Args:
            number: The round.
            messages: The messages to send, without `JoinInfo`.
            arrays: The client weights in them.
            drain: The clients to wait for at the end.

        Returns:
            The client weights after the round.
        """
        by_name = {self.name_of(m): m for m in messages}
        self._until = time.monotonic() + self.timeout_s
        deadline = self._service.now() + self._run.policy.round_deadline_s
        opened = Opened(round=number, clients=tuple(by_name), deadline=deadline, drain=drain)
        at_once = min(self._run.launch.workers or len(by_name), len(by_name))
        self._send(self._apply(opened).send, by_name, arrays, at_once=at_once)
        while self.rounds.is_open:
            arrays, _ = self._poll(arrays)
        if self._run.policy.kind == "sync":
            for work in self.rounds.awaited:
                self.metrics.reasons.append("no reply in time")
                log(WARNING, "round %s: %s is given up: no reply in time", number, work.client)
        return arrays

    def evaluate(self, number: int, messages: Sequence[Message]) -> list[Message]:
        """Have clients evaluate, and return their replies sorted by client.

        Raises:
            Diverged: No client replied.
        """
        replies: list[tuple[str, Message]] = []
        reasons = []
        for message in messages:
            self._add_join_info(message, self.name_of(message), number)
            self._pack(message)
            self.metrics.count_arrays(message)
        asked = dict(zip(self.tracker.send(messages), messages, strict=True))
        until = time.monotonic() + self.timeout_s
        while asked and time.monotonic() < until:
            for i, reply in self.tracker.collect(asked).items():
                name = self.name_of(asked.pop(i))
                if reply.has_error():
                    reasons.append(f"{reply.error.reason}")
                    log(WARNING, "round %s, evaluation: %s failed: %s", number, name, reasons[-1])
                else:
                    replies.append((name, reply))
                    self.metrics.evaluated.append((name, numbers_of(reply)))
        self.tracker.give_up(asked)
        if not replies:
            raise Diverged(
                f"round {number}, evaluation: none of {len(messages)} clients finished; the first "
                f"said: {next(iter(reasons), 'nothing before the deadline')}"
            )
        # Sums of floats depend on the order, and the order of arrival is random.
        return [reply for _, reply in sorted(replies, key=lambda pair: pair[0])]

    def _poll(self, arrays: ArrayRecord) -> tuple[ArrayRecord, int]:
        """Collect replies and act on the policy's decisions.

        Returns:
            The client weights after that, and the number of replies.
        """
        events = self._collect()
        failures = sum(isinstance(event, Failed) for event in events)
        again: list[Work] = []
        for event in events or [Ticked()]:
            decision = self._apply(event)
            for work in decision.dropped:
                self._take(work)
                log(INFO, "%s: its weights of round %s are not merged", work.client, work.round)
            if decision.merge:
                shares = [(share, *self._take(share.work)) for share in decision.merge]
                arrays = self._merge(shares, arrays)
            again += decision.send
        is_stalled = time.monotonic() > self._announced_at + self._run.wire.call_deadline_s
        if self.rounds.is_open and (events or is_stalled):
            messages = {work.client: self._message_again(work, arrays) for work in again}
            self._send(again, messages, arrays, at_once=len(again), failures=failures)
        return arrays, len(events)

    def _apply(self, event: Event) -> Decision:
        # Infinity is past every deadline, so the policy closes the round at the next event.
        is_late = time.monotonic() >= self._until
        now = float("inf") if is_late else self._service.now()
        self.rounds, decision = advance(self.rounds, event, now=now, policy=self._run.policy)
        return decision

    # --- requests -----------------------------------------------------------------------------

    def _send(
        self,
        works: Sequence[Work],
        messages: dict[str, Message],
        arrays: ArrayRecord,
        *,
        at_once: int,
        failures: int = 0,
    ) -> None:
        out = []
        for work in works:
            message = self._sent[work.client] = messages[work.client]
            self._add_join_info(message, work.client, work.round)
            self._started[work.number] = self._pack(message)
            self.metrics.count_arrays(message)
            out.append(message)
        # Before the messages: a client could otherwise reach the trunk before its announcement.
        self._announce([work.client for work in works], at_once=at_once, failures=failures)
        self._asked.update(zip(self.tracker.send(out), works, strict=True))

    def _announce(self, clients: Sequence[str], *, at_once: int = 0, failures: int = 0) -> None:
        """Announce to the trunk the clients that will connect, and let a virtual clock continue.

        A virtual clock stops at each departure, so that replies are collected in their order
        there. A failure may be a departure that is yet to come. If the trunk has given a client up,
        no reply reports it, so the clock continues after some real time.
        """
        if not clients and not self._is_virtual:
            return
        self._announced_at = time.monotonic()
        self._service.expect(
            clients,
            round=self.rounds.round,
            at_once=at_once,
            close_after=1 + failures,
            until=self.rounds.deadline,
        )

    def _pack(self, message: Message) -> ArrayRecord:
        """Compress a message's client weights with the run's codec.

        Returns:
            The weights as the client decodes them.
        """
        arrays = message.content.array_records.get(ARRAYS, ArrayRecord())
        codec = self._run.wire.client_weights
        if codec == "none":
            return arrays
        carried = packed(arrays, codec)
        message.content = RecordDict({**message.content, ARRAYS: carried})
        return unpacked(carried, codec, shapes_of(arrays))

    def _message_again(self, work: Work, arrays: ArrayRecord) -> Message:
        last = self._sent[work.client]
        return Message(
            RecordDict({**last.content, ARRAYS: arrays}),
            dst_node_id=last.metadata.dst_node_id,
            message_type=last.metadata.message_type,
        )

    # --- replies ------------------------------------------------------------------------------

    def _collect(self) -> list[Event]:
        replies = self.tracker.collect(self._asked)
        found = [(self._asked.pop(i), reply) for i, reply in replies.items()]
        # The order of arrival is random, and the policy's decisions depend on the order.
        found.sort(key=lambda pair: (pair[0].client, pair[0].number))
        return [self._event_of(work, reply) for work, reply in found]

    def _event_of(self, work: Work, reply: Message) -> Event:
        self.metrics.count_arrays(reply)
        if problem := self._unpack(reply, self._started[work.number]):
            # The trunk's barrier must not wait for a client that has failed.
            self._service.release(work.client)
            del self._started[work.number]
            self.metrics.reasons.append(problem)
            log(WARNING, "round %s, training: %s failed: %s", work.round, work.client, problem)
            return Failed(number=work.number)
        numbers = numbers_of(reply)
        self._replies[work.number] = reply
        self.metrics.trained.append((work.client, numbers))
        if numbers["done"]:
            self._done.add(work.client)
        return Replied(
            number=work.number,
            num_tokens=int(numbers[WEIGHT]),
            again=work.client not in self._done,
        )

    def _unpack(self, reply: Message, started: ArrayRecord) -> str:
        """Decompress a reply's client weights.

        Returns:
            Why the reply cannot be used; empty if it can.
        """
        if reply.has_error():
            return f"{reply.error.reason}"
        if self._run.wire.client_weights != "none" and ARRAYS in reply.content:
            carried = reply.content.array_records[ARRAYS]
            try:
                whole = unpacked(carried, self._run.wire.client_weights, shapes_of(started))
            except FedsplitError as refusal:
                return str(refusal)
            reply.content = RecordDict({**reply.content, ARRAYS: whole})
        return _problem_with(reply, started)

    def _take(self, work: Work) -> tuple[ArrayRecord, Message]:
        return self._started.pop(work.number), self._replies.pop(work.number)


def _problem_with(reply: Message, started: ArrayRecord) -> str:
    """Return why a reply cannot be used; empty if it can."""
    missing = {WEIGHT, "loss", "done"} - numbers_of(reply).keys()
    if missing:
        return f"its reply has no number {sorted(missing)[0]!r}"
    returned = reply.content.array_records.get(ARRAYS, ArrayRecord())
    if shapes_of(returned) != shapes_of(started):
        return f"its reply has {len(returned)} arrays, not the {len(started)} that were sent"
    try:
        for name, array in returned.items():
            # In the dtype that was sent, since the average is cast to it: 1e300 is Inf in float32.
            with np.errstate(over="ignore"):
                values = values_of(array).astype(started[name].dtype)
            if not np.isfinite(values).all():
                return f"its weights hold NaN or Inf in {values.dtype}"
    except BadTensor as refusal:
        return str(refusal)
    return ""
