"""The loss scale: the factor on losses while client or trunk computes in float16."""

from dataclasses import dataclass

# The growth interval of torch.amp.GradScaler.
_GROWS_AFTER = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScale:
    """A factor large enough that few gradients vanish in float16, and small enough for no overflow.

    Micikevicius et al. 2018, "Mixed Precision Training", arXiv 1710.03740. The scale grows and
    falls as that of `torch.amp.GradScaler`, but not below 1. `GradScaler` itself cannot be used: it
    looks for infinities in the gradients of an optimizer in its own process, and the trunk's are
    in another.

    Args:
        value: A power of two, so that scaling is exact.
        good_steps: The number of steps since the value has changed.
    """

    value: float = 65536.0
    good_steps: int = 0

    @property
    def can_fall(self) -> bool:
        """Whether a smaller scale is possible."""
        return self.value > 1.0

    def after_step(self) -> "LossScale":
        """The scale after a step that was taken; it doubles after 2000 of them."""
        if self.good_steps + 1 < _GROWS_AFTER:
            return LossScale(value=self.value, good_steps=self.good_steps + 1)
        return LossScale(value=2.0 * self.value)

    def after_overflow(self) -> "LossScale":
        """The scale after a step with NaN or Inf: half as large, and at least 1."""
        return LossScale(value=max(1.0, 0.5 * self.value))


INITIAL_SCALE = LossScale()
