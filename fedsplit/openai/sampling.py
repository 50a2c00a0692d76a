"""The choice of tokens: a request's options as logits processors of transformers.

Shapes: B sequences, T tokens, V vocabulary.
"""

import secrets
from collections.abc import Mapping

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fedsplit.openai.refusals import Refusal
from fedsplit.openai.requests import Sampling

GREEDY = {"do_sample": False, "num_beams": 1}
"""The options with which `generate` takes the token of the largest score."""


_DIGITS = 20
"""The longest number of a token that is read."""

_COLDEST = 1e-5
"""Below this temperature, the most likely token is taken: scores over it may be infinite."""


class Probabilities(LogitsProcessor):
    """Keeps the model's own log probabilities of the next tokens, and changes nothing."""

    def __init__(self) -> None:
        self.logprobs_BV = torch.empty(0, 0)

    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> FloatTensor:
        """Keep the log probabilities of these scores."""
        self.logprobs_BV = scores.log_softmax(dim=-1)
        return scores


class TokenBias(LogitsProcessor):
    """Adds a number to the scores of some tokens: `logit_bias`."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._ids = list(bias)
        self._values = list(bias.values())

    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> FloatTensor:
        """Add the numbers."""
        scores[:, self._ids] += torch.tensor(self._values, device=scores.device)
        return scores


class RepetitionPenalties(LogitsProcessor):
    """Lowers the scores of tokens that the answer has already, as OpenAI's reference defines it.

    A token that the answer has c times loses `c * frequency + (c > 0) * presence`.

    Args:
        prompt: The number of tokens before the answer, which do not count.
        frequency: The penalty for each occurrence.
        presence: The penalty for any number of occurrences.
    """

    def __init__(self, prompt: int, frequency: float, presence: float) -> None:
        self._prompt = prompt
        self._frequency = frequency
        self._presence = presence

    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> FloatTensor:
        """Subtract the penalties."""
        answer_BT = input_ids[:, self._prompt :]
        count_BV = torch.zeros_like(scores)
        count_BV.scatter_add_(1, answer_BT, torch.ones_like(answer_BT, dtype=scores.dtype))
        penalty_BV = count_BV * self._frequency + (count_BV > 0) * self._presence
        return scores.sub_(penalty_BV)  # type: ignore[return-value]  # it is of the same class


class GumbelNoise(LogitsProcessor):
    """Adds noise of Gumbel's distribution, after which the largest score is a sample.

    So `generate` is greedy and does not draw (Maddison et al. 2014, "A* sampling"). Its own
    sampling draws from the generator of the process, which all requests share: a seed would not
    decide a text, because requests that run meanwhile draw too. This generator is the request's.

    Args:
        seed: The seed of the noise.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> Tensor:
        """Add noise; tokens without probability stay without it."""
        # On the CPU, so that a seed gives the same text on every device.
        wait_BV = torch.empty(scores.shape).exponential_(generator=self._generator)
        smallest = torch.finfo(wait_BV.dtype).tiny
        return scores - wait_BV.clamp_min(smallest).log().to(scores.device)


def processors(
    request: Sampling, config: GenerationConfig, *, prompt: int, vocabulary: int
) -> tuple[LogitsProcessorList, Probabilities]:
    """Return the processors of a request in their order, and the one that keeps probabilities.

    Where the request leaves temperature and top_p open, those of the model's own config count if it
    samples by default; otherwise the temperature is 1.

    Args:
        request: The request.
        config: The model's generation config.
        prompt: The number of tokens of the prompt.
        vocabulary: The number of the model's tokens.

    Raises:
        Refusal: `logit_bias` names a token that the model does not have.
    """
    kept = Probabilities()
    chain: list[LogitsProcessor] = [kept] if request.num_logprobs >= 0 else []
    if request.logit_bias:
        chain.append(TokenBias(_bias(request.logit_bias, vocabulary)))
    frequency, presence = request.frequency_penalty or 0.0, request.presence_penalty or 0.0
    if frequency or presence:
        chain.append(RepetitionPenalties(prompt, frequency, presence))
    own = config if config.do_sample else GenerationConfig()
    temperature = _first(request.temperature, own.temperature, 1.0)
    if temperature >= _COLDEST:
        chain += _warpers(temperature, _first(request.top_p, own.top_p, 1.0), own.top_k or 0)
        # OpenAI's seeds are integers of any sign, and torch takes 64 bits.
        seed = secrets.randbits(63) if request.seed is None else request.seed % (1 << 64)
        chain.append(GumbelNoise(seed))
    return LogitsProcessorList(chain), kept


def _warpers(temperature: float, top_p: float, top_k: int) -> list[LogitsProcessor]:
    """Temperature before top-k and top-p, as in `generate`."""
    warpers: list[LogitsProcessor] = []
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers


def _bias(bias: Mapping[str, float], vocabulary: int) -> dict[int, float]:
    for token in bias:
        # Python reads no number of thousands of digits.
        if not token.isdecimal() or len(token) > _DIGITS or int(token) >= vocabulary:
            raise Refusal(
                400,
                f"logit_bias names the token {token[:_DIGITS]!r}; the model has the tokens 0 to "
                f"{vocabulary - 1}",
                code="invalid_value",
                param="logit_bias",
            )
    return {int(token): value for token, value in bias.items()}


def _first(*values: float | None) -> float:
    """The first value that is set; the last one is."""
    return next(value for value in values if value is not None)
