"""Labels from the gradient of the trunk's output; in language modeling they are the text.

Li et al. 2022, "Label Leakage and Protection in Two-party Split Learning", ICLR, arXiv 2102.08504,
read two classes from its norm and direction. Here the server knows the top, so the gradient is a
known linear function of the labels.

Shapes: B sequences, T tokens, V vocabulary, D hidden width.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

Gradient = Callable[[Tensor], Tensor]
"""The gradient [B, T, D] of the trunk's output for labels [B, T]."""

_EXPLAINED = 0.05
"""The share of a gradient's square that right labels may leave, while others are wrong."""

_LEAST_SPREAD = 0.02
"""What stands for no noise: the cosines of other labels differ by more."""


def label_scores(grad_BTD: Tensor, head_VD: Tensor) -> Tensor:
    """Return the cosines [B, T, V] of the head's rows with the direction of descent.

    The gradient of the loss points away from the row of the label, and only a little towards those
    of the tokens that the model expected.

    Args:
        grad_BTD: The gradient of the trunk's output as the server received it.
        head_VD: The weights of the head.
    """
    scores_BTV: Tensor = -normalize(grad_BTD, dim=-1) @ normalize(head_VD, dim=-1).T
    return scores_BTV


def labels_by_refinement(
    grad_BTD: Tensor, head_VD: Tensor, gradient: Gradient, candidates: int = 1024
) -> Tensor:
    """Return the labels [B, T] that explain the gradient best, of those of the best scores.

    Args:
        grad_BTD: The gradient of the trunk's output as the server received it.
        head_VD: The weights of the head.
        gradient: The gradient for labels, which a server that knows the top computes.
        candidates: The number of labels that are tried at each place.
    """
    candidates = min(candidates, len(head_VD))
    tried_BTC = label_scores(grad_BTD, head_VD).topk(candidates).indices
    labels_BT, least_BT = tried_BTC[..., 0], torch.full(grad_BTD.shape[:2], float("inf"))
    for number in range(candidates):
        # At places that are explained already, a trial would disturb the others.
        is_open_BT = least_BT > _EXPLAINED * grad_BTD.square().sum(-1)
        if not is_open_BT.any():
            break
        trial_BT = torch.where(is_open_BT, tried_BTC[..., number], labels_BT)
        rest_BT = (grad_BTD - gradient(trial_BT)).square().sum(-1)
        is_better_BT = is_open_BT & (rest_BT < least_BT)
        labels_BT = torch.where(is_better_BT, trial_BT, labels_BT)
        least_BT = torch.where(is_better_BT, rest_BT, least_BT)
    return labels_BT


def labels_with_prior(
    grad_BTD: Tensor, head_VD: Tensor, log_shares_BTV: Tensor, sigma: float
) -> Tensor:
    """Return the labels [B, T] of the greatest posterior probability under noise.

    Args:
        grad_BTD: The gradient of the trunk's output as the server received it.
        head_VD: The weights of the head.
        log_shares_BTV: What a language model says of the labels.
        sigma: The standard deviation of the noise on each coordinate.
    """
    # The noise moves a score, which is a cosine, by its size over that of the gradient.
    spread_BT1 = (sigma / grad_BTD.norm(dim=-1, keepdim=True)).clamp_min(_LEAST_SPREAD)
    scores_BTV: Tensor = label_scores(grad_BTD, head_VD) / spread_BT1 + log_shares_BTV
    return scores_BTV.argmax(-1)
