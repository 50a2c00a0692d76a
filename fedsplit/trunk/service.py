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
from typing import Any, TypeVar

from fedsplit.errors import (
    ActivationExpired,
    DeadlineExceeded,
    Forbidden,
    ProtocolError,
    ProtocolVersion,
    SessionLost,
    TooLarge,
)
from fedsplit.model.acceleration import precision_of
from fedsplit.model.checkpoint import model_fingerprint
from fedsplit.model.stage import TrunkPart
from fedsplit.optimization import block_norms
from fedsplit.spec import RunSpec
from fedsplit.trunk.call import Call, Kind
from fedsplit.trunk.engine import TrunkEngine
from fedsplit.trunk.guard import require_dtype, require_same
from fedsplit.trunk.registry import ClientRegistry
from fedsplit.trunk.sessions import Session, SessionInfo, Steps, no_session
from fedsplit.trunk.update import TrunkUpdate
from fedsplit.wire import messages as m
from fedsplit.wire.delta import DeltaDecoder
from fedsplit.wire.validation import check_request

T = TypeVar("T")


class TrunkService:
    """Answers the requests of clients; implements `fedsplit.link.Service`.

    Args:
        trunk: The trunk part, on its device; the parameters that require a gradient train.
        run: The run it serves.
        clock: Seconds that do not run backwards.
        update: How a step of the trunk is made from the clients' gradients.
    """

    def __init__(
        self,
        trunk: TrunkPart,
        run: RunSpec,
        clock: Callable[[], float] = time.monotonic,
        *,
        update: type[TrunkUpdate] = TrunkUpdate,
    ) -> None:
        self.engine = TrunkEngine(trunk, run, clock, update=update, on_turn=self.expire_sessions)
        self.server_instance_id = secrets.token_hex(8)
        self.limits = m.Limits(
            max_rows=run.train.batch_size,
            max_tokens=run.data.sequence_length,
            hidden_size=trunk.config.hidden_size,
            session_tokens=run.generation.session_tokens,
            stateless_bytes=run.generation.stateless_bytes,
        )
        self._run = run
        self._clock = clock
        self._model = model_fingerprint(trunk.config, run.split)
        self._family = str(trunk.config.model_type)
        self._dtype = trunk.dtype
        self._autocast = precision_of(run.model, trunk.device)
        self._round = 0
        self._clients = ClientRegistry()
        self.decoder = DeltaDecoder(run.wire.history_bytes, max_clients=run.clients)
        self._sessions: dict[str, Session] = {}
        self._last_steps: dict[str, Steps] = {}
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
        self.engine.stop()

    def admit(self, client: str) -> str:
        """The token that opens sessions for `client`, and for nobody else."""
        return self._clients.admit(client)

    def forget(self, client: str) -> bool:
        """Forget a client that has no session, and drop its replica; whether it is forgotten."""
        with self._lock:
            if any(each.info.client == client for each in self._sessions.values()):
                return False
            self._clients.forget(client)
            self._last_steps.pop(client, None)
            self.decoder.forget(client)
        if not self.engine.ended.done():
            self.engine.run(lambda: self.engine.training.forget_client(client))
        return True

    def expire_sessions(self) -> None:
        """Drop the sessions whose clients have been silent for too long."""
        now = self._clock()
        with self._lock:
            silent = [each for each in self._sessions.values() if each.expires_at <= now]
        for session in silent:
            session.expires_at = math.inf
            self._end(session)

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
        self._wait(self.engine.pause())

    def release(self, client: str) -> None:
        """Wait no longer for a client: its work is over, or it is gone."""
        self._wait(self.engine.submit(Call(kind=Kind.LEAVE, client=client)))

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
        self._wait(self.engine.run(lambda: self.engine.training.average(weights)))

    @property
    def num_sessions(self) -> int:
        """Sessions that are open now."""
        return len(self._sessions)

    # --- fedsplit.link.Service ----------------------------------------------------------------

    @property
    def trunks(self) -> "Mapping[str, Future[None]]":
        """The one trunk, without a name; see `fedsplit.link.Service`."""
        return {"": self.engine.ended}

    def check_token(self, token: str) -> None:
        """Let only clients of the run in; see `fedsplit.link.Service`."""
        self._clients.client_of(token)

    def handle(self, request: m.Request[m.R], token: str) -> m.R:
        """Answer one request; see `fedsplit.link.Service`."""
        check_request(request, self.limits)
        if isinstance(request, m.ServiceInfoRequest):
            return self._info()  # type: ignore[return-value]
        client = self._clients.client_of(token)
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
            if (found := self._sessions.get(session)) and found.expires_at == math.inf:
                found.expires_at = self._clock() + self._run.policy.deadline_s

    # --- one method a request -----------------------------------------------------------------

    def _open(self, request: m.OpenRequest, client: str) -> m.OpenReply:
        if request.protocol != m.PROTOCOL:
            raise ProtocolVersion(
                f"the client speaks protocol {request.protocol}, the trunk {m.PROTOCOL}; install "
                "the same version of fedsplit at both sides"
            )
        if request.client != client:
            raise Forbidden(f"the token belongs to {client!r}, not to {request.client!r}")
        require_same("hidden size", request.hidden_size, self.limits.hidden_size)
        require_same("model and cut (fingerprint)", request.model, self._model)
        if not request.generating:
            fingerprint = self._run.fingerprint
            require_same("run configuration (fingerprint)", request.config, fingerprint)
        if request.cache_tokens > self.limits.session_tokens:
            raise TooLarge(
                f"a cache of {request.cache_tokens} tokens was asked for; a session of this trunk "
                f"holds at most {self.limits.session_tokens} (generation.session_tokens)"
            )
        info = SessionInfo(
            client=client,
            name=secrets.token_hex(16),
            round=request.round,
            training=request.training and not request.generating,
            generating=request.generating,
        )
        with self._lock:
            same = [each for each in self._sessions.values() if each.info.is_like(info)]
            self._sessions[info.name] = Session(
                info=info,
                at_once=self._run.train.micro_batches,
                expires_at=self._clock() + self._run.wire.stash_ttl_s,
            )
        for old in same:
            self._drop(old, replaced=True)
        if info.generating:
            self._wait(self.engine.open_cache(client, info.name, request.cache_tokens))
        version = self._wait(self.engine.join(client)) if info.training else self.engine.version
        return m.OpenReply(
            session=info.name,
            server_instance_id=self.server_instance_id,
            version=version,
            limits=self.limits,
            autocast=self._autocast,
        )

    def _forward(self, session: Session, request: m.ForwardRequest) -> m.ForwardReply:
        require_dtype("smashed_BTD", request.smashed_BTD.dtype, self._dtype)
        if request.training and not session.info.training:
            raise ProtocolError("a training forward in a session that was not opened for training")
        if not request.training:
            call = Call(kind=Kind.EVALUATE, client=session.info.client, request=request)
            reply: m.ForwardReply = self._wait(self.engine.submit(call))
            return reply
        if not request.is_delta:
            future: Future[m.ForwardReply] = session.once(Kind.FORWARD, request, self.engine.submit)
            return self._wait(future)
        forward = self.decoder.decode(session.info.client, request)
        return forward.encode(
            self._wait(session.once(Kind.FORWARD, forward.whole, self.engine.submit))
        )

    def _backward(self, session: Session, request: m.BackwardRequest) -> m.BackwardReply:
        require_dtype("grad_trunk_out_BTD", request.grad_trunk_out_BTD.dtype, self._dtype)
        future: Future[m.BackwardReply] = session.once(Kind.BACKWARD, request, self.engine.submit)
        session.forget(m.ForwardRequest, request.call)
        try:
            return self._wait(future)
        except ActivationExpired:
            session.take_back(m.BackwardRequest, request.call, future)
            raise

    def _step(self, session: Session, request: m.StepRequest) -> m.StepReply:
        future: Future[m.StepReply] = session.once(Kind.STEP, request, self.engine.submit)
        return self._wait(future)

    def _generate(self, session: Session, request: m.GenerateRequest) -> m.GenerateReply:
        require_dtype("smashed_BTD", request.smashed_BTD.dtype, self._dtype)
        for entry in request.entries:
            require_dtype("keys_BHTE", entry.keys_BHTE.dtype, self._dtype)
            require_dtype("values_BHTE", entry.values_BHTE.dtype, self._dtype)
        if not session.info.generating:
            raise ProtocolError("a session that was not opened to generate; open another one")
        future: Future[m.GenerateReply] = session.once(Kind.GENERATE, request, self.engine.submit)
        try:
            return self._wait(future)
        except SessionLost:  # its cache is gone, and so is what it was for
            self._drop(session)
            raise

    def _close(self, session: Session, request: m.CloseRequest) -> m.CloseReply:
        self._drop(session)
        return m.CloseReply()

    def _gradients(self, session: Session, request: m.GradientsRequest) -> m.GradientsReply:
        name = session.info.name
        found = self._wait(self.engine.run(lambda: self.engine.training.gradients(name)))
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
            server_instance_id=self.server_instance_id,
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
            if session.info.client != client:
                raise Forbidden(f"session {name} belongs to another client")
            session.expires_at = math.inf
            return session

    def _last_step(self, request: m.StepRequest, client: str) -> "Future[m.StepReply] | None":
        """A step of the session that was dropped last: its reply may have been lost before."""
        return self._last_steps.get(client, {}).get((request.session, request.call))

    def _wait(self, future: "Future[T]") -> T:
        bound = self._run.wire.call_deadline_s
        try:
            return future.result(timeout=bound)
        except FutureTimeout as exc:
            raise DeadlineExceeded(f"the trunk did not answer inside {bound} s") from exc

    def _drop(self, session: Session, *, replaced: bool = False) -> None:
        """End a session and wait until nothing is kept for it."""
        is_leaving = session.leaving is not None
        leaving = self._end(session, replaced=replaced)
        if not (is_leaving and replaced):  # a client that has come back need not wait for its turn
            self._wait(leaving)
            self._gone(session)

    def _end(self, session: Session, *, replaced: bool = False) -> "Future[None]":
        """Have the engine drop a session; a client that is not `replaced` leaves its barrier."""
        with session.lock:
            if session.leaving is None:
                info = session.info
                if info.training:
                    self._last_steps[info.client] = session.steps()
                leaves = info.training and not replaced
                call = Call(
                    kind=Kind.CLOSE, client=info.client if leaves else "", session=info.name
                )
                session.leaving = self.engine.submit(call)
                session.leaving.add_done_callback(lambda _: self._gone(session))
        return session.leaving

    def _gone(self, session: Session) -> None:
        with self._lock:  # only now is nothing kept for it any more
            self._sessions.pop(session.info.name, None)
