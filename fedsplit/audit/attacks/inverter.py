"""Text from smashed data by one linear map, fitted to public text.

Chen et al. 2024, "Unveiling the Vulnerability of Private Fine-Tuning in Split-Based Frameworks for
Large Language Models", CCS, arXiv 2409.00960, train a network in its place; ridge regression has
one closed form and no settings to choose.

Shapes: N rows, V vocabulary, D hidden width.
"""

import torch
from torch import Tensor

_RIDGE = 1e-3


def inverted(
    rows_ND: Tensor, public_ND: Tensor, tokens_N: Tensor, vocabulary: int, *, matched: bool = False
) -> Tensor:
    """Return the tokens that a linear map from public rows finds in rows.

    Args:
        rows_ND: The rows, in which the text is looked for.
        public_ND: The rows of public text at the bottom that the attacker knows.
        tokens_N: The tokens of the public text.
        vocabulary: The number of tokens.
        matched: Whether rows get the mean and the covariance of the public ones first, which helps
            an attacker who does not know the bottom.
    """
    x_ND = _whitened(public_ND, public_ND)
    # Of V columns that have a one where the token is theirs, the products are sums over rows.
    sums_VD = torch.zeros(vocabulary, x_ND.shape[1]).index_add_(0, tokens_N, x_ND)
    gram_DD = x_ND.T @ x_ND + _RIDGE * len(x_ND) * torch.eye(x_ND.shape[1])
    weights_DV: Tensor = torch.linalg.solve(gram_DD, sums_VD.T)
    shares_V = torch.bincount(tokens_N, minlength=vocabulary) / len(tokens_N)
    like_ND = rows_ND if matched else public_ND
    scores_NV: Tensor = _whitened(rows_ND, like_ND) @ weights_DV + shares_V
    return scores_NV.argmax(-1)


def _whitened(rows_ND: Tensor, like_ND: Tensor) -> Tensor:
    """Return rows after the map that gives others the mean zero and the unit covariance."""
    rest_ND = like_ND - like_ND.mean(0)
    values_D, vectors_DD = torch.linalg.eigh(rest_ND.T @ rest_ND / len(rest_ND))
    scale_D = (values_D.clamp_min(0.0) + _RIDGE * values_D.mean()).rsqrt()
    whitened_ND: Tensor = (rows_ND - like_ND.mean(0)) @ (vectors_DD * scale_D) @ vectors_DD.T
    return whitened_ND
