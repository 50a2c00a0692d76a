"""Error feedback: what a codec left out of a gradient is added to the next one.

Seide et al. 2014, "1-Bit Stochastic Gradient Descent", Interspeech; Karimireddy et al. 2019, "Error
Feedback Fixes SignSGD and other Gradient Compression Schemes", arXiv 1901.09847. There the same
parameters have a gradient in every step; here the next gradient is that of other examples, so only
what examples have in common at a position is made good.
"""

from torch import Tensor

from fedsplit.wire.codec import as_received


class Feedback:
    """One sender's gradients in one direction, over the steps.

    A step may be repeated, so what it leaves out counts only once it is `taken`.

    Args:
        codec: How they travel.
        residue: What was left out of the last one.
    """

    def __init__(self, codec: str, residue: Tensor | None = None) -> None:
        self.residue = residue
        self._codec = codec
        self._next = residue

    def compensate(self, gradient_BTD: Tensor) -> Tensor:
        """What to send in place of a gradient; one of another shape is sent as it is."""
        if self._next is not None and self._next.shape == gradient_BTD.shape:
            gradient_BTD = gradient_BTD + self._next.to(gradient_BTD)
        self._next = gradient_BTD.detach().cpu() - as_received(gradient_BTD, self._codec)
        return gradient_BTD

    def taken(self) -> None:
        """Keep what was left out: the step it was for has been taken."""
        self.residue = self._next

    def dropped(self) -> None:
        """Forget what was left out since the last step that was taken."""
        self._next = self.residue
