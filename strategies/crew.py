"""The clients at work: sends them out, hears them, and asks the policy what to do."""

import time
from collections.abc import Callable, Sequence
from logging import INFO, WARNING

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedsplit.errors import Diverged, FedsplitError
from fedsplit.flower.halves import packed, shapes_of, unpacked
from fedsplit.flower.hosting import TrunkHost
from fedsplit.flower.records import ARRAYS, WEIGHT
from fedsplit.spec import RunSpec
from strategies.meeting import Meeting
from strategies.post import Post
from strategies.rounds import (
    Decision,
    Drain,
    Event,
    Failed,
    Opened,
    Replied,
    Rounds,
    Share,
    Ticked,
    Work,
    advance,
)
from strategies.tally import Tally, numbers_of

_HUNG_S = 3600.0
"""Real seconds after which a round of a virtual clock is closed, whatever that one shows."""

Merge = Callable[[Sequence[tuple[Share, ArrayRecord, Message]], ArrayRecord], ArrayRecord]
"""Makes new halves of shares, each with the halves it began with and its reply, and the halves."""


class Crew:
    """Everybody who trains in a run, from one round to the next.

    Args:
        grid: Flower's grid.
        meeting: Who its nodes are.
        run: The run.
        host: The trunk, which has to know who is at work.
        give_ticket: Puts a ticket for a client and a round into a message.
        merge: Makes new halves.
        rounds: What the policy begins with.
        timeout_s: Real seconds that a round may take; None: what the policy allows.
    """

    def __init__(
        self,
        *,
        grid: Grid,
        meeting: Meeting,
        run: RunSpec,
        host: TrunkHost,
        give_ticket: Callable[[Message, str, int], None],
        merge: Merge,
        rounds: Rounds,
        timeout_s: float | None,
    ) -> None:
        self.rounds = rounds
        self.post = Post(grid)
        self.tally = Tally()
        self._done: set[str] = set()
        self._meeting = meeting
        self._run = run
        self._service = host.service
        self._give_ticket = give_ticket
        self._merge = merge
        self._is_virtual = bool(run.policy.sim_slowdown)
        limit = _HUNG_S if self._is_virtual else run.policy.round_deadline_s
        self.timeout_s = limit if timeout_s is None else timeout_s
        self._until = 0.0
        self._spoke = 0.0
        self._asked: dict[str, Work] = {}
        self._sent: dict[str, Message] = {}
        self._began: dict[int, ArrayRecord] = {}
        self._replies: dict[int, Message] = {}

    # --- who there is -------------------------------------------------------------------------

    def idle(self) -> dict[str, int]:
        """Clients that can be asked something, by name and in its order, and their nodes."""
        nodes = self.post.busy_nodes()
        names = {work.client for work in self.rounds.busy}
        return {
            name: node
            for name, node in self._meeting.present().items()
            if name not in names and node not in nodes
        }

    def name_of(self, message: Message) -> str:
        """The client that a message goes to."""
        return self._meeting.name_of(message.metadata.dst_node_id)

    def ready(self) -> dict[str, int]:
        """Those of the idle ones that have steps left to train."""
        return {name: node for name, node in self.idle().items() if name not in self._done}

    def is_done(self) -> bool:
        """Whether all clients that are there have taken all the steps of the run."""
        return bool(self._done) and self._done >= self._meeting.present().keys()

    # --- a round ------------------------------------------------------------------------------

    def catch_up(self, arrays: ArrayRecord) -> ArrayRecord:
        """Between two rounds: hear who has come back; if nobody is ready, wait for somebody.

        Args:
            arrays: The halves.

        Returns:
            The halves after that.
        """
        self._until = time.monotonic() + self.timeout_s
        arrays, _ = self._listen(arrays)
        heard = 1
        while self.rounds.busy and not self.ready() and time.monotonic() < self._until:
            if heard:
                self._go_on([])
            arrays, heard = self._listen(arrays)
        return arrays

    def work(
        self, number: int, messages: Sequence[Message], arrays: ArrayRecord, drain: Drain
    ) -> ArrayRecord:
        """Send clients out and merge what comes back, until the policy closes the round.

        Args:
            number: The round.
            messages: What to send, without tickets.
            arrays: The halves that are in them.
            drain: Who has to be back at the end.

        Returns:
            The halves after the round.
        """
        by_name = {self.name_of(m): m for m in messages}
        self._until = time.monotonic() + self.timeout_s
        deadline = self._service.now() + self._run.policy.round_deadline_s
        opened = Opened(round=number, clients=tuple(by_name), deadline=deadline, drain=drain)
        at_once = min(self._run.launch.workers or len(by_name), len(by_name))
        self._send(self._tell(opened).send, by_name, arrays, at_once=at_once)
        while self.rounds.is_open:
            arrays, _ = self._listen(arrays)
        if self._run.policy.kind == "sync":
            for work in self.rounds.awaited:
                self.tally.reasons.append("no reply in time")
                log(WARNING, "round %s: %s is given up: no reply in time", number, work.client)
        return arrays

    def evaluate(self, number: int, messages: Sequence[Message]) -> list[Message]:
        """Have clients evaluate; their replies in the order of their names.

        Raises:
            Diverged: None of them replied.
        """
        replies: list[tuple[str, Message]] = []
        reasons = []
        for message in messages:
            self._give_ticket(message, self.name_of(message), number)
            self._pack(message)
            self.tally.carried(message)
        asked = dict(zip(self.post.send(messages), messages, strict=True))
        until = time.monotonic() + self.timeout_s
        while asked and time.monotonic() < until:
            for i, reply in self.post.collect(asked).items():
                name = self.name_of(asked.pop(i))
                if reply.has_error():
                    reasons.append(f"{reply.error.reason}")
                    log(WARNING, "round %s, evaluation: %s failed: %s", number, name, reasons[-1])
                else:
                    replies.append((name, reply))
                    self.tally.evaluated.append((name, numbers_of(reply)))
        self.post.give_up(asked)
        if not replies:
            raise Diverged(
                f"round {number}, evaluation: none of {len(messages)} clients finished; the first "
                f"said: {next(iter(reasons), 'nothing before the deadline')}"
            )
        # Sums of floats depend on the order; the order in which clients answer is chance.
        return [reply for _, reply in sorted(replies, key=lambda pair: pair[0])]

    def _listen(self, arrays: ArrayRecord) -> tuple[ArrayRecord, int]:
        """Hear who is there and do what the policy says; the halves, and how many were heard."""
        heard = self._hear()
        failures = sum(isinstance(event, Failed) for event in heard)
        again: list[Work] = []
        for event in heard or [Ticked()]:
            decision = self._tell(event)
            for work in decision.dropped:
                self._take(work)
                log(INFO, "%s: its halves of round %s are not merged", work.client, work.round)
            if decision.merge:
                shares = [(share, *self._take(share.work)) for share in decision.merge]
                arrays = self._merge(shares, arrays)
            again += decision.send
        is_stuck = time.monotonic() > self._spoke + self._run.wire.call_deadline_s
        if self.rounds.is_open and (heard or is_stuck):
            messages = {work.client: self._message_again(work, arrays) for work in again}
            self._send(again, messages, arrays, at_once=len(again), failures=failures)
        return arrays, len(heard)

    def _tell(self, event: Event) -> Decision:
        is_late = time.monotonic() >= self._until
        now = float("inf") if is_late else self._service.now()
        self.rounds, decision = advance(self.rounds, event, now=now, policy=self._run.policy)
        return decision

    # --- out ----------------------------------------------------------------------------------

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
            self._give_ticket(message, work.client, work.round)
            self._began[work.number] = self._pack(message)
            self.tally.carried(message)
            out.append(message)
        self._go_on([work.client for work in works], at_once=at_once, failures=failures)
        self._asked.update(zip(self.post.send(out), works, strict=True))

    def _go_on(self, clients: Sequence[str], *, at_once: int = 0, failures: int = 0) -> None:
        """Tell the trunk who comes, and have a virtual clock go on.

        Such a clock stops at each departure, so that replies are heard in their order there. A
        failure may be a departure that is yet to come; and if the trunk has given a client up,
        nobody will hear of that, so that the clock is told to go on after some real time.
        """
        if not clients and not self._is_virtual:
            return
        self._spoke = time.monotonic()
        self._service.expect(
            clients,
            round=self.rounds.round,
            at_once=at_once,
            close_after=1 + failures,
            until=self.rounds.deadline,
        )

    def _pack(self, message: Message) -> ArrayRecord:
        """Have a message carry its halves as the run says; what its client makes of them."""
        arrays = message.content.array_records.get(ARRAYS, ArrayRecord())
        codec = self._run.wire.halves
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

    # --- and back -----------------------------------------------------------------------------

    def _hear(self) -> list[Event]:
        replies = self.post.collect(self._asked)
        found = [(self._asked.pop(i), reply) for i, reply in replies.items()]
        found.sort(key=lambda pair: (pair[0].client, pair[0].number))
        return [self._event_of(work, reply) for work, reply in found]

    def _event_of(self, work: Work, reply: Message) -> Event:
        self.tally.carried(reply)
        if trouble := self._unpack(reply, self._began[work.number]):
            self._service.release(work.client)
            del self._began[work.number]
            self.tally.reasons.append(trouble)
            log(WARNING, "round %s, training: %s failed: %s", work.round, work.client, trouble)
            return Failed(number=work.number)
        numbers = numbers_of(reply)
        self._replies[work.number] = reply
        self.tally.trained.append((work.client, numbers))
        if numbers["done"]:
            self._done.add(work.client)
        return Replied(
            number=work.number,
            num_tokens=int(numbers[WEIGHT]),
            again=work.client not in self._done,
        )

    def _unpack(self, reply: Message, began: ArrayRecord) -> str:
        """Have a reply hold its halves as they are meant; why it cannot be used, if so."""
        if reply.has_error():
            return f"{reply.error.reason}"
        if self._run.wire.halves != "none" and ARRAYS in reply.content:
            came = reply.content.array_records[ARRAYS]
            try:
                whole = unpacked(came, self._run.wire.halves, shapes_of(began))
            except FedsplitError as refusal:
                return str(refusal)
            reply.content = RecordDict({**reply.content, ARRAYS: whole})
        return _trouble_with(reply, began)

    def _take(self, work: Work) -> tuple[ArrayRecord, Message]:
        return self._began.pop(work.number), self._replies.pop(work.number)


def _trouble_with(reply: Message, began: ArrayRecord) -> str:
    """Why a reply cannot be used; empty if it can."""
    missing = {WEIGHT, "loss", "done"} - numbers_of(reply).keys()
    if missing:
        return f"its reply has no number {sorted(missing)[0]!r}"
    came = reply.content.array_records.get(ARRAYS, ArrayRecord())
    if shapes_of(came) != shapes_of(began):
        return f"its reply has {len(came)} arrays, not the {len(began)} that were sent"
    if not all(np.isfinite(array.numpy()).all() for array in came.values()):
        return "its halves hold NaN or Inf"
    return ""
