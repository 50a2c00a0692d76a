"""The loss of predictions where the family's own forward does not compute it.

Shapes: B sequences, T tokens, C classes (of a language model its vocabulary).
"""

from torch import Tensor
from torch.nn import functional

from fedsplit.data.batches import IGNORED


def prediction_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy in nats per prediction, as Hugging Face models and their Trainer do.

    Smoothing is from Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer
    Vision", arXiv 1512.00567: the target is the label with probability `1 - smoothing` and
    anything with the rest.

    Args:
        logits: [B, T, C], where token t predicts label t + 1, or [B, C].
        labels: [B, T], ignored at -100, or [B].
        smoothing: In [0, 1).
    """
    if labels.ndim == 2:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return functional.cross_entropy(
        logits.flatten(0, -2).float(),
        labels.flatten(),
        ignore_index=IGNORED,
        label_smoothing=smoothing,
    )
