"""The engine: the thread that owns a trunk, schedules and runs calls, and steps the optimizer.

All state below it (parameters, stash, accumulated gradients, barrier, KV caches) belongs to this
thread, so this state needs no lock. Transport threads submit calls and wait for their futures.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from contextlib import suppress
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedsplit.errors import Draining, FedsplitError, Internal, SessionLost
from fedsplit.model.stage import TrunkPart
from fedsplit.spec import RunSpec
from fedsplit.telemetry.context import working_on
from fedsplit.trunk import aggregator
from fedsplit.trunk.call import Call, Kind
from fedsplit.trunk.generation import Generation
from fedsplit.trunk.meter import Meter
from fedsplit.trunk.readings import EngineReadings
from fedsplit.trunk.sessions import AcceptedStep
from fedsplit.trunk.training import Training
from fedsplit.trunk.turns import Channel, Order, ReplayingScheduler, scheduler_for
from fedsplit.trunk.update import TrunkUpdate
from fedsplit.trunk.virtual_time import VirtualTimeScheduler
from fedsplit.trunk.work_counts import WorkCounts

log = logging.getLogger(__name__)

_TIME = "time"
# Sessions and graphs expire in the engine's loop, so it must not wait longer for calls.
_IDLE_S = 1.0
_COMPUTED = (Kind.FORWARD, Kind.BACKWARD, Kind.STEP, Kind.EVALUATE)


class TrunkEngine(EngineReadings):
    """Runs the calls of a trunk and steps its parameters by the policy.

    Args:
        trunk: The trunk part, on its device; the engine owns it from now on. The parameters that
            require a gradient train.
        run: The run's optimizer, policy, budgets and seed.
        clock: Seconds that do not run backwards.
        update: Makes a step of the trunk from the clients' gradients.
        on_turn: Called by the engine's thread in every turn of its loop, at least once a second.
        training: The class of `training`.
        channel: To the other ranks of a trunk that is cut over several; none for a whole trunk.

    Attributes:
        training: Parameters, graphs and contributions; for the engine's thread alone.
        submit: Queues a call and returns its future; raises the reason if the engine has ended.
        ended: Has a result after the engine was stopped, or the exception that it failed with.
        work: Counts the work of each client; any thread may take a count.
        at_rest: Called by the engine's thread after each turn that leaves no contribution waiting
            for its step, so that `state` is that of a whole step. Set it before `start`.
        on_step: Called by the engine's thread after each step. Set it before `start`.
        last_steps: The last step that was accepted of each client, by which it is known again.
        meter: Reports what the engine does.
    """

    def __init__(
        self,
        trunk: TrunkPart,
        run: RunSpec,
        clock: Callable[[], float] = time.monotonic,
        *,
        update: type[TrunkUpdate] = TrunkUpdate,
        on_turn: Callable[[], None] = lambda: None,
        training: type[Training] = Training,
        channel: Channel | None = None,
    ) -> None:
        self._scheduler = scheduler_for(run, clock, lambda c: self.training.is_excluded(c), channel)
        self.training = training(trunk, run, self._scheduler.turn_time, update)
        self.ended: Future[None] = Future()
        self.meter = Meter(clock)
        self._clock = clock
        self._run = run
        self.work = WorkCounts()
        self._generation = Generation(
            trunk, run.generation, self._scheduler.turn_time, lambda: self._scheduler.pass_s
        )
        self.submit = self._scheduler.submit
        self._on_turn = on_turn
        self.at_rest: Callable[[], None] = lambda: None
        self.on_step: Callable[[], None] = lambda: None
        self.last_steps: dict[str, AcceptedStep] = {}
        self._is_draining = False
        self._in_hand: list[Call] = []
        # With the context of its maker, so that its log lines have the run.
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._loop,), name="trunk-engine", daemon=True
        )

        self._prepare = {
            Kind.FORWARD: self.training.prepare_forward,
            Kind.BACKWARD: self.training.prepare_backward,
        }
        self._orders: dict[str, Callable[..., Any]] = {
            "open": self._generation.open,
            "join": self._join,
            "expect": self._expect,
            "forget": self._forget_client,
            "scale_lr": partial(setattr, self.training, "lr_scale"),
            "parameters": self.training.shared.parameters,
        }
        for name in self.training.orders:
            self._orders[name] = getattr(self.training, name)

    # --- called from any thread ---------------------------------------------------------------

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def replay(self) -> bool:
        """Run what rank 0 sends, in this thread; return whether a new engine replaces this one."""
        scheduler = self._scheduler
        assert isinstance(scheduler, ReplayingScheduler), "rank 0 has clients of its own"
        scheduler.run_order = self._done
        self._loop()
        self.ended.result()
        return scheduler.is_renewed

    def drain(self) -> "Future[None]":
        """Have the thread end as soon as no contribution waits for its step; return `ended`."""
        with suppress(FedsplitError):  # the engine may have failed before, and takes no calls
            self.run(partial(setattr, self, "_is_draining", True))
        return self.ended

    def lose(self, reason: FedsplitError) -> None:
        """Take no more calls and be ended by a reason, while the thread may wait for a rank."""
        self._scheduler.close(reason)
        if not self.ended.done():
            self.ended.set_exception(reason)

    def stop(self) -> None:
        """Finish the running call, refuse the waiting ones, and end the thread."""
        with suppress(FedsplitError):  # the engine may have failed before, and takes no calls
            self.run(self._close, late=True)
        if self._thread.is_alive():
            self._thread.join()

    def run(self, work: Callable[[], Any] | Order, *, late: bool = False) -> "Future[Any]":
        """Run `work` on the engine's thread; `late`: after the forwards that are queued now.

        A function may change the queue of calls alone; a change of any other state is an order.
        """
        kind = Kind.LATE_CONTROL if late else Kind.CONTROL
        return self.submit(Call(kind=kind, request=work))

    def expect(
        self, clients: Collection[str], *, at_once: int, close_after: int, until: float
    ) -> "Future[None]":
        """Make barriers await these clients, and let virtual time advance; see `TrunkService`."""
        arguments = sorted(clients), at_once, close_after, until
        return self.run(Order("expect", arguments))

    def open_cache(self, client: str, session: str, cache_tokens: int) -> "Future[None]":
        """Open a KV cache for a session; 0 `cache_tokens` let it grow."""
        return self.run(Order("open", (client, session, cache_tokens)))

    def join(self, client: str) -> "Future[int]":
        """Add a training session's client to its barrier; the current version."""
        return self.run(Order("join", (client,)), late=True)

    def forget_client(self, client: str) -> "Future[None]":
        """Forget a client that has no session, and drop its replica."""
        return self.run(Order("forget", (client,)))

    def average(self, weights: Mapping[str, float]) -> "Future[None]":
        """Set all replicas to a mean; see `TrunkService.average`."""
        return self.run(Order("average", (dict(weights),)))

    def gradients(self, session: str) -> "Future[dict[str, Tensor]]":
        """Return the gradients of a session since its last step, by parameter name."""
        return self.run(Order("gradients", (session,)))

    def scale_lr(self, factor: float) -> None:
        """Set the factor on the learning rate of the steps to come."""
        self.now_do(Order("scale_lr", (factor,)))

    def now_do(self, order: Order) -> Any:
        """Run an order, and return its result; before the thread starts and after its end, too."""
        is_own = threading.current_thread() is self._thread
        if not is_own and self._thread.is_alive():
            return self.run(order).result()
        # No other thread uses the state meanwhile.
        self._scheduler.announce(order)
        return self._done(order)

    def release(self, client: str) -> "Future[None]":
        """Have a client leave when it is its turn; the future does not wait for that."""
        # Virtual time can stand still until other clients are released as well.
        leave = Call(kind=Kind.LEAVE, client=client)
        return self.run(lambda: self._scheduler.admit(leave), late=True)

    def pause(self) -> "Future[None]":
        """Stop virtual time."""
        return self.run(self._scheduler.pause)

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the state of training, by name; no client may be at work."""
        state: dict[str, Tensor] = self.now_do(Order("state"))
        # A monotonic clock has another origin in the process that resumes, so 0 is saved.
        now = self.now if isinstance(self._scheduler, VirtualTimeScheduler) else 0.0
        return state | {_TIME: torch.tensor(now, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state that `state` returned.

        Raises:
            CheckpointError: It is not the state of such a trunk, or a client is at work.
        """
        self.now_do(Order("load_state", state=state))
        if isinstance(self._scheduler, VirtualTimeScheduler):
            self._scheduler.now = state[_TIME].item()

    # --- the engine's thread ------------------------------------------------------------------

    def step(self) -> None:
        """One turn of the loop: schedule, run, reply, update."""
        patience_s = min(_IDLE_S, self._generation.due_in())
        self._in_hand = self._scheduler.next_batch(self.training.barrier, patience_s)
        self.training.drop_expired()
        self._on_turn()
        if self._in_hand:
            first = self._in_hand[0]
            with working_on(**first.fields), first.span.active():
                self._answer(self._in_hand)
        # After the reply, so that the client that completed the barrier does not wait for the step.
        for step in self.training.step_if_due():
            self._scheduler.stepped(step)
            self.meter.stepped(replace(step, version=self.version))
            self.on_step()
        if not self.training.barrier.contributions:
            self.at_rest()
            if self._is_draining:
                self._close()
                return
        # Calls in the queue first: backwards are more urgent, and requests can join this pass.
        if not self._generation.due_in() and not self._scheduler.has_arrivals(
            Kind.GENERATE.priority
        ):
            self._run_pass()

    def _loop(self) -> None:
        try:
            while not self._scheduler.closed:
                self.step()
        # A thread that ended silently would leave all clients waiting and health at SERVING.
        except Exception as failure:
            self._scheduler.failed(failure)
            log.exception("the trunk failed at version %d and serves nothing more", self.version)
            self._scheduler.close(
                Internal(
                    f"the trunk failed at version {self.version} ({type(failure).__name__}) and "
                    "serves nothing more; the server's log has the details; start it again from "
                    "its last checkpoint"
                )
            )
            self._end()
            self.ended.set_exception(failure)
        else:
            self._end()
            self.ended.set_result(None)

    def _close(self) -> None:
        self._scheduler.close(Draining("the trunk is shutting down; no new work is taken"))

    def _end(self) -> None:
        reason = self._scheduler.closed
        assert reason
        self._generation.refuse_all(reason)
        # The turn may have failed before it answered these.
        for call in self._in_hand:
            if not call.future.done():
                call.future.set_exception(reason)

    def _answer(self, calls: list[Call]) -> None:
        """Run calls and set their futures; an exception fails these calls and no others."""
        began = self._clock()
        try:
            if not calls[0].prepared and (prepare := self._prepare.get(calls[0].kind)):
                size = prepare(calls[0])
                if size > 1:
                    calls = self._scheduler.gather(calls[0], size)
            replies = self._replies(calls) if calls else []
            ended = self._clock()
        except Exception as failure:
            self._scheduler.failed(failure)
            for call in calls:
                self.meter.failed(call, failure)
                call.future.set_exception(failure)
            return
        # Not strict: calls whose replies come later return none here.
        for call, reply in zip(calls, replies, strict=False):
            # Before the reply, so that a client that has all its replies is counted in full.
            if call.kind is Kind.STEP:
                self.work.stepped(call.client, call.request.num_tokens)
                self.last_steps[call.client] = AcceptedStep(
                    session=call.session, call=call.request.call, version=reply.version
                )
                self.meter.contributed(call.client, call.work.staleness)
            elif call.kind in (Kind.FORWARD, Kind.EVALUATE):
                self.work.passed(call.client, call.request.smashed_BTD.shape[:2].numel())
            call.future.set_result(reply)
        if self.meter.telemetry and replies and calls[0].kind in _COMPUTED:
            ran = len(calls), sum(call.positions for call in calls)
            self.meter.passed(calls[0].kind, calls, ran, began, ended)

    def _replies(self, calls: list[Call]) -> list[Any]:
        """Run calls of one kind; return their replies, or none if replies come later."""
        call = calls[0]
        match call.kind:
            case Kind.FORWARD:
                return list(self.training.forward(calls))
            case Kind.BACKWARD:
                return list(self.training.backward(calls))
            case Kind.STEP:
                return [self.training.contribute(call, self.now)]
            case Kind.EVALUATE:
                return [self.training.evaluate(call)]
            case Kind.CONTROL | Kind.LATE_CONTROL:
                return [self._done(call.request)]
            case Kind.LEAVE:
                self.training.leave(call.client, self.now)
                return [None]
            case Kind.GENERATE:
                self._generation.add(call)
            case Kind.CLOSE:
                self._close_session(call)
            case Kind.TICK:
                self.training.notify(aggregator.Ticked(), self.now)
        return []

    def _run_pass(self) -> None:
        began, generation = self._clock(), self._generation
        try:
            self.training.with_current(generation.run_pass)
        except Exception as failure:
            self._scheduler.failed(failure)
            log.exception("a pass of generation failed; its caches are dropped")
            generation.fail_pass(failure)
            return
        ended = self._clock()
        self._scheduler.pass_s = ended - began
        if self.meter.telemetry:
            size = generation.last_pass
            self.meter.passed(Kind.GENERATE, generation.begun, size, began, ended)

    def _join(self, client: str) -> int:
        # The client is back before its LEAVE ran, so it has not left.
        for withdrawn in self._scheduler.join(client):
            withdrawn.future.set_result(None)
        if not self.training.num_present:
            self.meter.began()
        return self.training.join(client, self.now)

    def _expect(
        self, clients: Collection[str], at_once: int, close_after: int, until: float
    ) -> None:
        self._scheduler.expect(clients, close_after=close_after, until=until)
        event = aggregator.Expected(clients=frozenset(clients), at_once=at_once)
        self.training.notify(event, self.now)

    def _forget_client(self, client: str) -> None:
        self.meter.forget(client)
        self.training.forget_client(client)

    def _close_session(self, call: Call) -> None:
        """Drop the state of a session; the LEAVE of its client runs at its time."""
        self.training.forget(call.session)
        self._generation.forget(call.session)
        withdrawn = self._scheduler.withdraw(call.session)
        self.training.release(withdrawn)
        for each in withdrawn:
            each.future.set_exception(SessionLost(f"session {call.session} was closed"))
        if call.client:
            self._scheduler.admit(Call(kind=Kind.LEAVE, client=call.client, future=call.future))
        else:
            call.future.set_result(None)

    def _done(self, work: Callable[[], Any] | Order) -> Any:
        if not isinstance(work, Order):
            return work()
        state = () if work.state is None else (work.state,)
        return self._orders[work.name](*work.arguments, *state)
