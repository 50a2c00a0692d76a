"""Text from smashed data, by search over the tokens: the bottom is an injective map of its text.

Without noise this is the exact search of Nikolaou et al. 2025, "Language Models are Injective and
Hence Invertible", arXiv 2510.15511. With noise it is a beam search for the text of the greatest
posterior probability, with the likelihood of the noise and a language model as the prior.

Shapes: B sequences, T tokens, V vocabulary, D hidden width, K beams, N = B K.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

Rows = Callable[[Tensor], Tensor]
"""What becomes of rows before the noise is added, such as clipping."""

_AT_ONCE = 8192
"""The number of candidates that are computed together."""

_SAMPLE = 32
"""The number of tokens that tell how the rows of all tokens differ between two texts."""

_EXACT = 1e-3
"""The standard deviation that stands for no noise, as a share of the rows' root mean square."""


@torch.no_grad()
def search(
    rows_BTD: Tensor,
    *,
    ends: PreTrainedModel,
    bottom: int,
    sigma: float = 0.0,
    expected: Rows = torch.clone,
    prior: PreTrainedModel | None = None,
    beams: int = 1,
    shortlist: int = 0,
) -> Tensor:
    """Return the token ids [B, T] that explain rows best.

    Args:
        rows_BTD: The rows as the server received them; a zero is taken for a coordinate that was
            not sent.
        ends: The client's blocks, as `fedsplit.model.trunkless` makes them.
        bottom: The number of its blocks below the cut.
        sigma: The standard deviation of the noise on each coordinate.
        expected: What the rows of a candidate become before the noise.
        prior: A language model of such text.
        beams: The number of texts that are kept.
        shortlist: The number of tokens of which the rows are computed at a place, for large
            vocabularies; 0 for all. They are those with the greatest score by their rows elsewhere.
    """
    B, T, _ = rows_BTD.shape
    sigma = max(sigma, _EXACT * float(rows_BTD.square().mean().sqrt()))
    reader, writer = _Reader(ends.base_model, bottom), _Prior(prior)
    score_BK = torch.full((B, beams), float("-inf"))
    score_BK[:, 0] = 0.0  # all beams are the same at the beginning
    ids_BKT = torch.zeros((B, beams, 0), dtype=torch.long)
    vocabulary = len(cast(nn.Embedding, ends.get_input_embeddings()).weight)
    every_NV = torch.arange(vocabulary).expand(B * beams, -1)
    step = max(1, _AT_ONCE // (B * beams))
    for place in range(T):
        target_ND = rows_BTD[:, place].repeat_interleave(beams, 0)
        found_NV = writer.log_shares(vocabulary, B * beams)
        tried_NC = every_NV
        if shortlist and place:
            pieces = reader.rows_elsewhere(vocabulary, B * beams, step)
            guesses = [_log_likelihood(expected(piece), target_ND, sigma) for piece in pieces]
            guess_NV = found_NV + torch.cat(guesses, 1)
            tried_NC = guess_NV.topk(min(shortlist, vocabulary), dim=1).indices
        likelihood_NV = torch.full_like(found_NV, float("-inf"))
        for some_NC in tried_NC.split(step, dim=1):
            rows_NCD = expected(reader.rows(some_NC))
            likelihood_NV.scatter_(1, some_NC, _log_likelihood(rows_NCD, target_ND, sigma))
        found_NV = found_NV + likelihood_NV
        total_BKV = score_BK[:, :, None] + found_NV.view(B, beams, vocabulary)
        score_BK, best_BK = total_BKV.flatten(1).topk(beams, dim=1)
        beam_BK, token_BK = best_BK // vocabulary, best_BK % vocabulary
        kept = beam_BK[:, :, None].expand(-1, -1, place)
        ids_BKT = torch.cat((ids_BKT.gather(1, kept), token_BK[:, :, None]), 2)
        parents_N = (torch.arange(B)[:, None] * beams + beam_BK).flatten()
        for model in (reader, writer):
            model.advance(parents_N, token_BK.flatten()[:, None])
    return ids_BKT[:, 0]


def _log_likelihood(rows_NCD: Tensor, target_ND: Tensor, sigma: float) -> Tensor:
    distance_NCD = (rows_NCD - target_ND[:, None]) * (target_ND != 0)[:, None]
    return -distance_NCD.square().sum(-1) / (2 * sigma**2)


class _Cached:
    """A model with a cache of the texts so far, one for each beam."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Cache | None = None

    def advance(self, parents_N: Tensor, tokens_N1: Tensor) -> Any:
        """Continue the texts of these beams with a token each; return the model's output."""
        if self._model is None:
            return None
        if self._cache is None:
            self._cache = DynamicCache(config=self._model.config)
        else:
            self._cache.batch_select_indices(parents_N)
        return self._call(tokens_N1, self._cache)

    def _call(self, ids_N1: Tensor, cache: Cache) -> Any:
        return self._model(
            input_ids=ids_N1, past_key_values=cache, use_cache=True, output_hidden_states=True
        )


class _Reader(_Cached):
    """The bottom, and the rows that its next token would give."""

    def __init__(self, model: Any, bottom: int) -> None:
        super().__init__(model)
        self._bottom = bottom
        self._elsewhere_VD = torch.empty(0)

    def rows(self, candidates_NC: Tensor) -> Tensor:
        """Return the rows [N, C, D] of candidates after each of the first N texts."""
        N, C = candidates_NC.shape
        if self._cache is None:
            # At the beginning, all texts are the same and have the same candidates.
            cache: Cache = DynamicCache(config=self._model.config)
            return self._rows(candidates_NC[0, :, None], cache).expand(N, -1, -1)
        cache = copy.deepcopy(self._cache)
        cache.batch_select_indices(torch.arange(N))
        cache.batch_repeat_interleave(C)
        return self._rows(candidates_NC.flatten()[:, None], cache).view(N, C, -1)

    def rows_elsewhere(self, vocabulary: int, beams: int, step: int) -> Iterator[Tensor]:
        """Yield approximate rows of all tokens [N, some of V, D], `step` tokens at a time.

        They are the rows after the first token of the first text, moved by the mean difference of
        some tokens' rows.
        """
        if not len(self._elsewhere_VD):
            pieces = torch.arange(vocabulary)[None].split(_AT_ONCE, dim=1)
            self._elsewhere_VD = torch.cat([self.rows(piece)[0] for piece in pieces])
        some_S = torch.linspace(0, vocabulary - 1, _SAMPLE).long()
        there_SD = self._elsewhere_VD[some_S]
        move_N1D = (self.rows(some_S.expand(beams, -1)) - there_SD).mean(1, keepdim=True)
        for rows_CD in self._elsewhere_VD.split(step):
            yield rows_CD + move_N1D

    def _rows(self, ids_N1: Tensor, cache: Cache) -> Tensor:
        rows_ND: Tensor = self._call(ids_N1, cache).hidden_states[self._bottom][:, -1]
        return rows_ND


class _Prior(_Cached):
    """A language model, and the logarithms of its shares of the next token."""

    def __init__(self, model: PreTrainedModel | None) -> None:
        super().__init__(model)
        self._log_shares_NV: Tensor | None = None

    def log_shares(self, vocabulary: int, beams: int) -> Tensor:
        """Return them [N, V]; zeros at the beginning of a text, and without a model."""
        if self._log_shares_NV is None:
            return torch.zeros(beams, vocabulary)
        return self._log_shares_NV[:, :vocabulary].clone()

    def advance(self, parents_N: Tensor, tokens_N1: Tensor) -> Any:
        """Continue the texts."""
        out = super().advance(parents_N, tokens_N1)
        if out is not None:
            self._log_shares_NV = out.logits[:, -1].float().log_softmax(-1)
        return out
