"""The one thread that owns the trunk: takes work, runs it in turn, steps, goes on.

Shapes: B sequences, T tokens, D hidden width. Transport threads only submit work and wait. All
state below (parameters, stash, accumulated gradients, barrier, clock) belongs to this thread, so
none of it needs a lock. Backwards and steps go before forwards: they free memory. Whose turn it
is beyond that, `fedsplit.trunk.timeline` knows.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedsplit.errors import Draining, FedsplitError, Internal, SessionLost
from fedsplit.model.hollow import TrunkPart
from fedsplit.spec import RunSpec
from fedsplit.trunk import aggregator
from fedsplit.trunk.calls import Worker
from fedsplit.trunk.gathering import Gathering, Waiting
from fedsplit.trunk.generation import Generation
from fedsplit.trunk.inbox import Inbox, Task
from fedsplit.trunk.timeline import Asked, Deadline, Kind, RealTime, VirtualTime
from fedsplit.trunk.training import Training
from fedsplit.wire.messages import (
    BackwardReply,
    BackwardRequest,
    ForwardReply,
    ForwardRequest,
    GenerateReply,
    GenerateRequest,
    StepReply,
    StepRequest,
)

C = TypeVar("C")
R = TypeVar("R")

log = logging.getLogger(__name__)

_FIRST, _TOKENS, _LAST = 0, 1, 2
_TIME = "time"
_IDLE_S = 1.0


class TrunkEngine:
    """Runs forwards and backwards of a trunk and steps it as the policy says.

    Args:
        trunk: The trunk part, on its device; the engine owns it from now on. The parameters that
            require a gradient train.
        run: The run's optimizer, policy, budgets and seed.
        clock: Seconds that do not run backwards.
        replicas: Whether every client trains parameters of its own, and waits for nobody; what
            the model holds is then their mean, as of the last `average`.
    """

    def __init__(
        self,
        trunk: TrunkPart,
        run: RunSpec,
        clock: Callable[[], float] = time.monotonic,
        *,
        replicas: bool = False,
    ) -> None:
        self._run = run
        self._clock = clock
        self._training = Training(trunk, run, clock, replicas=replicas)
        self._generation = Generation(trunk, run.generation, clock)
        slowdown = run.policy.sim_slowdown
        self._time = VirtualTime(slowdown) if slowdown else RealTime(clock)
        self._heard = clock()
        wait_s = run.train.pass_wait_s
        forward, backward = self._training.forward, self._training.backward
        self._forwards = Gathering(partial(_resolve_all, forward), wait_s, clock)
        self._backwards = Gathering(partial(_resolve_all, backward), wait_s, clock)
        self._inbox = Inbox()
        self._thread = threading.Thread(target=self._loop, name="trunk-engine", daemon=True)

    # --- called from any thread ---------------------------------------------------------------

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """Finish what is being computed, refuse what waits, end the thread."""
        with suppress(FedsplitError):  # it may have ended by itself
            self._submit(_LAST, self._shut_down)
        if self._thread.is_alive():
            self._thread.join()

    def forward(self, worker: Worker, request: ForwardRequest) -> "Future[ForwardReply]":
        """Run smashed data through the trunk; waits for the barrier if `worker` has stepped."""
        if not request.training:
            return self._submit(_LAST, lambda: self._training.evaluate(worker, request))
        return self._ask(
            _LAST, worker, Kind.FORWARD, lambda future: self._forward(worker, request, future)
        )

    def backward(self, worker: Worker, request: BackwardRequest) -> "Future[BackwardReply]":
        """Run a gradient back through a stashed graph and accumulate the parameters' gradients."""
        future: Future[BackwardReply] = Future()
        self._inbox.put(_FIRST, future, lambda: self._backward(worker, request, future))
        return future

    def step(self, worker: Worker, request: StepRequest) -> "Future[StepReply]":
        """Contribute what `worker` accumulated; the reply does not wait for the barrier."""
        return self._ask(
            _FIRST,
            worker,
            Kind.STEP,
            lambda future: _resolve(
                future, lambda: self._training.contribute(worker, request, self.now)
            ),
        )

    def generate(self, worker: Worker, request: GenerateRequest) -> "Future[GenerateReply]":
        """Take in the next tokens of a session that generates, in a pass with others'."""
        future: Future[GenerateReply] = Future()
        ask = partial(self._generation.ask, worker.session, request, future)
        self._inbox.put(_TOKENS, future, lambda: _attempt(ask, future))
        return future

    def open_cache(self, worker: Worker) -> "Future[None]":
        """Have the trunk keep a KV cache for a session."""
        return self._submit(
            _FIRST, lambda: self._generation.open(worker.session, worker.cache_tokens)
        )

    def join(self, worker: Worker) -> "Future[int]":
        """Count a training session's client in; the current version."""
        # As late as a leave, so that a client's new session is never undone by the end of its old.
        return self._submit(_LAST, lambda: self._join(worker))

    def leave(self, worker: Worker, *, replaced: bool = False) -> "Future[None]":
        """Drop all that is kept for a session; what it contributed stays.

        A client whose session is `replaced` by another is still waited for.
        """
        # After the forwards that it still has in the queue, so that nothing comes back to stay.
        left = self._leaving(worker.client, worker.session)
        self._inbox.put(_LAST, left.future, lambda: self._leave(worker, left, replaced))
        return left.future

    def release(self, client: str) -> "Future[None]":
        """Wait no longer for a client; on a virtual clock, from its next turn on."""
        return self._submit(_LAST, lambda: self._time.ask(self._leaving(client)))

    def dismiss(self, client: str) -> "Future[None]":
        """Drop what is kept for a client that will not come again."""
        return self._submit(_FIRST, lambda: self._training.dismiss(client))

    def expect(
        self, clients: Collection[str], *, at_once: int, close_after: int, until: float
    ) -> "Future[None]":
        """Have barriers await these clients, and virtual time go on; see `TrunkService`."""
        return self._submit(_FIRST, lambda: self._expect(clients, at_once, close_after, until))

    def close(self) -> "Future[None]":
        """Have virtual time stand still."""
        return self._submit(_FIRST, lambda: self._time.close())

    def gradients(self, worker: Worker) -> "Future[dict[str, Tensor]]":
        """What a session has accumulated since its last step, by parameter name."""
        return self._submit(_FIRST, lambda: self._training.gradients(worker))

    def average(self, weights: Mapping[str, float]) -> "Future[None]":
        """Give every replica the weighted mean of these clients' parameters."""
        return self._submit(_FIRST, lambda: self._training.average(weights))

    def state(self) -> dict[str, Tensor]:
        """A copy of all that training goes on from, by name, while nobody is at work."""
        state: dict[str, Tensor] = self._on_thread(self._training.state)
        now = self.now if self._run.policy.sim_slowdown else 0.0  # real time is what it is
        return state | {_TIME: torch.tensor(now, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` handed out.

        Raises:
            CheckpointError: It is not the state of such a trunk, or somebody is at work.
        """
        self._on_thread(lambda: self._training.load_state(state))
        self._time.set(state[_TIME].item())

    @property
    def now(self) -> float:
        """Seconds of the clock that the policy goes by."""
        return self._time.now

    @property
    def version(self) -> int:
        """The current parameter version: optimizer steps taken, with replicas those of all."""
        return self._training.version

    @property
    def steps(self) -> int:
        """Where the learning rate schedule stands: the clients' own count of optimizer steps."""
        return self._training.steps

    @property
    def stashed_bytes(self) -> int:
        """Activations that are kept for outstanding backwards."""
        return self._training.stashed_bytes

    @property
    def cache_bytes(self) -> int:
        """Keys and values of the sessions that generate."""
        return self._generation.num_bytes

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a barrier, or for their turn."""
        return len(self._time.pending())

    # --- the engine's thread ------------------------------------------------------------------

    def _loop(self) -> None:
        task: Task | None = None
        try:
            while not self._inbox.closed:
                task = self._inbox.take(min(_IDLE_S, self._patience()))
                self._training.drop_expired()
                self._generation.drop_idle()
                if task:
                    task.run()
                self._give_up_who_is_silent(heard=task is not None)
                self._take_turns()
                self._forwards.run_due()
                self._backwards.run_due()
                if not self._generation.due_in() and not self._inbox.has(_TOKENS):
                    self._run_pass()
        finally:
            self._refuse_what_waits([task.future] if task else [])

    def _patience(self) -> float:
        """Seconds until something is due by itself."""
        return min(
            self._time.patience(self._training.barrier.deadline),
            self._generation.due_in(),
            self._forwards.due_in(),
            self._backwards.due_in(),
        )

    def _forward(
        self, worker: Worker, request: ForwardRequest, future: "Future[ForwardReply]"
    ) -> None:
        if begun := _attempt(lambda: self._training.begin(worker, request), future):
            place = worker.client, request.call
            call = Waiting(call=begun, session=worker.session, place=place, future=future)
            self._forwards.put(begun.kind, call, enough=self._training.clients_per_pass)

    def _backward(
        self, worker: Worker, request: BackwardRequest, future: "Future[BackwardReply]"
    ) -> None:
        if taken := _attempt(lambda: self._training.take(worker, request), future):
            place = taken.graph.place
            call = Waiting(call=taken, session=worker.session, place=place, future=future)
            self._backwards.put(taken.kind, call, enough=taken.num_members)

    def _run_pass(self) -> None:
        try:
            self._training.with_current(self._generation.run_pass)
        except Exception as failure:
            log.error("a pass of generation failed", exc_info=failure)
            self._generation.broke(failure)

    def _take_turns(self) -> None:
        while turn := self._next_turn():
            if isinstance(turn, Deadline):
                self._training.tell_all(aggregator.Ticked(), self.now)
            else:
                turn.run()

    def _next_turn(self) -> Asked | Deadline | None:
        # Not before, so that the reply to the one that made it due does not wait for the optimizer.
        self._training.step_if_due()
        barrier = self._training.barrier
        return self._time.next(barrier.deadline, barrier.givers)

    def _give_up_who_is_silent(self, *, heard: bool) -> None:
        """Whoever holds up virtual time and says nothing is taken for dead after a while."""
        if heard or not self.num_waiting:
            self._heard = self._clock()
        elif self._clock() - self._heard > self._run.wire.call_deadline_s:
            if client := self._time.give_up(self._training.barrier.givers):
                self._training.leave(client, self.now)
            self._heard = self._clock()

    def _refuse_what_waits(self, in_hand: "list[Future[Any]]") -> None:
        why = Internal("the trunk's engine failed; the server's log has the details")
        self._inbox.close(why)  # or it was closed on purpose
        self._generation.refuse_all(self._inbox.closed or why)
        asked = [each.future for each in self._time.pending()]
        for future in (*in_hand, *asked, *self._forwards.futures(), *self._backwards.futures()):
            if not future.done():
                future.set_exception(self._inbox.closed or why)

    def _submit(self, priority: int, work: Callable[[], Any]) -> "Future[Any]":
        future: Future[Any] = Future()
        self._inbox.put(priority, future, lambda: _resolve(future, work))
        return future

    def _ask(
        self, priority: int, worker: Worker, kind: Kind, run: "Callable[[Future[Any]], None]"
    ) -> "Future[Any]":
        """Submit what is to run when it is the client's turn, and to see to the future then."""
        future: Future[Any] = Future()
        asked = Asked(
            client=worker.client,
            session=worker.session,
            kind=kind,
            future=future,
            run=lambda: run(future),
        )
        self._inbox.put(priority, future, lambda: self._time.ask(asked))
        return future

    def _on_thread(self, work: Callable[[], Any]) -> Any:
        return self._submit(_FIRST, work).result() if self._thread.is_alive() else work()

    def _shut_down(self) -> None:
        self._inbox.close(Draining("the trunk is shutting down; no new work is taken"))

    def _expect(
        self, clients: Collection[str], at_once: int, close_after: int, until: float
    ) -> None:
        self._time.expect(clients, close_after=close_after, until=until)
        event = aggregator.Expected(clients=frozenset(clients), at_once=at_once)
        self._training.tell_all(event, self.now)

    def _join(self, worker: Worker) -> int:
        for withdrawn in self._time.join(worker.client):
            withdrawn.future.set_result(None)
        return self._training.join(worker.client, self.now)

    def _leave(self, worker: Worker, left: Asked, replaced: bool) -> None:
        self._training.forget(worker.session)
        self._generation.forget(worker.session)
        taken = self._backwards.withdraw(worker.session)
        for backward in taken:
            self._training.leave_out(backward.call)
        futures = [each.future for each in self._time.withdraw(worker.session)]
        futures += [each.future for each in self._forwards.withdraw(worker.session)]
        futures += [each.future for each in taken]
        for future in futures:
            future.set_exception(SessionLost(f"session {worker.session} was closed"))
        if worker.training and not replaced:
            self._time.ask(left)
        else:
            left.future.set_result(None)

    def _leaving(self, client: str, session: str = "") -> Asked:
        future: Future[None] = Future()
        return Asked(
            client=client,
            session=session,
            kind=Kind.LEAVE,
            future=future,
            run=lambda: _resolve(future, lambda: self._training.leave(client, self.now)),
        )


def _attempt(work: Callable[[], R], *futures: "Future[Any]") -> R | None:
    """Run work; if it fails, that is the outcome for all who wait."""
    try:
        return work()
    except Exception as failure:
        for future in futures:
            future.set_exception(failure)
        return None


def _resolve(future: "Future[Any]", work: Callable[[], Any]) -> None:
    """Run work and hand its outcome, whatever it is, to who waits for it."""
    result = _attempt(work, future)
    if not future.done():
        future.set_result(result)


def _resolve_all(work: Callable[[list[C]], list[R]], calls: Sequence[Waiting[C, R]]) -> None:
    """Run work for all of several calls, and hand each one's outcome to who waits for it."""
    waiting = [each.future for each in calls]
    results = _attempt(lambda: work([each.call for each in calls]), *waiting)
    if results is not None:
        for future, result in zip(waiting, results, strict=True):
            future.set_result(result)
