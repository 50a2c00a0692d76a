"""The words of a round from the change of the client weights.

Melis et al. 2019, "Exploiting Unintended Feature Leakage in Collaborative Learning", IEEE S&P,
arXiv 1805.04049, section 4.1: an embedding changes at the words of a batch alone.

Shapes: V vocabulary, D hidden width.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def word_scores(change_VD: Tensor, *, is_tied: bool) -> Tensor:
    """Return scores [V], which are higher for the tokens that a client trained on.

    Args:
        change_VD: The change of the embedding's rows over the client's steps.
        is_tied: Whether the head has the same weights. Then every row changes, by the probability
            of its token, and those of other directions than most are the rows of the text.
    """
    if not is_tied:
        norms_V: Tensor = change_VD.norm(dim=-1)
        return norms_V
    rows_VD = normalize(change_VD, dim=-1)
    scores_V: Tensor = -rows_VD @ normalize(rows_VD.mean(0), dim=-1)
    return scores_V


def words_found(scores_V: Tensor, tokens_N: Tensor) -> float:
    """Return the share of the words of a text that have the highest scores, of as many.

    Args:
        scores_V: The scores.
        tokens_N: The tokens of the text.
    """
    used = torch.unique(tokens_N)
    best = scores_V.topk(len(used)).indices
    return float(torch.isin(best, used).float().mean())
