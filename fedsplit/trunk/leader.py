"""The leader's side of its followers: it sends them parameters, and takes their contributions.

Several servers can train one run. Each has the sessions, graphs and caches of its own clients. One
of them is the leader, which alone has the barrier and the optimizer. The others follow: they send
the leader what their clients contribute, and read the parameters of each version from it. A
follower calls its leader, and never the other way round, so that the death of one blocks nobody.
"""

import hmac
import threading
from collections.abc import Callable
from concurrent.futures import Future

from fedsplit.errors import BadTensor, Draining
from fedsplit.trunk.call import Call, Kind
from fedsplit.trunk.engine import TrunkEngine
from fedsplit.trunk.norm_guard import GuardCounts
from fedsplit.trunk.replica import Parameters
from fedsplit.trunk.sessions import Session
from fedsplit.trunk.turns import Order
from fedsplit.wire.messages import StepReply, StepRequest
from fedsplit.wire.server_messages import (
    ContributeRequest,
    ParametersReply,
    ParametersRequest,
    WorkReportReply,
    WorkReportRequest,
)
from fedsplit.wire.session import Event

POLL_S = 5.0
"""The longest wait for other parameters. A follower that is silent for twice this is gone."""

_SPARE_BYTES = 8
"""More than the padding of a tensor on the wire."""


class Followers:
    """The followers of a trunk's engine; several threads may use it.

    Args:
        engine: The leader's engine; set its `on_step` no more.
        token: The token that the servers of a run share; empty for a trunk without followers.
        clock: Seconds that do not run backwards.
    """

    def __init__(self, engine: TrunkEngine, token: str, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._token = token
        self._clock = clock
        self._changed = threading.Condition()
        self._is_closed = False
        self._heard_at: dict[str, float] = {}
        self._copying = threading.Lock()
        self._copy: Parameters | None = None
        self._kinds = engine.training.shared.versions.kinds()
        self._payload_bytes = sum(
            shape.numel() * dtype.itemsize + _SPARE_BYTES for dtype, shape in self._kinds.values()
        )
        engine.on_step = self._on_step

    def is_one(self, token: str) -> bool:
        """Return whether a caller with this token is a server of the run."""
        # The time of a plain comparison tells how long the correct prefix of a guess is.
        return bool(self._token) and hmac.compare_digest(token.encode(), self._token.encode())

    def payload_of(self, token: str) -> int:
        """Return the bytes of the longest request with this token; 0 for clients."""
        return self._payload_bytes if self.is_one(token) else 0

    def is_alive(self, follower: str) -> bool:
        """Return whether a follower has read the parameters lately."""
        return self._heard_at.get(follower, -2 * POLL_S) + 2 * POLL_S > self._clock()

    def close(self) -> None:
        """Answer the followers that wait, and refuse further requests for parameters."""
        self._is_closed = True
        self._notify()

    # --- the requests of followers ------------------------------------------------------------

    def parameters(self, request: ParametersRequest, instance: str) -> ParametersReply:
        """Wait until there are other parameters than those of the request, and return them.

        Args:
            request: The request.
            instance: The leader's `server_instance_id`.

        Raises:
            Draining: The leader shuts down.
        """
        versions = self._engine.training.shared.versions
        known = request.version if request.server_instance_id == instance else -1
        with self._changed:
            self._heard_at[request.follower] = self._clock()
            self._changed.wait_for(
                lambda: self._is_closed or versions.current != known,
                timeout=min(request.wait_s, POLL_S),
            )
        if self._is_closed:
            raise Draining("the leader is shutting down; try again when it is back")
        parameters = self._current()
        values = {} if parameters.version == known else parameters.values
        return ParametersReply(
            server_instance_id=instance,
            version=parameters.version,
            barrier_version=parameters.barrier_version,
            names=tuple(values),
            parameters=tuple(values.values()),
        )

    def contribute(self, session: Session, request: ContributeRequest) -> "Future[StepReply]":
        """Contribute to the trunk's step what a session has accumulated at a follower.

        Raises:
            BadTensor: The gradients are not those of the trained parameters.
        """
        for name, gradient in zip(request.names, request.gradients, strict=True):
            if self._kinds.get(name) != (gradient.dtype, gradient.shape):
                raise BadTensor(
                    f"a follower sent a gradient of {name} with shape {tuple(gradient.shape)}, and "
                    "the leader trains no such parameter; start both with the same run"
                )

        def submit(call: Call) -> "Future[StepReply]":
            of = request.session, request.num_positions, request.barrier_version
            gradients = dict(zip(request.names, request.gradients, strict=True))
            # On one thread and in this order, as if the session had accumulated it here.
            self._engine.run(Order("receive", of, gradients))
            return self._engine.submit(call)

        step = StepRequest(
            session=request.session,
            call=request.call,
            step=request.step,
            num_tokens=request.num_tokens,
            client_sq_norm=request.client_sq_norm,
            loss_scale=request.loss_scale,
        )
        return session.once(Kind.STEP, step, submit, event=Event.CONTRIBUTE)

    def report(self, session: Session, request: WorkReportRequest) -> WorkReportReply:
        """Count the work of a session's client at a follower, and what the guard did there."""
        self._engine.work.passed(session.info.client, request.positions)
        self._engine.training.quarantine.add(
            GuardCounts(
                clipped=request.clipped,
                refused=request.refused,
                quarantines=request.quarantines,
            )
        )
        return WorkReportReply()

    # --- the parameters -----------------------------------------------------------------------

    def _on_step(self) -> None:
        """Copy the new parameters for the followers that wait for them; on the engine's thread."""
        if any(self.is_alive(follower) for follower in tuple(self._heard_at)):
            # A copy in its turn would come after the forwards of the leader's own clients.
            self._copy = self._engine.now_do(Order("parameters"))
        self._notify()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _current(self) -> Parameters:
        """Return the current parameters; all followers share one copy of a version."""
        versions = self._engine.training.shared.versions
        with self._copying:
            if self._copy is None or self._copy.version != versions.current:
                self._copy = self._engine.run(Order("parameters")).result()
            return self._copy
