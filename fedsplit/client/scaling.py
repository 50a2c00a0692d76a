"""The factor that losses are multiplied by while a side of the cut computes in float16."""

from dataclasses import dataclass

_GROWS_AFTER = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScale:
    """So large that few gradients vanish in float16, and so small that none overflows.

    Micikevicius et al. 2018, "Mixed Precision Training", arXiv 1710.03740. It moves as that of
    `torch.amp.GradScaler`, which itself looks for infinities in the gradients of an optimizer in
    its own process, and cannot be told of those at the trunk. But it does not fall below 1.

    Args:
        value: A power of two, so that no digit is lost.
        good_steps: Steps since it has changed.
    """

    value: float = 65536.0
    good_steps: int = 0

    @property
    def can_fall(self) -> bool:
        """Whether there is hope that a smaller one helps."""
        return self.value > 1.0

    def after_step(self) -> "LossScale":
        """The scale after a step that was taken: twice as large after 2000 of them."""
        if self.good_steps + 1 < _GROWS_AFTER:
            return LossScale(value=self.value, good_steps=self.good_steps + 1)
        return LossScale(value=2.0 * self.value)

    def after_overflow(self) -> "LossScale":
        """The scale after a step that was not finite: half as large."""
        return LossScale(value=max(1.0, 0.5 * self.value))


INITIAL_SCALE = LossScale()
