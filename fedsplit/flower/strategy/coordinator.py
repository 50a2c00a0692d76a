"""The server's loop of a round: sends work to clients, collects replies, and applies the policy."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedsplit.errors import Diverged
from fedsplit.flower.client_arrays import pack
from fedsplit.flower.records import ARRAYS, WEIGHT
from fedsplit.flower.reply import evaluation_content, training_content
from fedsplit.flower.strategy.client_states import ClientStates
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
from fedsplit.flower.strategy.weight_guard import WeightGuard
from fedsplit.flower.trunk_server import TrunkServer
from fedsplit.spec import RunSpec

log = logging.getLogger(__name__)

_MISSED_ROUNDS = 3
"""Rounds in a row after which a client whose node is missing has left the run."""

_FRUITLESS_ROUNDS = 3
"""Rounds in a row after which a run ends if none of their clients has finished."""

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
        states: The states of the clients.
        fruitless: The last rounds in a row in which no client has finished.
        guard: Bounds the clients' changes of the client weights.
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
        add_join_info: Callable[[Message, str, int, int], None],
        merge: Merge,
        states: ClientStates,
        fruitless: set[int],
        guard: WeightGuard,
        rounds: RoundState,
        timeout_s: float | None,
    ) -> None:
        self.rounds = rounds
        self._states = states
        self._guard = guard
        self.tracker = MessageTracker(grid, registry.replaced)
        self.metrics = RoundMetrics()
        self._missed: Counter[str] = Counter()
        self._fruitless = fruitless
        self._registry = registry
        self._run = run
        self._service = trunk_server.service
        self._add_join_info = add_join_info
        self._merge = merge
        self._is_virtual = bool(run.policy.sim_slowdown)
        self._is_stepped = run.baseline == "none" and run.train.mode == "joint"
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
        present, nodes = self._registry.present(), self.tracker.busy_nodes()
        self.metrics.missing |= self.metrics.connected - present.keys()
        # A node with a message that was given up is still busy, though its work is not counted.
        names = {work.client for work in self.rounds.busy}
        return {n: node for n, node in present.items() if n not in names and node not in nodes}

    def name_of(self, message: Message) -> str:
        """Return the client that a message is sent to."""
        return self._registry.name_of(message.metadata.dst_node_id)

    def ready(self) -> dict[str, int]:
        """Return those of the idle nodes whose clients have steps left to train."""
        return {name: node for name, node in self.idle().items() if name not in self._states.done}

    def is_done(self) -> bool:
        """Return whether all connected clients have taken all steps of the run."""
        return bool(self._states.done) and self._states.done >= self._registry.present().keys()

    def forget_departed(self) -> None:
        """Let the trunk drop its state for clients that are done or have left the run.

        A client has left once its node was missing after `_MISSED_ROUNDS` rounds in a row. If it
        comes back, its replica of the trunk starts from the mean, with new optimizer moments.
        """
        present = self._registry.present()
        for client in self._registry.names:
            self._missed[client] = 0 if client in present else self._missed[client] + 1
            if client in self._states.done or self._missed[client] >= _MISSED_ROUNDS:
                self._service.forget(client)

    @property
    def unmerged(self) -> list[Work]:
        """The work that has replied and is not merged yet, in the order of its numbers."""
        return sorted((work for work, _ in self.rounds.arrived), key=lambda work: work.number)

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
                self.metrics.failures.append((work.client, "no reply in time"))
                self.metrics.missing.add(work.client)
                log.warning("round %s: %s is given up: no reply in time", number, work.client)
                # It is not of the next round, so the steps of that one are not without it.
                self._service.release(work.client)
        return arrays

    def require_progress(self, number: int) -> None:
        """Raise an error if no client finished the round, and the next one would be no better.

        Clients can fail by themselves, or on purpose. So a round that had some of the clients only
        does not end the run, unless it is the third such round in a row.

        Raises:
            Diverged: All clients of the run failed in this round, or some in each of three rounds.
        """
        if self.metrics.trained:
            self._fruitless.clear()
            return
        self._fruitless.add(number)
        asked = self.metrics.asked | {work.client for work in self.rounds.busy}
        reasons = (reason for _, reason in self.metrics.failures)
        reason = next(reasons, "nothing before the deadline")
        problem = (
            f"round {number}, training: none of {len(asked)} clients finished; the first said: "
            f"{reason}"
        )
        if asked.issuperset(self._registry.names) or len(self._fruitless) >= _FRUITLESS_ROUNDS:
            raise Diverged(problem)
        log.warning("%s", problem)

    def evaluate(self, number: int, messages: Sequence[Message]) -> list[Message]:
        """Have clients evaluate, and return their replies sorted by client.

        A reply without a token, which has no weight in any mean, is left out. There is no reply if
        all of these clients fail and the run has others.

        Raises:
            Diverged: All clients of the run failed.
        """
        replies: list[tuple[str, Message]] = []
        reasons = []
        for message in messages:
            name = self.name_of(message)
            self._add_join_info(message, name, number, 0)
            # A count of earlier work must not bound this reply.
            self._service.engine.work.take(name)
            pack(message.content, self._run.client_weights_codec)
            self.metrics.count_arrays(message)
        asked = dict(zip(self.tracker.send(messages), messages, strict=True))
        until = time.monotonic() + self.timeout_s
        while asked and time.monotonic() < until:
            for i, reply in self.tracker.collect(asked).items():
                name = self.name_of(asked.pop(i))
                check = partial(evaluation_content, work=self._service.engine.work.take(name))
                where = f"round {number}, evaluation"
                unmeasured = self.metrics.unmeasured
                if problem := self.metrics.problem_with(reply, check, name, where, unmeasured):
                    reasons.append(problem)
                else:
                    replies.append((name, reply))
                    self.metrics.evaluated.append((name, numbers_of(reply)))
        self.tracker.give_up(asked)
        self.metrics.missing |= {self.name_of(message) for message in asked.values()}
        if not replies:
            problem = (
                f"round {number}, evaluation: none of {len(messages)} clients finished; the first "
                f"said: {next(iter(reasons), 'nothing before the deadline')}"
            )
            if {self.name_of(m) for m in messages}.issuperset(self._registry.names):
                raise Diverged(problem)
            log.warning("%s", problem)
        # Sums of floats depend on the order, and the order of arrival is random.
        replies.sort(key=lambda pair: pair[0])
        return [reply for _, reply in replies if numbers_of(reply)[WEIGHT]]

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
                log.info("%s: its weights of round %s are not merged", work.client, work.round)
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
            next_state = self._states.begin(work)
            self._add_join_info(message, work.client, work.round, next_state)
            # A count of earlier work must not become the weight of this one.
            self._service.engine.work.take(work.client)
            self._started[work.number] = pack(message.content, self._run.client_weights_codec)
            self.metrics.count_arrays(message)
            self.metrics.asked.add(work.client)
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
        sent = self._started[work.number]
        client, done = work.client, self._service.engine.work.take(work.client)
        codec, is_stepped = self._run.client_weights_codec, self._is_stepped

        def check(content: RecordDict) -> RecordDict:
            checked = training_content(
                content, sent=sent, codec=codec, work=done, is_stepped=is_stepped, client=client
            )
            bounded = self._guard.bounded(client, checked, sent)
            self.metrics.clipped_replies += bounded is not checked
            return bounded

        where = f"round {work.round}, training"
        broken = self.metrics.broken
        if problem := self.metrics.problem_with(reply, check, work.client, where, broken):
            # The trunk's barrier must not wait for a client that has failed.
            self._service.release(work.client)
            del self._started[work.number]
            self._states.ended(work)
            self.metrics.failures.append((work.client, problem))
            return Failed(number=work.number)
        self._states.replied(work)
        numbers = numbers_of(reply)
        self._replies[work.number] = reply
        self.metrics.trained.append((work.client, numbers))
        if numbers["done"]:
            self._states.done.add(work.client)
        return Replied(
            number=work.number,
            num_tokens=int(numbers[WEIGHT]),
            again=work.client not in self._states.done,
        )

    def _take(self, work: Work) -> tuple[ArrayRecord, Message]:
        self._states.ended(work)
        return self._started.pop(work.number), self._replies.pop(work.number)
