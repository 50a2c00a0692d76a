"""The speed of generation with drafts over a slow link, where several tokens share a round trip.

Shapes: B sequences, T tokens, D hidden width. The text decides how many drafts are right, so the
model is altered to repeat a circle of tokens. In a short circle every draft is right. In a circle
of the whole vocabulary no token is repeated, so prompt lookup finds no draft.
"""

from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedsplit.wire.messages import GenerateRequest
from simulations.bench.models import text_of
from simulations.bench.report import in_turns
from simulations.bench.scene import Scene

NUM_DRAFTS = 10
_LOUDER = 16
"""Factor of the embeddings, with which the last token outweighs the output of random blocks."""


def with_latency(scene: Scene) -> None:
    """Measure drafts against plain decoding at each latency; this alters the client's weights."""
    size = scene.size
    small = replace(size.shape, blocks=2).whole()
    for model in (scene.client, small):
        _embedding(model).mul_(_LOUDER)
    for circle, latencies_s in (
        (size.shape.vocabulary, size.latencies_s[-1:]),
        (size.circle, size.latencies_s),
    ):
        for model in (scene.client, small):
            _write_in_circles(model, circle)
        for latency_s in latencies_s:
            speed_up = _speed_up(scene, small, circle, latency_s)
    scene.report.figures["draft_speedup_100ms"] = speed_up


def _write_in_circles(model: PreTrainedModel, circle: int) -> None:
    """Make greedy decoding repeat a circle of `circle` tokens.

    The head's row of each token becomes the embedding of the token before it in the circle, and the
    head is no longer tied. The blocks compute as usual, but do not change the largest logit.
    """
    embedding = _embedding(model)
    before = torch.arange(len(embedding))
    whole = len(embedding) // circle * circle
    before[:whole] = before[:whole].view(-1, circle).roll(1, dims=1).flatten()
    head = nn.Linear(embedding.shape[1], embedding.shape[0], bias=False)
    head.weight = nn.Parameter(embedding[before])
    model.set_output_embeddings(head)


def _embedding(model: PreTrainedModel) -> Tensor:
    weight: Any = model.get_input_embeddings().weight
    embedding: Tensor = weight.detach()
    return embedding


def _speed_up(scene: Scene, small: PreTrainedModel, circle: int, latency_s: float) -> float:
    """Return the speed of prompt lookup over that of plain decoding; compare their tokens."""
    size, report = scene.size, scene.report
    scene.far(latency_s)
    ids_BT = torch.arange(2 * size.circle).remainder(circle)[None]
    texts: dict[str, Tensor] = {}
    trips: dict[str, int] = {}

    def speed(name: str, **drafts: Any) -> float:
        scene.link.forget()
        began = perf_counter()
        texts[name] = text_of(scene.client, ids_BT, size.new_tokens, **drafts)
        seconds = perf_counter() - began
        trips[name] = len(scene.link.of(GenerateRequest))
        return size.new_tokens / seconds

    measures = {
        "plain": lambda: speed("plain"),
        "lookup": lambda: speed("lookup", prompt_lookup_num_tokens=NUM_DRAFTS),
        "small_model": lambda: speed("small_model", assistant_model=small),
    }
    found = in_turns(size.latency_turns, measures, warm_up=False)
    same = all(torch.equal(text_BT, texts["plain"]) for text_BT in texts.values())
    report.figures["tokens_identical"] = same and report.figures["tokens_identical"]
    of: dict[str, Any] = {"circle": circle, "latency_s": latency_s}
    for name, speeds in found.items():
        report.spread("tokens_per_s", speeds, by=name, **of, round_trips=trips[name])
    report.ratio("small_model / plain", found["small_model"], found["plain"], **of)
    return report.ratio("lookup / plain", found["lookup"], found["plain"], **of, identical=same)
