"""The service of a follower: one of several servers of a run, which does not step by itself.

A follower computes the forwards and backwards of its clients. What a client contributes goes to the
leader (`fedsplit.trunk.leader`), and the parameters of each version come from there. A session has
the same name and client at both, so that a client whose follower is gone can learn at any other
server whether its step was accepted.
"""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import replace

from torch import Tensor

from fedsplit.errors import ConnectionLost, FedsplitError, SessionLost
from fedsplit.link import Link
from fedsplit.model.stage import TrunkPart
from fedsplit.spec import RunSpec
from fedsplit.trunk.call import Call, Kind
from fedsplit.trunk.callers import require_own
from fedsplit.trunk.follower_training import FollowerTraining
from fedsplit.trunk.leader import POLL_S
from fedsplit.trunk.norm_guard import GuardCounts
from fedsplit.trunk.registry import VouchedClients
from fedsplit.trunk.service import TrunkService
from fedsplit.trunk.sessions import Session
from fedsplit.trunk.turns import Channel, Order
from fedsplit.wire import messages as m
from fedsplit.wire import server_messages as s

_RETRY_S = 0.2
_SENDERS = 8
"""The contributions that may be on their way to the leader at a time."""


class FollowerService(TrunkService):
    """A trunk service that follows a leader; see `TrunkService`.

    Entering its context waits until the leader's parameters have arrived.

    Args:
        trunk: The trunk part; what it trains is replaced by the leader's parameters.
        run: The run, which must be the leader's.
        connect: Makes a link to the leader, with the token of the run's servers.
        token: This token.
        name: The follower's name.
        served_model_name: The trunk's name at the leader; empty for its first one.
        clock: Seconds that do not run backwards.
        channel: As in `TrunkEngine`; the leader's ranks are others, and may be more or fewer.

    Raises:
        FedsplitError: The leader refuses, or cannot be reached for good.
    """

    def __init__(
        self,
        trunk: TrunkPart,
        run: RunSpec,
        connect: Callable[[], Link],
        token: str,
        *,
        name: str,
        served_model_name: str = "",
        clock: Callable[[], float] = time.monotonic,
        channel: Channel | None = None,
    ) -> None:
        clients = VouchedClients(token)
        super().__init__(
            trunk, run, clock, training=FollowerTraining, clients=clients, channel=channel
        )
        self.name = name
        self._served_model_name = served_model_name
        # One for each direction: a request for parameters waits at the leader.
        self._up, self._down = connect(), connect()
        self._senders = ThreadPoolExecutor(_SENDERS, "fedsplit-contribute")
        self._arrived = threading.Condition()
        self._version = -1
        self._stopping = threading.Event()
        self._gone: FedsplitError | None = None
        self._reported = GuardCounts()
        self._report_lock = threading.Lock()
        self._follows = threading.Thread(
            target=copy_context().run, args=(self._follow,), name="fedsplit-follow", daemon=True
        )

    def lose(self, reason: FedsplitError) -> None:
        """End because of a lost rank; clients go on at another server, as if this one were gone."""
        self.engine.lose(ConnectionLost(str(reason)))

    def __enter__(self) -> "FollowerService":
        self.server_instance_id = ""
        super().__enter__()
        try:
            self._take(self._asked())
        except FedsplitError:
            self.__exit__()
            raise
        self._follows.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._senders.shutdown(wait=False, cancel_futures=True)
        self._up.close()
        self._down.close()
        super().__exit__()
        if self._follows.is_alive():
            self._follows.join()

    # --- requests -----------------------------------------------------------------------------

    def _open(
        self, request: m.OpenRequest, client: str, *, of_follower: bool = False, name: str = ""
    ) -> m.OpenReply:
        # Before the leader is asked, which believes a follower whose client it is.
        require_own(request, client)
        # Generation takes nothing from the leader, which needs no cache for it.
        if request.generating:
            return super()._open(request, client)
        reply = self._up.exchange(replace(request, served_model_name=self._served_model_name))
        try:
            self._await(reply.server_instance_id, reply.version)
            own = super()._open(request, client, name=reply.session)
            # The leader now knows on which connection the session lives.
            self._report(reply.session, 0)
        except FedsplitError:
            self._end_at_leader(reply.session)
            raise
        return replace(
            own,
            server_instance_id=reply.server_instance_id,
            version=reply.version,
            save_every=reply.save_every,
            kept_version=reply.kept_version,
        )

    def _await(self, instance: str, version: int) -> None:
        """Wait until the parameters of a version of the leader have arrived.

        Raises:
            SessionLost: They do not come.
        """
        with self._arrived:
            if not self._arrived.wait_for(
                lambda: self.server_instance_id == instance and self._version >= version,
                timeout=self._run.wire.call_deadline_s,
            ):
                raise SessionLost(
                    f"this server has version {self._version} of the trunk, and not version "
                    f"{version} of its leader; open another session"
                )

    def handle(self, request: m.Request[m.R], token: str) -> m.R:
        """Answer one request; see `fedsplit.link.Service`."""
        try:
            return super().handle(request, token)
        except SessionLost:
            # A client that comes from another server, which may have sent its step before.
            if not isinstance(request, m.StepRequest) or request.session in self._sessions:
                raise
            return self._up.exchange(request)  # type: ignore[return-value]

    def _step(self, session: Session, request: m.StepRequest) -> m.StepReply:
        future: Future[m.StepReply] = session.once(Kind.STEP, request, self._contribute)
        return self._wait(future)

    def _contribute(self, call: Call) -> "Future[m.StepReply]":
        return self._senders.submit(self._contributed, call)

    def _contributed(self, call: Call) -> m.StepReply:
        """Send the leader what a session has accumulated; return the leader's reply."""
        taken = self._wait(self.engine.run(Order("take", (call.client, call.session))))
        try:
            reply = self._to_leader(_contribution(call, *taken))
        except FedsplitError:
            self.engine.run(Order("refused", (call.client,)))
            raise
        self.engine.run(Order("accepted", (call.client, reply.version)))
        return reply

    def _close(self, session: Session, request: m.CloseRequest) -> m.CloseReply:
        if not session.info.generating:
            # Before the leader's reply, by which it must know the client's work.
            self._report(session.info.name, self.engine.work.take(session.info.client).positions)
            with suppress(SessionLost):
                self._to_leader(request)
        return super()._close(session, request)

    def _training_state(
        self, session: Session, request: m.TrainingStateRequest
    ) -> m.TrainingStateReply:
        if session.info.generating:
            return super()._training_state(session, request)
        return self._to_leader(request)

    def expire_sessions(self) -> None:
        """Drop the sessions that have expired, and end them at the leader.

        Raises:
            FedsplitError: The leader is gone for good, which ends the engine.
        """
        if self._gone:
            raise self._gone
        for session in self._sessions.expired():
            self._end(session)
            if not session.info.generating:
                self._senders.submit(self._end_at_leader, session.info.name)

    def _end_at_leader(self, session: str) -> None:
        with suppress(FedsplitError):  # the leader ends the sessions of a lost connection itself
            self._up.exchange(m.CloseRequest(session=session))

    def _report(self, session: str, positions: int) -> None:
        """Report what a client has done here, and what the guard did since the last report."""
        with self._report_lock:
            counts, before = self.engine.guard_counts, self._reported
            self._reported = counts
        new = counts - before
        request = s.WorkReportRequest(
            session=session,
            positions=positions,
            clipped=new.clipped,
            refused=new.refused,
            quarantines=new.quarantines,
        )
        with suppress(SessionLost):
            self._to_leader(request)

    def _to_leader(self, request: m.Request[m.R]) -> m.R:
        """Send a request to the leader, and repeat it while the leader cannot be reached.

        Raises:
            SessionLost: The leader cannot be reached for long.
            FedsplitError: The leader's error.
        """
        until = time.monotonic() + self._run.wire.call_deadline_s
        while True:
            try:
                return self._up.exchange(request)
            except FedsplitError as error:
                if not error.retryable:
                    raise
                if time.monotonic() > until or self._stopping.wait(error.retry_after_s or _RETRY_S):
                    raise SessionLost(
                        f"the leader of this server cannot be reached ({error}); open another "
                        "session"
                    ) from error

    # --- the leader's parameters --------------------------------------------------------------

    def _follow(self) -> None:
        """Take over the parameters of each version, until the leader is gone for good."""
        while not self._stopping.is_set():
            try:
                self._take(self._asked())
            except FedsplitError as error:
                if self._stopping.is_set():
                    return
                if not error.retryable:
                    self._gone = error
                    return
                self._stopping.wait(_RETRY_S)

    def _asked(self) -> s.ParametersReply:
        return self._down.exchange(
            s.ParametersRequest(
                follower=self.name,
                server_instance_id=self.server_instance_id,
                version=max(0, self._version),
                wait_s=min(POLL_S, self._run.wire.call_deadline_s / 2),
                served_model_name=self._served_model_name,
            )
        )

    def _take(self, reply: s.ParametersReply) -> None:
        """Take over a reply of the leader."""
        is_new = reply.server_instance_id != self.server_instance_id
        if is_new:
            # Of a leader that was started again: its sessions are gone, and its versions others.
            for name in self._sessions.names():
                with suppress(SessionLost):
                    self._end(self._sessions.of(name, self._sessions.client_of(name)))
        if reply.names:
            values = dict(zip(reply.names, reply.parameters, strict=True))
            follow = Order("follow", (reply.version, reply.barrier_version, is_new), values)
            # After the ends of the sessions, whose graphs may be of a version of this number.
            self._wait(self.engine.run(follow, late=is_new))
        with self._arrived:
            self.server_instance_id, self._version = reply.server_instance_id, reply.version
            self._arrived.notify_all()


def _contribution(
    call: Call, num_positions: int, barrier_version: int, gradients: Mapping[str, Tensor]
) -> s.ContributeRequest:
    step = call.request
    return s.ContributeRequest(
        session=call.session,
        call=step.call,
        step=step.step,
        num_tokens=step.num_tokens,
        client_sq_norm=step.client_sq_norm,
        loss_scale=step.loss_scale,
        num_positions=num_positions,
        barrier_version=barrier_version,
        names=tuple(gradients),
        gradients=tuple(gradients.values()),
    )
