"""The service: checks requests and their order, and applies each request exactly once.

The name of a request is (session, call, kind). A repeated request gets the reply of the first one,
also while the first one still runs. A forward runs again only if its graph is gone. The reply of a
step is remembered after its session has ended.
"""

import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from fedsplit.errors import (
    ActivationExpired,
    DeadlineExceeded,
    FedsplitError,
    ProtocolError,
    SessionLost,
    TooLarge,
)
from fedsplit.model.acceleration import precision_of
from fedsplit.model.stage import TrunkPart
from fedsplit.spec import RunSpec
from fedsplit.trunk.agreement import Agreement
from fedsplit.trunk.call import Call, Kind
from fedsplit.trunk.callers import Callers, not_for_clients, require_own
from fedsplit.trunk.engine import TrunkEngine
from fedsplit.trunk.guard import require_dtype
from fedsplit.trunk.leader import Followers
from fedsplit.trunk.positions import num_positions, require_positions
from fedsplit.trunk.readings import Readings, gradients_reply
from fedsplit.trunk.registry import ClientRegistry
from fedsplit.trunk.session_table import SessionTable
from fedsplit.trunk.sessions import AcceptedStep, Session, SessionInfo, Steps
from fedsplit.trunk.training import Training
from fedsplit.trunk.turns import Channel
from fedsplit.trunk.update import TrunkUpdate
from fedsplit.wire import messages as m
from fedsplit.wire import server_messages as s
from fedsplit.wire.delta import DeltaDecoder
from fedsplit.wire.validation import check_request

T = TypeVar("T")


class TrunkService:
    """Answers the requests of clients; implements `fedsplit.link.Service`.

    Args:
        trunk: The trunk part, on its device; the parameters that require a gradient train.
        run: The run that it serves.
        clock: Seconds that do not run backwards.
        update: Makes a step of the trunk from the clients' gradients.
        servers_token: The token of the run's other servers; empty if there are none.
        training: The class of the trunk's training.
        clients: The clients' tokens; by default a new registry.
        channel: As in `TrunkEngine`.

    Attributes:
        followers: The other servers of the run.
    """

    def __init__(
        self,
        trunk: TrunkPart,
        run: RunSpec,
        clock: Callable[[], float] = time.monotonic,
        *,
        update: type[TrunkUpdate] = TrunkUpdate,
        servers_token: str = "",
        training: type[Training] = Training,
        clients: ClientRegistry | None = None,
        channel: Channel | None = None,
    ) -> None:
        options: Any = {"update": update, "training": training, "channel": channel}
        self.engine = TrunkEngine(trunk, run, clock, on_turn=self.expire_sessions, **options)
        self.followers = Followers(self.engine, servers_token, clock)
        self.server_instance_id = secrets.token_hex(8)
        self.save_every = self._round = 0
        self.past_instances: dict[str, int] = {}
        self._run = run
        self._agreement = Agreement.of(trunk, run)
        self._readings = Readings(trunk, run, self.engine, self._agreement.model)
        self.limits = self._readings.limits
        self._dtype = trunk.dtype
        self._num_positions = num_positions(trunk)
        self._autocast = precision_of(run.model, trunk.device)
        self._clients = clients or ClientRegistry(servers_token)
        self.decoder = DeltaDecoder(run.wire.history_bytes, max_clients=run.clients)
        self._sessions = SessionTable(run, clock)
        self._last_steps: dict[str, Steps] = {}
        self._callers = Callers(self._clients, self.followers, self._sessions, self._last_steps)
        self._answers: dict[type, Callable[[Any, Any], Any]] = {
            m.ForwardRequest: self._forward,
            m.BackwardRequest: self._backward,
            m.StepRequest: self._step,
            m.GenerateRequest: self._generate,
            m.CloseRequest: self._close,
            m.GradientsRequest: self._gradients,
            m.TrainingStateRequest: self._training_state,
            s.ContributeRequest: lambda *of: self._wait(self.followers.contribute(*of)),
            s.WorkReportRequest: self.followers.report,
        }

    # --- the server's side --------------------------------------------------------------------

    def __enter__(self) -> "TrunkService":
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.stop()

    def admit(self, client: str) -> str:
        """Return the token that opens sessions for `client`, and for no other client."""
        return self._clients.admit(client)

    def forget(self, client: str) -> bool:
        """Forget a client and drop its replica; return False if it still has a session."""
        if self._sessions.has_client(client):
            return False
        self._clients.forget(client)
        self._last_steps.pop(client, None)
        self.engine.last_steps.pop(client, None)
        self.decoder.forget(client)
        self.engine.work.take(client)
        if not self.engine.ended.done():
            self.engine.forget_client(client)
        return True

    def resume(self, steps: Mapping[str, AcceptedStep]) -> None:
        """Answer a step again that clients took before the trunk's state was loaded."""
        self._last_steps.update({client: step.remembered() for client, step in steps.items()})

    def expire_sessions(self) -> None:
        """Drop the sessions that have expired."""
        for session in self._sessions.expired():
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
        """Expect clients, to which work of a round will be sent.

        A virtual clock (`policy.sim_slowdown`) advances only between this call and an end below. So
        call this before work is sent, and `release` a client before it is expected again. To
        continue after an end without new work, expect no clients.

        Args:
            clients: Their names. The trunk's next steps await them according to the policy.
            round: The round's number.
            at_once: How many of them work at a time.
            close_after: Virtual time stops as soon as this number of the clients that were expected
                since the last `close` have left; one without a session leaves when it is released.
            until: The virtual time, in seconds, that the clock does not pass.
        """
        self._round = round
        done = self.engine.expect(clients, at_once=at_once, close_after=close_after, until=until)
        self._wait(done)

    def close(self) -> None:
        """End a round: virtual time stands still until clients are expected again."""
        self._wait(self.engine.pause())

    def release(self, client: str) -> None:
        """Stop waiting for a client, because its work has ended or its connection is lost."""
        self._wait(self.engine.release(client))

    def now(self) -> float:
        """Return the time of the policies' clock in seconds, virtual with `policy.sim_slowdown`."""
        return self.engine.now

    def scale_lr(self, factor: float) -> None:
        """Set the factor on the learning rate of the trunk."""
        self.engine.scale_lr(factor)

    def average(self, weights: Mapping[str, float]) -> None:
        """Set every replica of the trunk to the mean of these clients' replicas.

        Thapa, Arachchige, Camtepe and Sun 2022, "SplitFed: When Federated Learning Meets Split
        Learning", AAAI 36(8), arXiv 2004.12088, algorithm 1. Moments are not averaged.

        Args:
            weights: The weight of each client; they sum to one.

        Raises:
            ConfigError: There are no replicas, or the weights do not sum to one.
        """
        self._wait(self.engine.average(weights))

    def has(self, session: str) -> bool:
        """Return whether a session is open."""
        return session in self._sessions

    @property
    def num_sessions(self) -> int:
        """The number of open sessions."""
        return len(self._sessions)

    def budgets(self) -> dict[str, str]:
        """Return how much of each budget is in use, by the setting that limits it."""
        return {**self._sessions.in_use(), **self.engine.in_use(), **self.decoder.in_use()}

    # --- fedsplit.link.Service ----------------------------------------------------------------

    @property
    def trunks(self) -> "Mapping[str, Future[None]]":
        """The one trunk, without a name; see `fedsplit.link.Service`."""
        return {"": self.engine.ended}

    def check_token(self, token: str) -> str:
        """Refuse clients that are not of this run; see `fedsplit.link.Service`."""
        return "" if self.followers.is_one(token) else self._clients.client_of(token)

    def handle(self, request: m.Request[m.R], token: str) -> m.R:
        """Answer one request; see `fedsplit.link.Service`."""
        check_request(request, self.limits)
        if isinstance(request, m.ServiceInfoRequest):
            return self._info(token)  # type: ignore[return-value]
        if is_follower := not (client := self._clients.find(token)):
            client = self._callers.client_of(request, token)
        elif isinstance(request, s.OF_FOLLOWERS):
            raise not_for_clients(request)
        if isinstance(request, s.ParametersRequest):
            instance = self.server_instance_id
            return self.followers.parameters(request, instance)  # type: ignore[return-value]
        if isinstance(request, m.OpenRequest):
            return self._open(request, client, of_follower=is_follower)  # type: ignore[return-value]
        if isinstance(request, m.StepRequest) and (step := self._last_step(request, client)):
            return self._wait(step)  # type: ignore[return-value]
        session = self._sessions.of(request.session, client)  # type: ignore[attr-defined]
        is_moved = session.info.of_follower and not isinstance(request, s.OF_LEADER)
        answer = self._answer_moved if is_moved else self._answers[type(request)]
        try:
            reply = answer(session, request)
        except FedsplitError:
            self._sessions.refused(session.info.name)
            raise
        self._sessions.served(session.info.name)
        return reply  # type: ignore[no-any-return]

    def disconnected(self, session: str) -> None:
        """Let a session expire in `policy.deadline_s`, unless its client sends a request."""
        self._sessions.disconnected(session)

    # --- one method a request -----------------------------------------------------------------

    def _open(
        self, request: m.OpenRequest, client: str, *, of_follower: bool = False, name: str = ""
    ) -> m.OpenReply:
        require_own(request, client)
        self._agreement.check(request, self.engine.version)
        if request.cache_tokens > self.limits.session_tokens:
            raise TooLarge(
                f"a cache of {request.cache_tokens} tokens was asked for; a session of this trunk "
                f"holds at most {self.limits.session_tokens}; make the cache smaller, or raise "
                "generation.session_tokens at the trunk"
            )
        info = SessionInfo(
            client=client,
            name=name or secrets.token_hex(16),
            round=request.round,
            training=request.training and not request.generating,
            generating=request.generating,
            of_follower=of_follower,
        )
        session = Session(info=info, at_once=self._run.train.micro_batches)
        for old in self._sessions.add(session):
            self._drop(old, replaced=old.info.is_like(info))
        try:
            if info.generating:
                self._wait(self.engine.open_cache(client, info.name, request.cache_tokens))
            version = self._wait(self.engine.join(client)) if info.training else self.engine.version
        except FedsplitError:  # a client in quarantine, which could not close it
            self._end(session)
            raise
        return m.OpenReply(
            session=info.name,
            server_instance_id=self.server_instance_id,
            version=version,
            limits=self.limits,
            autocast=self._autocast,
            save_every=self.save_every,
            kept_version=self.past_instances.get(request.last_instance_id, 0),
        )

    def _forward(self, session: Session, request: m.ForwardRequest) -> m.ForwardReply:
        positions_BT, tokens = request.position_ids_BT, request.smashed_BTD.shape[1]
        require_dtype("smashed_BTD", request.smashed_BTD.dtype, self._dtype)
        require_positions(positions_BT, 0, tokens, self._num_positions)
        if request.training and not session.info.training:
            raise ProtocolError("this session was not opened for training; open another session")
        if not request.training or request.bases_B is None:
            kind = Kind.FORWARD if request.training else Kind.EVALUATE
            future: Future[m.ForwardReply] = session.once(kind, request, self.engine.submit)
            return self._wait(future)
        forward = self.decoder.decode(session.info.client, request)
        return forward.encode(
            self._wait(session.once(Kind.FORWARD, forward.whole, self.engine.submit))
        )

    def _backward(self, session: Session, request: m.BackwardRequest) -> m.BackwardReply:
        require_dtype("grad_trunk_out_BTD", request.grad_trunk_out_BTD.dtype, self._dtype)
        future: Future[m.BackwardReply] = session.once(Kind.BACKWARD, request, self.engine.submit)
        # The client has this output, or it could not have sent the gradient.
        session.forget(m.ForwardRequest, request.call)
        try:
            return self._wait(future)
        except ActivationExpired:
            session.take_back(m.BackwardRequest, request.call, future)
            raise

    def _step(self, session: Session, request: m.StepRequest) -> m.StepReply:
        future: Future[m.StepReply] = session.once(Kind.STEP, request, self.engine.submit)
        return self._wait(future)

    def _answer_moved(self, session: Session, request: m.Request[Any]) -> Any:
        return self._wait(session.reply_to(request))

    def _generate(self, session: Session, request: m.GenerateRequest) -> m.GenerateReply:
        positions_BT, tokens = request.position_ids_BT, request.smashed_BTD.shape[1]
        require_dtype("smashed_BTD", request.smashed_BTD.dtype, self._dtype)
        require_positions(positions_BT, request.past, tokens, self._num_positions)
        for entry in request.entries:
            require_dtype("keys_BHTE", entry.keys_BHTE.dtype, self._dtype)
            require_dtype("values_BHTE", entry.values_BHTE.dtype, self._dtype)
        if not session.info.generating:
            raise ProtocolError("this session was not opened to generate; open another session")
        self._sessions.touch(request.source, session.info.client)
        try:
            future: Future[m.GenerateReply] = session.once(
                Kind.GENERATE, request, self.engine.submit
            )
            reply = self._wait(future)
        except SessionLost:  # without its cache, the session has no purpose
            self._drop(session)
            raise
        session.keep_if_small(request.call, reply, self._run.limits.reply_bytes)
        return reply

    def _close(self, session: Session, request: m.CloseRequest) -> m.CloseReply:
        self._drop(session)
        return m.CloseReply()

    def _gradients(self, session: Session, request: m.GradientsRequest) -> m.GradientsReply:
        gradients = self._wait(self.engine.gradients(session.info.name))
        return gradients_reply(request, gradients)

    def _training_state(self, session: Session, request: Any) -> m.TrainingStateReply:
        return self._readings.training_state(self._round)

    def _info(self, token: str) -> m.ServiceInfoReply:
        # How busy others are is told to clients alone.
        budgets = self.budgets() if self._clients.knows(token) else {}
        return self._readings.info(self.server_instance_id, len(self._sessions), budgets)

    # --- sessions -----------------------------------------------------------------------------

    def _last_step(self, request: m.StepRequest, client: str) -> "Future[m.StepReply] | None":
        """Return a step of the client's last ended session, whose reply may have been lost."""
        return self._last_steps.get(client, {}).get((request.session, request.call))

    def _wait(self, future: "Future[T]") -> T:
        bound = self._run.wire.call_deadline_s
        try:
            return future.result(timeout=bound)
        except TimeoutError as exc:
            raise DeadlineExceeded(
                f"the trunk did not answer within {bound} s (wire.call_deadline_s); try again"
            ) from exc

    def _drop(self, session: Session, *, replaced: bool = False) -> None:
        """End a session and wait until the engine has dropped its state."""
        is_leaving, leaving = session.leaving is not None, self._end(session, replaced=replaced)
        # A client that has returned does not wait for its own LEAVE, which may be at a later time.
        if not (is_leaving and replaced):
            self._wait(leaving)
            self._sessions.remove(session.info.name)

    def _end(self, session: Session, *, replaced: bool = False) -> "Future[None]":
        """Let the engine drop a session; a client that is not `replaced` leaves its barrier."""
        with session.lock:
            if session.leaving is None:
                info, steps = session.info, session.steps()
                if info.training and steps:
                    self._last_steps[info.client] = steps
                client = info.client if info.training and not replaced else ""
                call = Call(kind=Kind.CLOSE, client=client, session=info.name)
                session.leaving = self.engine.submit(call)
                # Only then has the engine dropped its state.
                session.leaving.add_done_callback(lambda _: self._sessions.remove(info.name))
        return session.leaving
