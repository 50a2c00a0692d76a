"""Drafts that a client could make with weights: of a small model, and of its own bottom and top.

Shapes: B sequences, T tokens, N pairs, D hidden width, F features, V vocabulary. For its drafts,
the client needs the output that the trunk would give. A ridge regression estimates it from what
the client has at every token: the bottom's output there, and the outputs of trunk and top at the
token before it (as in EAGLE, Li et al. 2024, arXiv 2401.15077). It is fitted on texts that the
model samples by itself. The small model is that of a few of the model's blocks. Texts are known
beforehand, so all drafts are counted without a trunk.
"""

from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fedsplit.client.drafts import Memory
from simulations.bench.models import text_of
from simulations.bench.ordinary import NUM_DRAFTS, prompts_of
from simulations.bench.report import Report
from simulations.bench.scene import SIZES, Size

_RIDGE = 0.1
"""The weight of the penalty, relative to the mean square of a feature."""

_FEATURES = 7
"""The random features of the regression, as a multiple of the hidden width."""

_KEPT = (0, -1), (0, 1, 2, -3, -2, -1), (*range(8), *range(-7, 0))
"""The blocks of the small models, from the first and from the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text with the hidden states [T, D] at its tokens: the outputs of bottom, trunk and top."""

    prompt: int
    ids_T: Tensor
    bottom_TD: Tensor
    trunk_TD: Tensor
    top_TD: Tensor


def measure(size: str) -> Report:
    """Fill a report with the tokens gained per round trip; `size` is `full` or `toy`."""
    report, sizes = Report(), SIZES[size]
    with TemporaryDirectory() as folder, torch.no_grad():
        prompts = [ids_BT for _, ids_BT in prompts_of(sizes, Path(folder))]
        whole: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
        texts = [
            _text(whole, text_of(whole, ids_BT, sizes.new_tokens)[0], ids_BT.shape[1])
            for ids_BT in prompts
        ]
        own = [_text(whole, ids_T, 1) for ids_T in _own_texts(whole, prompts, sizes)]
        report.figures["lookup_gain"] = _gain(texts, [])
        for kept in _KEPT:
            right = _right_of_small(whole, kept, texts)
            report.row("small_model", blocks=len(kept), gain=_gain(texts, right, lookup=False))
        report.figures["small_model_gain"] = _gain(texts, right, lookup=False)
        head_VD = whole.get_output_embeddings().weight
        for part in (own[: len(own) // 4], own):
            bridge = Bridge(part)
            right = [bridge.right(text, head_VD) for text in texts]
            alone, both = _gain(texts, right, lookup=False), _gain(texts, right)
            pairs = sum(len(text.ids_T) for text in part)
            report.row("bridge", pairs=pairs, gain=alone, gain_with_lookup=both)
        report.figures |= {"bridge_gain": alone, "lookup_and_bridge_gain": both}
    return report


class Bridge:
    """A regression from the client's hidden states to the outputs of trunk and top.

    Args:
        texts: The texts that it is fitted on.
    """

    def __init__(self, texts: list[Text]) -> None:
        D = texts[0].bottom_TD.shape[1]
        chance = torch.Generator().manual_seed(0)
        self._random_DF = torch.randn(3 * D, _FEATURES * D, generator=chance) / (3 * D) ** 0.5
        width = (3 + _FEATURES) * D
        moments_FF, products_FD = torch.zeros(width, width), torch.zeros(width, 2 * D)
        for text in texts:
            features_TF = self._features(text.bottom_TD[1:], text.trunk_TD[:-1], text.top_TD[:-1])
            moments_FF += features_TF.T @ features_TF
            products_FD += features_TF.T @ torch.cat((text.trunk_TD, text.top_TD), dim=1)[1:]
        moments_FF.diagonal().add_(_RIDGE * moments_FF.diagonal().mean())
        self._weight_FD = torch.linalg.solve(moments_FF, products_FD)

    def right(self, text: Text, head_VD: Tensor) -> list[int]:
        """Return how many drafts are right after each number of tokens of a text."""
        length = len(text.ids_T)
        right_T = torch.zeros(length, dtype=torch.long)
        # The first pass is that of the prompt, before which the trunk has said nothing.
        starts_N = torch.arange(text.prompt + 1, length)
        trunk_ND, top_ND = text.trunk_TD[starts_N - 2], text.top_TD[starts_N - 2]
        for draft in range(NUM_DRAFTS):
            # A draft counts only after right ones, so the bottom's output is that of the text.
            at_N = (starts_N + draft).clamp(max=length - 1)
            features_NF = self._features(text.bottom_TD[at_N - 1], trunk_ND, top_ND)
            trunk_ND, top_ND = (features_NF @ self._weight_FD).chunk(2, dim=1)
            is_right_N = (top_ND @ head_VD.T).argmax(dim=1) == text.ids_T[at_N]
            right_T[starts_N] += (
                is_right_N & (right_T[starts_N] == draft) & (starts_N + draft < length)
            )
        return right_T.tolist()

    def _features(self, bottom_ND: Tensor, trunk_ND: Tensor, top_ND: Tensor) -> Tensor:
        alike = [_of_unit_square(each) for each in (bottom_ND, trunk_ND, top_ND)]
        known_NF = torch.cat(alike, dim=1)
        return torch.cat((known_NF, (known_NF @ self._random_DF).relu()), dim=1)


def _of_unit_square(hidden_ND: Tensor) -> Tensor:
    return hidden_ND * hidden_ND.square().mean(dim=1, keepdim=True).clamp_min(1e-12).rsqrt()


def _text(whole: Any, ids_T: Tensor, prompt: int) -> Text:
    states = whole(ids_T[None], output_hidden_states=True, use_cache=False).hidden_states
    return Text(
        prompt=prompt,
        ids_T=ids_T,
        bottom_TD=states[1][0],
        trunk_TD=states[-2][0],
        top_TD=states[-1][0],
    )


def _own_texts(whole: Any, prompts: list[Tensor], size: Size) -> Tensor:
    """Return texts [B, T] that the model samples after what all prompts begin with."""
    texts = zip(*(ids_BT[0].tolist() for ids_BT in prompts), strict=False)
    begin = [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, texts)] or [1]
    torch.manual_seed(size.shape.seed)
    # A question's end is not that of the text.
    whole.generation_config.eos_token_id = None
    begin_BT = torch.tensor(begin).expand(size.own_texts, -1)
    return text_of(whole, begin_BT, 3 * size.new_tokens, do_sample=True)


def _right_of_small(whole: Any, kept: tuple[int, ...], texts: list[Text]) -> list[list[int]]:
    """Return how many drafts of a model of some blocks are right, after each number of tokens."""
    modules = whole.named_modules()
    name, blocks = next((name, each) for name, each in modules if isinstance(each, nn.ModuleList))
    # A small model may have fewer blocks than are kept.
    indices = sorted({i % len(blocks) for i in kept})
    whole.set_submodule(name, nn.ModuleList([blocks[i] for i in indices]))
    found = []
    for text in texts:
        logits_TV = whole(text.ids_T[None], use_cache=False).logits[0]
        is_right = [True, *(logits_TV[:-1].argmax(dim=1) == text.ids_T[1:]).tolist()]
        right = [
            sum(1 for _ in takewhile(bool, is_right[start : start + NUM_DRAFTS]))
            for start in range(len(is_right))
        ]
        found.append(right)
    whole.set_submodule(name, blocks)
    return found


def _gain(texts: list[Text], right: list[list[int]], *, lookup: bool = True) -> float:
    """Return the tokens gained per round trip with these drafts.

    Args:
        texts: The texts.
        right: How many drafts are right after each number of tokens of each text; empty for none.
        lookup: Whether a memory of the texts makes the drafts where it knows two tokens or more. If
            there are no others, it makes all.
    """
    tokens = round_trips = 0
    memory = Memory()
    for number, text in enumerate(texts):
        ids, at, known = text.ids_T.tolist(), text.prompt, 0
        while at < len(ids):
            memory.add(ids[:at], known, is_prompt=not known)
            known = at
            if not right or (lookup and memory.guess(ids[:at])[1] > 1):
                gained = _remembered(memory, ids, at)
            else:
                gained = right[number][at]
            at += gained + 1
            round_trips += 1
        tokens += len(ids) - text.prompt
    return tokens / round_trips - 1


def _remembered(memory: Memory, ids: list[int], at: int) -> int:
    """Return how many drafts of a memory are right after `at` tokens."""
    right = 0
    while right < NUM_DRAFTS and at + right < len(ids):
        token, n = memory.guess(ids[: at + right])
        if not n or token != ids[at + right]:
            break
        right += 1
    return right
