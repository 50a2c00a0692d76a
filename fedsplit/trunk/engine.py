"""The one thread that owns the trunk: takes work, runs it, steps, lets waiting forwards go.

Shapes: B sequences, T tokens, D hidden width. Transport threads only submit work and wait. All
state below (parameter versions, stash, accumulated gradients, barrier) belongs to this thread,
so none of it needs a lock. Backwards and steps go before forwards: they free memory.
"""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsplit.errors import (
    BadTensor,
    Draining,
    FedsplitError,
    Internal,
    ProtocolError,
    SessionLost,
    StaleVersion,
)
from fedsplit.model.hollow import TrunkPart
from fedsplit.model.lora import trainable
from fedsplit.optimization import clip_coefficient, squared_norm
from fedsplit.randomness import Turn, draws
from fedsplit.spec import RunSpec
from fedsplit.trunk import aggregator
from fedsplit.trunk.guard import require_finite
from fedsplit.trunk.inbox import Inbox, Task
from fedsplit.trunk.stash import ByteCount, Graph, Stash
from fedsplit.trunk.versions import ParameterVersions
from fedsplit.wire.messages import (
    BackwardReply,
    BackwardRequest,
    ForwardReply,
    ForwardRequest,
    StepReply,
    StepRequest,
)

_FIRST, _LAST = 0, 1
_IDLE_S = 1.0
_OLDEST = 4
"""Versions that a graph may be behind; each one that is kept costs as much as the parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """Whom work is done for: a client in one session, in one round."""

    client: str
    session: str
    round: int
    training: bool


@dataclass(slots=True, kw_only=True, eq=False)
class _Gradient:
    """What one session has accumulated since its last step, and on which version."""

    tensors: dict[str, Tensor]
    version: int


class TrunkEngine:
    """Runs forwards and backwards of a trunk and steps it as the policy says.

    Args:
        trunk: The trunk part, on its device; the engine owns it from now on. The parameters that
            require a gradient train.
        run: The run's optimizer, policy, budgets and seed.
        clock: Seconds that do not run backwards.
    """

    def __init__(
        self,
        trunk: TrunkPart,
        run: RunSpec,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trunk = trunk
        self._run = run
        self._clock = clock
        self._turn = Turn(needed=draws(trunk))
        self._device = next(trunk.parameters()).device
        self._versions = ParameterVersions(trunk, tuple(trainable(trunk)), run.train)
        self._stash = Stash(run.wire.stash_bytes)
        self._barrier = aggregator.Barrier()
        self._gradients: dict[str, _Gradient] = {}
        self._contributions: dict[str, tuple[dict[str, Tensor], int]] = {}
        self._parked: list[tuple[Worker, ForwardRequest, Future[ForwardReply]]] = []
        self._due: Mapping[str, float] = {}
        self._steps = 0
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
        future: Future[ForwardReply] = Future()
        self._inbox.put(_LAST, future, lambda: self._forward_or_park(worker, request, future))
        return future

    def backward(self, worker: Worker, request: BackwardRequest) -> "Future[BackwardReply]":
        """Run a gradient back through a stashed graph and accumulate the parameters' gradients."""
        return self._submit(_FIRST, lambda: self._backward(worker, request))

    def step(self, worker: Worker, request: StepRequest) -> "Future[StepReply]":
        """Contribute what `worker` accumulated; the reply does not wait for the barrier."""
        return self._submit(_FIRST, lambda: self._contribute(worker, request))

    def open_round(self, expected: int) -> "Future[None]":
        """Have the first step wait until `expected` clients have joined."""
        return self._submit(_FIRST, lambda: self._tell(aggregator.RoundOpened(expected=expected)))

    def join(self, worker: Worker) -> "Future[int]":
        """Count a training session's client in; the current version."""
        # As late as a leave, so that a client's new session is never undone by the end of its old.
        return self._submit(_LAST, lambda: self._join(worker))

    def leave(self, worker: Worker, *, replaced: bool = False) -> "Future[None]":
        """Drop all that is kept for a session; what it contributed stays.

        A client whose session is `replaced` by another is still waited for.
        """
        # After the forwards that it still has in the queue, so that nothing comes back to stay.
        return self._submit(_LAST, lambda: self._leave(worker, replaced))

    def gradients(self, worker: Worker) -> "Future[dict[str, Tensor]]":
        """What a session has accumulated since its last step, by parameter name."""
        return self._submit(_FIRST, lambda: self._copy_of_gradient(worker))

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's moments by name, once the engine has stopped."""
        return {name: moment.cpu() for name, moment in self._versions.state().items()}

    @property
    def version(self) -> int:
        """The current parameter version."""
        return self._versions.current

    @property
    def steps(self) -> int:
        """Where the learning rate schedule stands: the clients' own count of optimizer steps."""
        return self._steps

    @property
    def stashed_bytes(self) -> int:
        """Activations that are kept for outstanding backwards."""
        return self._stash.num_bytes

    # --- the engine's thread ------------------------------------------------------------------

    def _loop(self) -> None:
        task: Task | None = None
        try:
            while not self._inbox.closed:
                patience = max(0.0, self._barrier.deadline - self._clock())
                task = self._inbox.take(min(_IDLE_S, patience))
                self._look_at_the_clock()
                if task:
                    task.run()
                self._step_if_due()
        finally:
            self._refuse_what_waits([task.future] if task else [])

    def _refuse_what_waits(self, in_hand: "list[Future[Any]]") -> None:
        why = Internal("the trunk's engine failed; the server's log has the details")
        self._inbox.close(why)  # or it was closed on purpose
        for future in (*in_hand, *(future for _, _, future in self._parked)):
            if not future.done():
                future.set_exception(self._inbox.closed or why)

    def _look_at_the_clock(self) -> None:
        self._unpin(self._stash.drop_expired(self._clock()))
        if self._clock() >= self._barrier.deadline:
            self._tell(aggregator.Ticked())
            self._step_if_due()

    def _submit(self, priority: int, work: Callable[[], Any]) -> "Future[Any]":
        future: Future[Any] = Future()
        self._inbox.put(priority, future, lambda: _resolve(future, work))
        return future

    def _shut_down(self) -> None:
        self._inbox.close(Draining("the trunk is shutting down; no new work is taken"))

    def _forward_or_park(
        self, worker: Worker, request: ForwardRequest, future: "Future[ForwardReply]"
    ) -> None:
        if request.training and self._barrier.has(worker.client):
            self._parked.append((worker, request, future))
        else:
            _resolve(future, lambda: self._forward(worker, request))

    def _forward(self, worker: Worker, request: ForwardRequest) -> ForwardReply:
        require_finite(request.smashed_BTD, "smashed_BTD")
        smashed_BTD = request.smashed_BTD.to(self._device)
        inputs = {
            "attention_mask_BT": _moved(request.attention_mask_BT, self._device),
            "position_ids_BT": _moved(request.position_ids_BT, self._device),
        }
        self._set_mode(request.training)
        if not request.training:
            with torch.no_grad():
                trunk_out_BTD = self._trunk.run(smashed_BTD, **inputs)
            return ForwardReply(trunk_out_BTD=trunk_out_BTD.cpu(), version=self.version)
        smashed_BTD.requires_grad_()
        count = ByteCount(self._trunk.parameters())
        name = f"trunk/{self._run.seed}/{worker.client}/{worker.round}/{request.call}"
        with self._turn.drawing(name), torch.enable_grad(), count.counting():
            trunk_out_BTD = self._trunk.run(smashed_BTD, **inputs)
        graph = Graph(
            smashed_BTD=smashed_BTD,
            trunk_out_BTD=trunk_out_BTD,
            version=self.version,
            num_bytes=count.num_bytes,
            expires_at=self._clock() + self._run.wire.stash_ttl_s,
        )
        self._versions.pin(graph.version)
        self._unpin(self._stash.put(worker.session, request.call, graph))
        return ForwardReply(trunk_out_BTD=trunk_out_BTD.detach().cpu(), version=graph.version)

    def _backward(self, worker: Worker, request: BackwardRequest) -> BackwardReply:
        require_finite(request.grad_trunk_out_BTD, "grad_trunk_out_BTD")
        graph = self._stash.take(worker.session, request.call)
        leaves = self._versions.leaves(graph.version)
        wanted = [*leaves.values(), *([graph.smashed_BTD] if request.want_grad else [])]
        try:
            _check_shape(request.grad_trunk_out_BTD, graph)
            found = self._gradients_of(graph, wanted, request.grad_trunk_out_BTD)
        finally:
            self._unpin([graph])
        self._accumulate(worker.session, dict(zip(leaves, found, strict=False)), graph.version)
        return BackwardReply(
            grad_smashed_BTD=_moved(found[-1], torch.device("cpu")) if request.want_grad else None,
            trunk_sq_norm=squared_norm(self._gradients[worker.session].tensors.values()),
        )

    def _gradients_of(
        self, graph: Graph, wanted: list[Tensor], grad_trunk_out_BTD: Tensor
    ) -> tuple[Tensor | None, ...]:
        if not wanted:
            return ()
        self._set_mode(True)
        with self._versions.installed(graph.version):
            return torch.autograd.grad(
                graph.trunk_out_BTD,
                wanted,
                grad_trunk_out_BTD.to(self._device),
                allow_unused=True,
            )

    def _accumulate(self, session: str, found: Mapping[str, Tensor | None], version: int) -> None:
        total = self._gradients.setdefault(session, _Gradient(tensors={}, version=version))
        total.version = min(total.version, version)
        for name, gradient in found.items():
            if gradient is None:
                continue
            if name in total.tensors:
                total.tensors[name] += gradient
            else:
                total.tensors[name] = gradient

    def _contribute(self, worker: Worker, request: StepRequest) -> StepReply:
        gradient = self._gradients.pop(worker.session, None)
        if gradient is None:
            raise ProtocolError("there is nothing to step with: no backward since the last step")
        sq_norm = request.ends_sq_norm + squared_norm(gradient.tensors.values())
        require_finite(torch.tensor(sq_norm, dtype=torch.float64), "the squared gradient norm")
        coefficient = clip_coefficient(sq_norm, self._run.train.clip_norm)
        if coefficient != 1.0:
            for tensor in gradient.tensors.values():
                tensor.mul_(coefficient)
        decision = self._tell(
            aggregator.Contributed(
                client=worker.client, version=gradient.version, num_tokens=request.num_tokens
            )
        )
        if isinstance(decision, aggregator.Refuse):
            raise StaleVersion(
                f"step {request.step} of {worker.client} was made with version "
                f"{gradient.version}, but the trunk is at {decision.current}; repeat the step"
            )
        self._contributions[worker.client] = gradient.tensors, request.step
        return StepReply(version=gradient.version + 1)

    def _tell(self, event: aggregator.Event) -> aggregator.Decision:
        self._barrier, decision = aggregator.sync(
            self._barrier, event, now=self._clock(), deadline_s=self._run.policy.deadline_s
        )
        if isinstance(decision, aggregator.Step):
            self._due = decision.weights
        return decision

    def _step_if_due(self) -> None:
        # After the work that made it due, so that nobody's reply waits for the optimizer.
        if not self._due:
            return
        steps = [self._contributions[client][1] for client in self._due]
        self._versions.step(self._mean(self._due), max(steps))
        self._steps = max(steps) + 1
        self._unpin(self._stash.drop_older(self.version - _OLDEST))
        self._contributions.clear()
        self._due = {}
        waiting, self._parked = self._parked, []
        for worker, request, future in waiting:
            self._forward_or_park(worker, request, future)

    def _mean(self, weights: Mapping[str, float]) -> dict[str, Tensor]:
        # Clients in the order of their names, so that the sum does not depend on who was first.
        mean: dict[str, Tensor] = {}
        for client, weight in weights.items():
            for name, gradient in self._contributions[client][0].items():
                part = gradient if weight == 1.0 else gradient.mul_(weight)
                mean[name] = mean[name].add_(part) if name in mean else part
        return mean

    def _join(self, worker: Worker) -> int:
        self._tell(aggregator.Joined(client=worker.client))
        return self.version

    def _leave(self, worker: Worker, replaced: bool) -> None:
        self._unpin(self._stash.drop_session(worker.session))
        self._gradients.pop(worker.session, None)
        gone = [entry for entry in self._parked if entry[0].session == worker.session]
        self._parked = [entry for entry in self._parked if entry[0].session != worker.session]
        for _, _, future in gone:
            future.set_exception(SessionLost(f"session {worker.session} was closed"))
        if worker.training and not replaced:
            self._tell(aggregator.Left(client=worker.client))

    def _unpin(self, graphs: list[Graph]) -> None:
        for graph in graphs:
            self._versions.unpin(graph.version)

    def _set_mode(self, training: bool) -> None:
        if self._trunk.training != training:
            self._trunk.train(training)

    def _copy_of_gradient(self, worker: Worker) -> dict[str, Tensor]:
        gradient = self._gradients.get(worker.session)
        return {k: v.cpu().clone() for k, v in gradient.tensors.items()} if gradient else {}


def _resolve(future: "Future[Any]", work: Callable[[], Any]) -> None:
    """Run work and hand its outcome, whatever it is, to who waits for it."""
    try:
        result = work()
    except Exception as failure:
        future.set_exception(failure)
    else:
        future.set_result(result)


def _check_shape(grad_trunk_out_BTD: Tensor, graph: Graph) -> None:
    if grad_trunk_out_BTD.shape != graph.trunk_out_BTD.shape:
        raise BadTensor(
            f"grad_trunk_out of shape {tuple(grad_trunk_out_BTD.shape)} came for a trunk_out of "
            f"shape {tuple(graph.trunk_out_BTD.shape)}; they must be the same"
        )


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
