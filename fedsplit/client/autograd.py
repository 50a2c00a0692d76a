"""The trunk in the client's autograd graph: a node for each forward that a backward may follow.

Shapes: B sequences, T tokens, D hidden width.
"""

from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedsplit.client.following import Follower, StepReminder
from fedsplit.client.rpc import RpcClient
from fedsplit.errors import ProtocolError, StaleVersion
from fedsplit.wire import messages as m


@dataclass(slots=True, kw_only=True, eq=False)
class ClientSession:
    """A session as its client sees it: its name, its purpose, and the numbers of its calls.

    `step_began` is the number of the first call since the last step, and `trunk_sq_norm` the
    squared norm of the gradient that the trunk has accumulated since then.
    """

    name: str
    trains: bool
    next_call: int
    step_began: int
    trunk_sq_norm: float = 0.0

    def take_call(self) -> int:
        """The number of a new call."""
        self.next_call += 1
        return self.next_call - 1

    def stepped(self) -> None:
        """Note that the trunk has taken the contribution of this session."""
        self.step_began, self.trunk_sq_norm = self.next_call, 0.0


@dataclass(slots=True, kw_only=True, eq=False)
class RemoteGraph:
    """The graph of one forward at the trunk.

    The trunk keeps it for one backward. Another backward repeats the forward on the same parameters
    and with the same dropout.

    Args:
        rpc: Sends the requests.
        session: The session of the forward.
        request: The last forward.
        want_grad: Whether a backward returns the gradient of the hidden states.
        codec: The codec of the output's gradient.
        may_overflow: Whether the client or the trunk computes in float16.
        watch: Told of each backward.
        context: The context of the forward; a backward on a GPU has a thread without it.
        version: The parameter version of the trunk that answered the forward.
        is_used: Whether the last forward had its backward.
    """

    rpc: RpcClient
    session: ClientSession
    request: m.ForwardRequest
    want_grad: bool
    codec: str
    may_overflow: bool
    watch: StepReminder | Follower
    context: Context = field(default_factory=copy_context)
    version: int = 0
    is_used: bool = False

    def backward(self, grad_trunk_out_BTD: Tensor) -> Tensor | None:
        """Send the gradient of the output; return that of the hidden states, if it is wanted.

        Raises:
            StaleVersion: The trunk has other parameters than in the forward.
        """
        grad_trunk_out_BTD = self.watch.before_backward(grad_trunk_out_BTD)
        if self.is_used:
            self._forward_again()
        backward = m.BackwardRequest(
            session=self.session.name,
            call=self.request.call,
            want_grad=self.want_grad,
            grad_trunk_out_BTD=grad_trunk_out_BTD,
            codec=self.codec,
            may_overflow=self.may_overflow,
        )
        reply = self.rpc.backward(backward, self.request, self.version)
        # Only now: a backward that failed is sent again under its own number.
        self.is_used = True
        self.session.trunk_sq_norm = reply.trunk_sq_norm
        self.watch.after_backward()
        return reply.grad_smashed_BTD

    def _forward_again(self) -> None:
        first = self.request
        # Refused here, because the trunk would let the forward wait for the other clients' steps.
        if first.call < self.session.step_began:
            raise StaleVersion(
                f"another backward through call {first.call} came after the trunk's step, which "
                "has changed the parameters of that forward; add the losses and call backward once "
                "before the step, or run the forward again"
            )
        # A new number, since the trunk answers a repeated one with its first reply.
        call = self.session.take_call()
        again = replace(first, call=call, calls_ago=call - first.call + first.calls_ago)
        self.rpc.forward_again(again, self.version)
        self.request, self.is_used = again, False


class RemoteTrunkFunction(torch.autograd.Function):
    """The trunk as one node of the client's graph."""

    @staticmethod
    def forward(ctx: Any, hidden_BTD: Tensor, graph: RemoteGraph) -> Tensor:
        """Send hidden states to the trunk; return its output."""
        reply = graph.rpc.forward(graph.request)
        # The request keeps it alive to repeat the forward; saving it makes `Footprint` count it.
        ctx.save_for_backward(hidden_BTD)
        ctx.graph, graph.version = graph, reply.version
        return reply.trunk_out_BTD.to(hidden_BTD.device)

    @staticmethod
    def backward(ctx: Any, grad_trunk_out_BTD: Tensor) -> tuple[Tensor | None, None]:
        """Send the gradient of the output to the trunk; return that of the hidden states."""
        # torch raises here if the graph was not retained for another backward.
        (hidden_BTD,) = ctx.saved_tensors
        graph: RemoteGraph = ctx.graph
        grad_BTD = graph.context.run(graph.backward, grad_trunk_out_BTD.detach())
        if grad_BTD is None:
            return None, None
        grad_BTD = grad_BTD.to(grad_trunk_out_BTD.device)
        # With create_graph; a constant would be a wrong second derivative.
        if torch.is_grad_enabled():
            reason = "a trunk computes no second derivatives; call backward without create_graph"
            grad_BTD = without_gradient(grad_BTD, hidden_BTD.detach().requires_grad_(), reason)
        return grad_BTD, None


def without_gradient(value_BTD: Tensor, source: Tensor, reason: str) -> Tensor:
    """`value_BTD` as a function of `source`; a backward through it raises a `ProtocolError`."""
    apply: Callable[..., Tensor] = _NoGradient.apply
    return apply(source, value_BTD, reason)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, value_BTD: Tensor, reason: str) -> Tensor:
        ctx.reason = reason
        return value_BTD.view_as(value_BTD)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise ProtocolError(ctx.reason)
