"""The trunk as a service: who may ask what, in which order, and everything exactly once.

A request is named by (session, call, kind). A repeated request gets the first one's reply, also
while that one is still being worked on; a forward runs again only when its graph is gone, and
a step is known to have been taken even when its session is gone.
"""

import math
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from typing import Any, TypeVar

from torch import Tensor

from fedsplit.errors import (
    ActivationExpired,
    BadTensor,
    DeadlineExceeded,
    FedsplitError,
    Forbidden,
    ModelMismatch,
    ProtocolError,
    ProtocolVersion,
    SessionLost,
    TooLarge,
)
from fedsplit.model.acceleration import precision_of
from fedsplit.model.checkpoint import model_fingerprint
from fedsplit.model.hollow import TrunkPart
from fedsplit.optimization import block_norms
from fedsplit.spec import RunSpec
from fedsplit.trunk.admission import Admission
from fedsplit.trunk.calls import Worker
from fedsplit.trunk.engine import TrunkEngine
from fedsplit.trunk.histories import Histories
from fedsplit.trunk.sessions import Session, Steps, no_session
from fedsplit.wire import messages as m
from fedsplit.wire.codec import check_request
from fedsplit.wire.session import Event

T = TypeVar("T")


class TrunkService:
    """Answers the requests of clients; implements `fedsplit.link.Service`.

    Args:
        trunk: The trunk part, on its device; the parameters that require a gradient train.
        run: The run it serves.
        clock: Seconds that do not run backwards.
        replicas: Whether every client trains a copy of the trunk of its own (SplitFed V1).
    """

    def __init__(
        self,
        trunk: TrunkPart,
        run: RunSpec,
        clock: Callable[[], float] = time.monotonic,
        *,
        replicas: bool = False,
    ) -> None:
        self.engine = TrunkEngine(trunk, run, clock, replicas=replicas)
        self.incarnation = secrets.token_hex(8)
        self.limits = m.Limits(
            max_rows=run.train.batch_size,
            max_tokens=run.data.sequence_length,
            hidden_size=trunk.config.hidden_size,
            session_tokens=run.generation.session_tokens,
            stateless_bytes=run.generation.stateless_bytes,
        )
        self._run = run
        self._model = model_fingerprint(trunk.config, run.split)
        self._family = str(trunk.config.model_type)
        self._dtype = trunk.dtype
        self._autocast = precision_of(run.model, trunk.device)
        self._round = 0
        self._admission = Admission()
        self.histories = Histories(run.wire.history_bytes)
        self._sessions: dict[str, Session] = {}
        self._last_steps: dict[str, Steps] = {}
        self._closing = False
        self._lock = threading.Lock()
        self._answers: dict[type, Callable[[Any, Any], Any]] = {
            m.ForwardRequest: self._forward,
            m.BackwardRequest: self._backward,
            m.StepRequest: self._step,
            m.GenerateRequest: self._generate,
            m.CloseRequest: self._close,
            m.GradientsRequest: self._gradients,
            m.TrainingStateRequest: self._training_state,
        }

    # --- the server's side --------------------------------------------------------------------

    def __enter__(self) -> "TrunkService":
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closing = True
            for session in self._sessions.values():
                session.cancel_farewell()
        self.engine.stop()

    def admit(self, client: str) -> str:
        """The token that opens sessions for `client`, and for nobody else."""
        return self._admission.admit(client)

    def dismiss(self, client: str) -> bool:
        """Forget a client that has no session; whether it is forgotten."""
        with self._lock:
            if any(each.worker.client == client for each in self._sessions.values()):
                return False
            self._admission.dismiss(client)
            self._last_steps.pop(client, None)
            self.histories.dismiss(client)
        self.engine.dismiss(client)
        return True

    def expect(
        self,
        clients: Sequence[str],
        *,
        round: int,
        at_once: int,
        close_after: int,
        until: float = math.inf,
    ) -> None:
        """Count on clients that are about to be sent training work of a round.

        On a virtual clock (`policy.sim_slowdown`) nothing moves but between this and one of the
        ends named below, so call it before the work is sent, and `release` a client before it is
        expected again. To go on after an end without new work, expect nobody.

        Args:
            clients: Their names. The trunk's next steps await them as the policy says.
            round: The round's number.
            at_once: How many of them work at a time.
            close_after: Virtual time stands still once so many of the clients that were expected
                since the last `close` have left since this call. Whose work ends without a
                session has left when it is released.
            until: Virtual time does not pass this.
        """
        self._round = round
        self._wait(
            self.engine.expect(clients, at_once=at_once, close_after=close_after, until=until)
        )

    def close(self) -> None:
        """End a round: virtual time stands still until somebody is expected again."""
        self._wait(self.engine.close())

    def release(self, client: str) -> None:
        """Wait no longer for a client: its work is over, or it is gone."""
        self._wait(self.engine.release(client))

    def now(self) -> float:
        """Seconds of the clock that policies go by: virtual with `policy.sim_slowdown`."""
        return self.engine.now

    def average(self, weights: Mapping[str, float]) -> None:
        """Give every replica of the trunk the mean of these clients' replicas.

        Thapa, Arachchige, Camtepe and Sun 2022, "SplitFed: When Federated Learning Meets Split
        Learning", AAAI 36(8), arXiv 2004.12088, algorithm 1. Moments stay each client's own, and
        a client that joins later begins with the mean.

        Args:
            weights: By client; they sum to one.

        Raises:
            ConfigError: There are no replicas, or the weights do not sum to one.
        """
        self._wait(self.engine.average(weights))

    @property
    def num_sessions(self) -> int:
        """Sessions that are open now."""
        return len(self._sessions)

    # --- fedsplit.link.Service ----------------------------------------------------------------

    def check_token(self, token: str) -> None:
        """Let only clients of the run in; see `fedsplit.link.Service`."""
        self._admission.client_of(token)

    def handle(self, request: m.Request[m.R], token: str) -> m.R:
        """Answer one request; see `fedsplit.link.Service`."""
        check_request(request, self.limits)
        if isinstance(request, m.ServiceInfoRequest):
            return self._info()  # type: ignore[return-value]
        client = self._admission.client_of(token)
        if isinstance(request, m.OpenRequest):
            return self._open(request, client)  # type: ignore[return-value]
        if isinstance(request, m.StepRequest) and (step := self._last_step(request, client)):
            return self._wait(step)  # type: ignore[return-value]
        session = self._session(request.session, client)  # type: ignore[attr-defined]
        reply: m.R = self._answers[type(request)](session, request)
        return reply

    def disconnected(self, session: str) -> None:
        """Give a broken connection's client `policy.deadline_s` to come back to its session."""
        with self._lock:
            found = self._sessions.get(session)
            if found and not found.farewell:
                self._await_word(found, self._run.policy.deadline_s)

    # --- one method a request -----------------------------------------------------------------

    def _open(self, request: m.OpenRequest, client: str) -> m.OpenReply:
        if request.protocol != m.PROTOCOL:
            raise ProtocolVersion(
                f"the client speaks protocol {request.protocol}, the trunk {m.PROTOCOL}; install "
                "the same version of fedsplit at both sides"
            )
        if request.client != client:
            raise Forbidden(f"the token belongs to {client!r}, not to {request.client!r}")
        self._check_same("hidden size", request.hidden_size, self.limits.hidden_size)
        self._check_same("model and cut (fingerprint)", request.model, self._model)
        if not request.generating:
            fingerprint = self._run.fingerprint
            self._check_same("run configuration (fingerprint)", request.config, fingerprint)
        if request.cache_tokens > self.limits.session_tokens:
            raise TooLarge(
                f"a cache of {request.cache_tokens} tokens was asked for; a session of this trunk "
                f"holds at most {self.limits.session_tokens} (generation.session_tokens)"
            )
        worker = Worker(
            client=client,
            session=secrets.token_hex(16),
            round=request.round,
            training=request.training and not request.generating,
            generating=request.generating,
            cache_tokens=request.cache_tokens,
        )
        with self._lock:
            same = [each for each in self._sessions.values() if each.is_of(worker)]
            opened = Session(worker=worker, at_once=self._run.train.micro_batches)
            self._sessions[worker.session] = opened
            self._await_word(opened, self._run.wire.stash_ttl_s)
        for old in same:
            self._drop(old, replaced=True)
        if worker.generating:
            self._wait(self.engine.open_cache(worker))
        version = self._wait(self.engine.join(worker)) if worker.training else self.engine.version
        return m.OpenReply(
            session=worker.session,
            incarnation=self.incarnation,
            version=version,
            limits=self.limits,
            autocast=self._autocast,
        )

    def _forward(self, session: Session, request: m.ForwardRequest) -> m.ForwardReply:
        self._check_dtype("smashed_BTD", request.smashed_BTD)
        if request.training and not session.worker.training:
            raise ProtocolError("a training forward in a session that was not opened for training")
        if not request.training:
            return self._wait(self.engine.forward(session.worker, request))
        forward = self.histories.of(session.worker.client, request)
        future = session.once(
            request, Event.FORWARD, lambda worker, _: self.engine.forward(worker, forward.whole)
        )
        return forward.answer(self._wait(future))

    def _backward(self, session: Session, request: m.BackwardRequest) -> m.BackwardReply:
        self._check_dtype("grad_trunk_out_BTD", request.grad_trunk_out_BTD)
        future = session.once(request, Event.BACKWARD, self.engine.backward)
        session.forget(m.ForwardRequest, request.call)
        try:
            return self._wait(future)
        except ActivationExpired:
            session.take_back(m.BackwardRequest, request.call, future)
            raise

    def _step(self, session: Session, request: m.StepRequest) -> m.StepReply:
        return self._wait(session.once(request, Event.STEP, self.engine.step))

    def _generate(self, session: Session, request: m.GenerateRequest) -> m.GenerateReply:
        self._check_dtype("smashed_BTD", request.smashed_BTD)
        for entry in request.entries:
            self._check_dtype("keys_BHTE", entry.keys_BHTE)
            self._check_dtype("values_BHTE", entry.values_BHTE)
        if not session.worker.generating:
            raise ProtocolError("a session that was not opened to generate; open another one")
        try:
            return self._wait(session.once(request, Event.GENERATE, self.engine.generate))
        except SessionLost:  # its cache is gone, and so is what it was for
            self._drop(session)
            raise

    def _close(self, session: Session, request: m.CloseRequest) -> m.CloseReply:
        self._drop(session)
        return m.CloseReply()

    def _gradients(self, session: Session, request: m.GradientsRequest) -> m.GradientsReply:
        found = self._wait(self.engine.gradients(session.worker))
        return m.GradientsReply(
            norms=block_norms(found),
            names=tuple(found) if request.tensors else (),
            gradients=tuple(found.values()) if request.tensors else (),
        )

    def _training_state(
        self, session: Session, request: m.TrainingStateRequest
    ) -> m.TrainingStateReply:
        return m.TrainingStateReply(
            round=self._round,
            step=self.engine.steps,
            lr=self._run.train.lr_at(self.engine.steps),
            version=self.engine.version,
        )

    def _info(self) -> m.ServiceInfoReply:
        return m.ServiceInfoReply(
            protocol=m.PROTOCOL,
            incarnation=self.incarnation,
            model=self._model,
            family=self._family,
            blocks=str(self._run.split),
            version=self.engine.version,
            sessions=self.num_sessions,
            served=(),
            limits=self.limits,
        )

    # --- what they share ----------------------------------------------------------------------

    def _session(self, name: str, client: str) -> Session:
        with self._lock:
            session = self._sessions.get(name)
            if session is None:
                raise no_session(name)
            if session.worker.client != client:
                raise Forbidden(f"session {name} belongs to another client")
            session.cancel_farewell()
            return session

    def _last_step(self, request: m.StepRequest, client: str) -> "Future[m.StepReply] | None":
        """A step of the session that was dropped last: its reply may have been lost before."""
        return self._last_steps.get(client, {}).get((request.session, request.call))

    def _await_word(self, session: Session, seconds: float) -> None:
        """Drop a session unless its client says something in time."""
        if not self._closing:
            session.farewell = threading.Timer(seconds, self._give_up, [session])
            session.farewell.daemon = True
            session.farewell.start()

    def _give_up(self, session: Session) -> None:
        with suppress(FedsplitError):  # an engine that has ended keeps nothing anyway
            self._drop(session)

    def _wait(self, future: "Future[T]") -> T:
        bound = self._run.wire.call_deadline_s
        try:
            return future.result(timeout=bound)
        except FutureTimeout as exc:
            raise DeadlineExceeded(f"the trunk did not answer inside {bound} s") from exc

    def _drop(self, session: Session, *, replaced: bool = False) -> None:
        with session.lock:
            if session.leaving is None:
                if session.worker.training:
                    self._last_steps[session.worker.client] = session.steps()
                session.leaving = self.engine.leave(session.worker, replaced=replaced)
            elif replaced:  # who has come back need not wait for the turn to leave
                return
        try:
            self._wait(session.leaving)
        except DeadlineExceeded:  # virtual time may stand still for long
            session.leaving.add_done_callback(lambda _: self._gone(session))
            raise
        self._gone(session)

    def _gone(self, session: Session) -> None:
        with self._lock:  # only now is nothing kept for it any more
            session.cancel_farewell()
            self._sessions.pop(session.worker.session, None)

    def _check_dtype(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype != self._dtype:
            raise BadTensor(
                f"{name} is {tensor.dtype}, but this trunk computes in {self._dtype}; "
                "set model.dtype alike at both sides"
            )

    @staticmethod
    def _check_same(what: str, theirs: object, ours: object) -> None:
        if theirs != ours:
            raise ModelMismatch(
                f"{what}: the client has {theirs}, the trunk {ours}; start both from the same "
                "model, split and configuration"
            )
