"""Draft tokens on ordinary text, with SmolLM2-135M-Instruct: the tokens gained by a round trip.

Shapes: B sequences (always one), T tokens. The prompts are fixed, of six kinds that people ask for.
A gain is the number of tokens for each round trip, without the one that every round trip brings.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsplit.data import load_tokenizer
from fedsplit.model import connect
from fedsplit.serve import Reached, Served, hosted, reach
from fedsplit.serve.template import conversation_text
from fedsplit.spec import RunSpec, SplitSpec, WireSpec
from fedsplit.wire.messages import GenerateRequest
from simulations.bench.links import DelayedLink, WatchedLink
from simulations.bench.models import text_of
from simulations.bench.processes import Answers, process
from simulations.bench.report import Report
from simulations.bench.scene import Size
from simulations.smollm2 import save_smollm2

LATENCY_S = 0.08
NUM_DRAFTS = 10

_TIDES = (
    "Tides are the rise and fall of the level of the sea. They are caused by the gravity of the "
    "moon and of the sun, and by the rotation of the earth. Most coasts see two high tides and two "
    "low tides each day. The difference between high and low water is largest near new moon and "
    "full moon, when sun and moon pull in the same line."
)
_MEETING = (
    "The meeting on Thursday is moved to Friday at ten, because the large room is being painted. "
    "Please bring the figures of the last quarter. Anna will show the new plan for the warehouse, "
    "and we decide about the two open positions. If you cannot come, send your comments to Peter "
    "by Wednesday."
)
_MAIL = (
    "Send me the report today. I have waited for two weeks and nobody has answered my mails. If it "
    "is not here by five, I will talk to your boss."
)
_PLANTS = (
    "Photosynthesis is the process by which plants convert light energy into chemical energy, "
    "which is stored in carbohydrates that are synthesized from carbon dioxide and water."
)
_LIGHTHOUSE = (
    "The old lighthouse had been dark for thirty years. On the first night of winter, Marta saw a "
    "light in its window."
)
_COOKING = (
    "Begin with simple meals that need few ingredients. Learn to boil pasta, to fry an egg and to "
    "roast vegetables. Taste often, and write down what you liked."
)
_CANBERRA = "The capital of Australia is Canberra. It lies between Sydney and Melbourne."

PROMPTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("explain", ("Explain how a refrigerator keeps food cold.",)),
    ("explain", ("Why do leaves change their color in autumn?",)),
    ("summarize", (f"Summarize this paragraph in two sentences.\n\n{_TIDES}",)),
    ("summarize", (f"What are the main points of this message? {_MEETING}",)),
    ("rewrite", (f"Rewrite this email so that it sounds more polite: {_MAIL}",)),
    ("rewrite", (f"Write this in simple words for a child: {_PLANTS}",)),
    ("list", ("List eight things to pack for a week of hiking in the mountains.",)),
    ("list", ("What are the advantages and disadvantages of working from home?",)),
    ("story", (f"Continue this story: {_LIGHTHOUSE}",)),
    ("story", ("Tell me a short story about a dog that gets lost in a big city.",)),
    (
        "chat",
        (
            "Hi! I want to learn to cook. Where do I begin?",
            _COOKING,
            "Good. What should I buy for my kitchen first?",
        ),
    ),
    ("chat", ("What is the capital of Australia?", _CANBERRA, "Why is it not Sydney?")),
)
"""Kinds of text, and the turns of a user and the assistant; the last turn is the user's."""


@dataclass(slots=True)
class Tally:
    """What texts took: new tokens, requests, seconds, and the drafts of each request that had some.

    Drafts are the number that was sent and the number that was right.
    """

    tokens: int = 0
    round_trips: int = 0
    seconds: float = 0.0
    drafts: list[tuple[int, int]] = field(default_factory=list)

    def add(self, requests: list[GenerateRequest], tokens: int, seconds: float) -> None:
        """Add a text."""
        self.tokens += tokens
        self.round_trips += len(requests)
        self.seconds += seconds
        # The cache of the next request has the tokens that were right.
        for request, then in pairwise(requests[1:]):
            sent, right = request.smashed_BTD.shape[1] - 1, then.past - request.past - 1
            self.drafts.append((sent, right))

    @property
    def gain(self) -> float:
        """The tokens of a round trip, without the one that each brings."""
        return self.tokens / self.round_trips - 1

    def row(self) -> dict[str, Any]:
        """Return the measurements, with the share that was right of the drafts at each position.

        Those after a wrong draft do not count.
        """
        shares = []
        for position in range(NUM_DRAFTS):
            tried = [right > position for sent, right in self.drafts if sent > position <= right]
            shares += [sum(tried) / len(tried)] if tried else []
        sent = sum(sent for sent, _ in self.drafts) / max(1, len(self.drafts))
        return {
            "tokens": self.tokens,
            "round_trips": self.round_trips,
            "gain": self.gain,
            "tokens_per_s": self.tokens / self.seconds,
            "drafts_sent": sent,
            "right_at": shares,
        }


def on_ordinary_text(size: Size, report: Report) -> None:
    """Measure plain decoding, prompt lookup and the drafts of the commands on the same prompts."""
    with TemporaryDirectory() as folder:
        prompts = prompts_of(size, Path(folder))
        split = "1/*/1" if size.pretrained else size.shape.split
        whole: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
        texts = [text_of(whole, ids_BT, size.new_tokens) for _, ids_BT in prompts]
        del whole
        with (
            process(trunk_server, folder, split) as server,
            reach(folder, server.ask("address")) as reached,
        ):
            for latency_s in (0.0, LATENCY_S):
                found = _tallies(size, reached, latency_s, prompts, texts, report)
                ratio = found["plain"].seconds / found["drafts"].seconds
                name = "80ms" if latency_s else "loopback"
                report.figures[f"ordinary_speedup_{name}"] = ratio
            report.figures["draft_gain_80ms"] = found["drafts"].gain


def _tallies(
    size: Size,
    reached: Reached,
    latency_s: float,
    prompts: list[tuple[str, Tensor]],
    texts: list[Tensor],
    report: Report,
) -> dict[str, Tally]:
    """Generate all texts in each way, in turns; compare them with those of the unsplit model."""
    model, link = reached.model, WatchedLink(reached.link)
    wire: Any = DelayedLink(link, latency_s) if latency_s else link
    connect(model, reached.route.trunk(wire, model))
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "lookup": {"prompt_lookup_num_tokens": NUM_DRAFTS},
        # Of one session: later texts use the earlier ones.
        "drafts": {"assistant_model": replace(reached, link=wire).drafts()},
    }
    found = {(way, kind): Tally() for way in ways for kind in ("all", *dict(prompts))}
    for (kind, ids_BT), wanted_BT in zip(prompts, texts, strict=True):
        for way, options in ways.items():
            link.forget()
            began = perf_counter()
            text_BT = text_of(model, ids_BT, size.new_tokens, **options)
            seconds = perf_counter() - began
            same = torch.equal(text_BT, wanted_BT)
            report.figures["tokens_identical"] = same and report.figures["tokens_identical"]
            requests = [seen.request for seen in link.of(GenerateRequest)]
            for each in ("all", kind):
                found[way, each].add(requests, text_BT.shape[1] - ids_BT.shape[1], seconds)
    for (way, kind), tally in found.items():
        report.row("ordinary_text", latency_s=latency_s, by=way, kind=kind, **tally.row())
    return {way: found[way, "all"] for way in ways}


def prompts_of(size: Size, folder: Path) -> list[tuple[str, Tensor]]:
    """Save the model into a folder; return kinds of text and prompts in its tokens."""
    if not size.pretrained:
        size.shape.whole().save_pretrained(folder)
        ids_BT = torch.arange(1, size.prompt + 1)[None]
        return [("toy", ids_BT), ("toy", ids_BT.flip(1))]
    save_smollm2(folder)
    tokenizer = load_tokenizer(str(folder))
    prompts = []
    for kind, turns in PROMPTS:
        messages = [
            {"role": role, "content": turn}
            for role, turn in zip(cycle(("user", "assistant")), turns, strict=False)
        ]
        text = conversation_text(tokenizer, messages)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        prompts.append((kind, ids["input_ids"]))
    return prompts


@contextmanager
def trunk_server(folder: str, split: str) -> Iterator[Answers]:
    """Serve the trunk of the model in a folder; answers its `address`."""
    served = [Served(name="ordinary", model=folder)]
    run = RunSpec(split=SplitSpec.parse(split))
    with hosted(served, run, WireSpec(bind="127.0.0.1:0")) as address:
        yield {"address": lambda: address}
