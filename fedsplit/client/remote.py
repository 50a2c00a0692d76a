"""The trunk as its client sees it: a layer to call, and an optimizer to step.

Shapes: B sequences, T tokens, D hidden width. Calling a `RemoteTrunk` carries hidden states to
the trunk and back; autograd carries the gradients the other way. So the client's model is plain
PyTorch: `loss.backward()` crosses the wire.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedsplit.client.retry import Retry
from fedsplit.errors import (
    ActivationExpired,
    FedsplitError,
    ModelMismatch,
    ProtocolError,
    SessionLost,
    StaleVersion,
)
from fedsplit.link import Link
from fedsplit.model.checkpoint import model_fingerprint
from fedsplit.model.hollow import ClientPart
from fedsplit.randomness import Turn, draws
from fedsplit.spec import RunSpec
from fedsplit.wire import messages as m

_REFORWARDS = 6
"""How often a graph that expired is made again before its backward is given up."""


class RemoteTrunk:
    """One client's session with a trunk.

    Args:
        link: Leads to the trunk.
        model: The client's model; its config and the run's split must be the trunk's.
        run: The run that both sides were configured with.
        client: This client's name, the one its token is for.
    """

    def __init__(self, link: Link, model: ClientPart, run: RunSpec, *, client: str) -> None:
        self.client = client
        self.turn = Turn(needed=draws(model))
        self._link = link
        self._identity = {
            "client": client,
            "model": model_fingerprint(model.config, run.split),
            "config": run.fingerprint,
        }
        self._hidden_size: int = model.config.hidden_size
        self._is_isolated = run.train.mode == "isolated"
        self._retry = Retry(run.wire.budget_s, random.Random(client))
        self._session = ""
        self._next_call = 0
        self._trunk_sq_norm = 0.0

    def open(self, round: int = 0, *, training: bool = True, first_call: int = 0) -> int:
        """Begin a session, in place of the one before; the trunk's parameter version.

        The trunk's dropout depends on the seed, the round and the number of the call; who repeats
        work says with `first_call` where to count on from. In `isolated` mode the trunk only ever
        evaluates: it keeps no graph, drops nothing out, and no barrier waits for this client.

        Raises:
            FedsplitError: The trunk refuses this client, or cannot be reached.
        """
        request = m.OpenRequest(
            protocol=m.PROTOCOL,
            hidden_size=self._hidden_size,
            round=round,
            training=training and not self._is_isolated,
            **self._identity,
        )
        reply = self._exchange(request)
        if reply.limits.hidden_size != self._hidden_size:
            raise ModelMismatch(
                f"the trunk's hidden size is {reply.limits.hidden_size}, but this model's is "
                f"{self._hidden_size}; start both from the same model"
            )
        self._session = reply.session
        self._next_call, self._trunk_sq_norm = first_call, 0.0
        return reply.version

    def close(self) -> None:
        """End the session; the link stays open."""
        with suppress(SessionLost):  # it is gone already, perhaps by an attempt before
            self._exchange(m.CloseRequest(session=self._named_session()))
        self._session = ""

    @contextmanager
    def session(
        self, round: int = 0, *, training: bool = True, first_call: int = 0
    ) -> Iterator[None]:
        """A block with a session, closed at its end; after a failure the trunk is told once."""
        self.open(round, training=training, first_call=first_call)
        try:
            yield
        except BaseException:
            with suppress(FedsplitError):
                self._link.exchange(m.CloseRequest(session=self._named_session()))
            raise
        self.close()

    def __call__(
        self,
        hidden_BTD: Tensor,
        attention_mask_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
        cache: object = None,
    ) -> Tensor:
        """Carry hidden states through the trunk; takes part in autograd where it is enabled.

        In `isolated` mode it takes no part: what comes back is a constant.

        Raises:
            FedsplitError: The trunk refused, or could not be reached inside the budget.
        """
        if cache is not None:
            raise ProtocolError("a KV cache at the trunk is not available yet; use_cache=False")
        if attention_mask_BT is not None and bool(attention_mask_BT.all()):
            attention_mask_BT = None
        request = m.ForwardRequest(
            session=self._named_session(),
            call=self._next_call,
            training=torch.is_grad_enabled() and not self._is_isolated,
            smashed_BTD=hidden_BTD.detach(),
            attention_mask_BT=attention_mask_BT,
            position_ids_BT=position_ids_BT,
        )
        self._next_call += 1
        if not request.training:
            return self._exchange(request).trunk_out_BTD.to(hidden_BTD.device)
        # Autograd calls a backward only if an input needs a gradient; the trunk always does.
        below_trains = hidden_BTD.requires_grad
        entering_BTD = hidden_BTD if below_trains else hidden_BTD.detach().requires_grad_()
        cross: Callable[..., Tensor] = _Crossing.apply
        return cross(entering_BTD, self, request, below_trains)

    @property
    def next_call(self) -> int:
        """Number of the next forward."""
        return self._next_call

    @property
    def trunk_sq_norm(self) -> float:
        """Squared norm of the trunk's gradient accumulated since the last step."""
        return self._trunk_sq_norm

    def step(self, *, step: int, num_tokens: int, ends_sq_norm: float) -> None:
        """Contribute the accumulated gradient to the trunk's next step; waits for no one.

        Raises:
            StaleVersion: The trunk moved on; repeat the step in a new session.
        """
        request = m.StepRequest(
            session=self._named_session(),
            call=self._next_call - 1,
            step=step,
            num_tokens=num_tokens,
            ends_sq_norm=ends_sq_norm,
        )
        self._exchange(request)
        self._trunk_sq_norm = 0.0

    def gradients(self, *, tensors: bool = False) -> m.GradientsReply:
        """Norms per block, and on request the tensors, of what has accumulated at the trunk."""
        return self._exchange(m.GradientsRequest(session=self._named_session(), tensors=tensors))

    def training_state(self) -> m.TrainingStateReply:
        """Where the trunk's training stands."""
        return self._exchange(m.TrainingStateRequest(session=self._named_session()))

    def service_info(self) -> m.ServiceInfoReply:
        """What the server is; needs no session."""
        return self._exchange(m.ServiceInfoRequest())

    def _forward(self, request: m.ForwardRequest) -> m.ForwardReply:
        return self._exchange(request)

    def _backward(
        self, request: m.ForwardRequest, version: int, grad_trunk_out_BTD: Tensor, want_grad: bool
    ) -> Tensor | None:
        backward = m.BackwardRequest(
            session=request.session,
            call=request.call,
            want_grad=want_grad,
            grad_trunk_out_BTD=grad_trunk_out_BTD,
        )
        reply = self._backward_at_last(backward, request, version)
        self._trunk_sq_norm = reply.trunk_sq_norm
        return reply.grad_smashed_BTD

    def _backward_at_last(
        self, backward: m.BackwardRequest, forward: m.ForwardRequest, version: int
    ) -> m.BackwardReply:
        for tries in range(_REFORWARDS):
            try:
                return self._exchange(backward)
            except ActivationExpired:
                if tries:  # others need the trunk's memory as well; make room for one another
                    self._retry.pause(tries)
                self._forward_again(forward, version)
        return self._exchange(backward)

    def _forward_again(self, request: m.ForwardRequest, version: int) -> None:
        """Have the trunk make an expired graph again; its dropout is that of the call."""
        now = self._forward(request).version
        if now != version:
            raise StaleVersion(
                f"the graph of call {request.call} expired, and the trunk has moved from version "
                f"{version} to {now} meanwhile; repeat the step"
            )

    def _exchange(self, request: m.Request[m.R]) -> m.R:
        with self.turn.paused():
            return self._retry(lambda: self._link.exchange(request))

    def _named_session(self) -> str:
        if not self._session:
            raise ProtocolError("no session with the trunk is open; call open() first")
        return self._session


class _Crossing(torch.autograd.Function):
    """The trunk as one node of the client's graph."""

    @staticmethod
    def forward(
        ctx: Any, hidden_BTD: Tensor, trunk: RemoteTrunk, request: m.ForwardRequest, below: bool
    ) -> Tensor:
        reply = trunk._forward(request)
        # The request holds it, for a forward to be repeated; so whoever counts activations sees it.
        ctx.save_for_backward(hidden_BTD)
        ctx.trunk, ctx.request, ctx.version, ctx.below = trunk, request, reply.version, below
        return reply.trunk_out_BTD.to(hidden_BTD.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_trunk_out_BTD: Tensor) -> tuple[Tensor | None, None, None, None]:
        grad_BTD = ctx.trunk._backward(ctx.request, ctx.version, grad_trunk_out_BTD, ctx.below)
        moved_BTD = None if grad_BTD is None else grad_BTD.to(grad_trunk_out_BTD.device)
        return moved_BTD, None, None, None
