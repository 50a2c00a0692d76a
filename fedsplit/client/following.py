"""Trunk steps in a training loop that is not ours: `follow`, and a warning where it is missing.

A loop that trains an ordinary model clips the gradients of `model.parameters()`, scales them, drops
them, saves the weights and loads them again. The trunk's share of all that is at the server. So the
client's model gets a *stand-in*: a parameter of two numbers whose gradient has the norm of the
trunk's gradient. The loop treats it as any other parameter, and its gradient then tells what the
loop did to all gradients.
"""

import logging
import math
import weakref
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from fedsplit.client.norms import require_comparable_norms
from fedsplit.client.trunk_version import STAND_IN, VersionStamp
from fedsplit.errors import CheckpointError, ConfigError, NonFinite
from fedsplit.model.stage import ClientPart
from fedsplit.optimization import clip_coefficient, squared_norm
from fedsplit.spec import TrainSpec

log = logging.getLogger(__name__)

# Two different numbers, so that an operation that does not scale both alike is noticed.
_SHARES = torch.tensor([0.6, 0.8])
_SAMPLED = 8


class StepReminder:
    """Warns once if the client's weights change after a backward and no step was requested.

    The trunk then keeps its parameters while the client trains. Several backwards before a step are
    accumulation, which leaves the client's weights as they are.

    Args:
        model: The client's model.
        train: The run's; the trunk need not step in each of its modes.
        client: The client's name, for the warning.
    """

    def __init__(self, model: ClientPart, train: TrainSpec, client: str) -> None:
        # The model holds the trunk's handle, which holds this object.
        self.model = weakref.ref(model)
        self.train = train
        self._client = client
        self._sample: list[Tensor] = []
        self._is_done = train.mode != "joint"

    def before_forward(self) -> None:
        """Warn if the weights have changed since the first backward."""
        model = self.model()
        if not self._sample or model is None or _is_sample_of(model, self._sample):
            return
        log.warning(
            "%s: the client's weights have changed after a backward, but the trunk was not asked "
            "for a step, so it does not train; call trunk.follow(optimizer) before the training, "
            "or set train.mode=frozen_trunk in the run if the trunk is to stay as it is",
            self._client,
        )
        self.stepped()

    def before_backward(self, grad_trunk_out_BTD: Tensor) -> Tensor:
        """The gradient for the trunk, unchanged."""
        return grad_trunk_out_BTD

    def after_backward(self) -> None:
        """Note the weights at the first backward."""
        model = self.model()
        if model is not None and not self._sample and not self._is_done:
            self._sample = _sample_of(model)

    def stepped(self) -> None:
        """End the watch."""
        self._is_done, self._sample = True, []

    def session_ended(self) -> None:
        """Forget the backwards of a session that ends."""
        self.before_forward()
        self._sample = []


def _sample_of(model: nn.Module) -> list[Tensor]:
    """A few numbers of each trained parameter."""
    trained = (p.detach() for p in model.parameters() if p.requires_grad)
    return [p.reshape(-1)[:_SAMPLED].clone() for p in trained]


def _is_sample_of(model: nn.Module, sample: list[Tensor]) -> bool:
    # An optimizer may step parameters without increasing autograd's count of changes.
    now = _sample_of(model)
    return len(now) == len(sample) and all(map(torch.equal, now, sample))


def _warn_of_difference(optimizer: Optimizer, train: TrainSpec) -> None:
    """Warn if the trunk, which steps as the run says, steps otherwise than this optimizer."""
    kind, lr = type(optimizer).__name__, optimizer.defaults.get("lr")
    if kind.lower() != train.optimizer.replace("_", "") or lr != train.lr:
        log.warning(
            "the client steps with %s at lr=%s, and the trunk with train.optimizer=%s at "
            "train.lr=%g; set the same at both to train as the unsplit model would",
            *(kind, lr, train.optimizer, train.lr),
        )


class FollowedTrunk(Protocol):
    """What a follower uses of a `fedsplit.client.remote.RemoteTrunk`."""

    watch: "StepReminder | Follower"
    round: int
    version: int

    @property
    def next_call(self) -> int:
        """Number of the next forward."""

    @property
    def trunk_sq_norm(self) -> float:
        """Squared norm of the trunk's gradient since the last step."""

    def open(self, round: int = 0, *, training: bool = True, first_call: int = 0) -> int:
        """Open a session in place of the previous one."""

    def step(
        self, *, step: int, num_tokens: int, client_sq_norm: float, loss_scale: float = 1.0
    ) -> None:
        """Contribute the accumulated gradient to the trunk's next step."""


class Follower(VersionStamp):
    """The handle that `RemoteTrunk.follow` returns; `remove()` or the end of a `with` ends it.

    Args:
        trunk: The client's handle for its trunk.
        optimizer: Steps the weights of the client's model, which has a stand-in until `remove`.
        previous: The watch of the trunk, which `remove` restores.
        step: How many optimizer steps this client has taken before.

    Raises:
        ConfigError: The trunk does not train, or follows an optimizer already; or this is none.
    """

    def __init__(
        self,
        trunk: FollowedTrunk,
        optimizer: Optimizer,
        previous: "StepReminder | Follower",
        step: int,
    ) -> None:
        if isinstance(previous, Follower):
            raise ConfigError(
                "the trunk follows an optimizer already; call remove() on the handle of that follow"
            )
        model, train = previous.model(), previous.train
        if train.mode != "joint":
            raise ConfigError(
                f"train.mode={train.mode}: the trunk does not train; use mode=joint, or leave out "
                "follow"
            )
        assert model is not None, "its optimizer is here"
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(
                f"follow needs an optimizer of torch, not {type(optimizer).__name__}; that of a "
                "Trainer is made by trainer.create_optimizer()"
            )
        _warn_of_difference(optimizer, train)
        self.steps = step
        self._has_stepped = False
        self._trunk, self._model, self._optimizer, self._train = trunk, model, optimizer, train
        self._previous = previous
        self._stand_in = nn.Parameter(torch.zeros(2, device=model.device), requires_grad=False)
        # The gradient of the stand-in after the last backward; None after a step.
        self._given: Tensor | None = None
        self._is_finite = True
        model.register_parameter(STAND_IN, self._stand_in)
        # A loss scaler finds infinities in the gradients of the optimizer's parameters.
        optimizer.param_groups[-1]["params"].append(self._stand_in)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            *self.stamp_state_dicts(model),
        ]

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __reduce__(self) -> NoReturn:
        """Refuse a pickle of the model, whose hooks hold this object.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "the trunk follows an optimizer of this model, which cannot be pickled meanwhile; "
            "save its state_dict(), or call remove() on the handle of follow() first"
        )

    def remove(self) -> None:
        """End the contributions, and remove the stand-in."""
        for handle in self._handles:
            handle.remove()
        del self._model._parameters[STAND_IN]
        parameters = self._optimizer.param_groups[-1]["params"]
        parameters[:] = [each for each in parameters if each is not self._stand_in]
        self._trunk.watch = self._previous

    # --- between forward and step -------------------------------------------------------------

    def before_forward(self) -> None:
        """Drop the trunk's gradients if the loop has dropped the client's."""
        if self._is_dropped():
            self._trunk.open(self._trunk.round, first_call=self._trunk.next_call)

    def before_backward(self, grad_trunk_out_BTD: Tensor) -> Tensor:
        """The gradient for the trunk: zero if it holds infinities, which a loss scaler expects."""
        if self._given is None and bool(self._gradient().any()):
            raise ConfigError(
                "the gradients of the last step were not dropped, so the client's would add up, "
                "and the trunk has dropped its own; call zero_grad before the next backward"
            )
        # The trunk refuses infinities. The stand-in reports them.
        if bool(grad_trunk_out_BTD.isfinite().all()):
            return grad_trunk_out_BTD
        self._is_finite = False
        return torch.zeros_like(grad_trunk_out_BTD)

    def after_backward(self) -> None:
        """Give the stand-in a gradient with the norm of the trunk's."""
        if self._is_dropped():
            raise ConfigError(
                "the gradients of an earlier backward were dropped between a forward and its "
                "backward, so the trunk would keep its share of them; call zero_grad before the "
                "forward"
            )
        if self._given is not None and not torch.equal(self._given, self._gradient()):
            raise ConfigError(
                "the gradients were changed between two backwards of one step, and the trunk's "
                "were not; scale or clip them once, after the last backward"
            )
        norm = math.sqrt(self._trunk.trunk_sq_norm) if self._is_finite else math.inf
        self._given = (_SHARES * norm).to(self._stand_in)
        self._stand_in.grad = self._given.clone()

    def stepped(self) -> None:
        """Forget the gradients, which the trunk has taken."""
        self._given, self._is_finite = None, True
        self._stand_in.grad = None

    def session_ended(self) -> None:
        """Forget the gradients, which the trunk has dropped."""
        self.stepped()

    def _gradient(self) -> Tensor:
        gradient = self._stand_in.grad
        return torch.zeros_like(self._stand_in) if gradient is None else gradient

    def _is_dropped(self) -> bool:
        """Whether the loop has dropped gradients that the trunk still holds."""
        if self._given is None:
            return False
        return self._stand_in.grad is None or bool(self._given.any() and not self._gradient().any())

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # The first argument is the optimizer itself.
        if any(each is not None for each in (*args[1:], kwargs.get("closure"))):
            raise ConfigError(
                "optimizer.step has a closure, which computes the gradients after the trunk's "
                "step; call backward before step, without a closure"
            )
        # A fused optimizer that skips a step with infinities is called nevertheless.
        skips = getattr(optimizer, "found_inf", None)
        if self._is_dropped() or (skips is not None and bool(skips)):
            return
        # A fused optimizer may also divide by the loss scale itself.
        scale = getattr(optimizer, "grad_scale", None)
        scale = 1.0 if scale is None else float(scale)
        own = self._own_gradients(optimizer)
        if self._given is None and not own:
            return
        if self._given is None:
            raise ConfigError(
                "optimizer.step was called without a backward through the trunk since its last "
                "step; call step once after the backwards of a step"
            )
        factor = self._factor() / scale
        client_sq_norm = squared_norm(own) / scale**2
        trunk_sq_norm = self._trunk.trunk_sq_norm * factor**2
        sq_norm = client_sq_norm + trunk_sq_norm
        if not self._is_finite or not math.isfinite(sq_norm):
            raise NonFinite(
                f"the gradients of step {self.steps} hold NaN or Inf; no weight has changed. Call "
                "zero_grad and go on with another batch, or lower the learning rate"
            )
        require_comparable_norms(trunk_sq_norm, client_sq_norm, self.steps)
        # The trunk first: if it refuses the step, the client has not changed yet.
        self._trunk.step(
            step=self.steps,
            num_tokens=1,
            client_sq_norm=client_sq_norm,
            loss_scale=1.0 / factor,
        )
        clipped = sq_norm if self._train.clip == "global" else client_sq_norm
        coefficient = clip_coefficient(clipped, self._train.clip_norm)
        if coefficient < 1.0:
            for gradient in own:
                gradient.mul_(coefficient)
        self.steps += 1
        self._has_stepped = True

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        # The loop drops it with the gradients of this step; the optimizer has not seen it.
        if self._given is None and self._own_gradients(optimizer):
            self._stand_in.grad = _SHARES.to(self._stand_in)

    def _own_gradients(self, optimizer: Any) -> list[Tensor]:
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        return [p.grad for p in parameters if p.grad is not None and p is not self._stand_in]

    def _factor(self) -> float:
        """The factor that the loop has put on all gradients since the last backward."""
        now = self._gradient()
        if self._given is None or torch.equal(now, self._given):
            return 1.0
        first, second = (now.double() / self._given.double()).tolist()
        if not math.isclose(first, second, rel_tol=1e-2):
            raise ConfigError(
                "the gradients were changed otherwise than by a common factor, such as by "
                "clip_grad_value_, and the trunk's cannot be; clip them with clip_grad_norm_"
            )
        if second > 1.0:
            raise ConfigError(
                f"the gradients were multiplied by {second:g} after the backward; multiply the "
                "loss instead"
            )
        return float(second)

    # --- state dicts --------------------------------------------------------------------------

    @property
    def stamp(self) -> Sequence[int]:
        """The trunk's present version, and the client's steps."""
        return self._trunk.version, self.steps

    def load_stamp(self, saved: Sequence[int]) -> None:
        """Continue from the step of the weights.

        Raises:
            CheckpointError: They were saved with another version of the trunk.
        """
        version = self._trunk.version
        way_out = (
            "Load the trunk's state of that version at the server first, or call remove() on the "
            "handle of follow() to mix the two on purpose. The Trainer loads earlier weights with "
            "load_best_model_at_end and resume_from_checkpoint"
        )
        if not saved and self._has_stepped:
            raise CheckpointError(
                f"these weights do not say with which version of the trunk they were saved, and "
                f"the trunk has since moved to version {version}. {way_out}"
            )
        if not saved:
            log.warning(
                "the loaded weights do not say with which version of the trunk they were saved; "
                "the trunk is at version %d and must be that one",
                version,
            )
            return
        saved_version, steps = saved
        if saved_version != version:
            raise CheckpointError(
                f"these weights were saved with version {saved_version} of the trunk, which is at "
                f"version {version} now. {way_out}"
            )
        self.steps = steps
