"""Generation from a split model against the unsplit one: tokens, speed, bytes, round trips.

Shapes: B sequences, T tokens, D hidden width. The model has the shape of GPT-2 small and random
weights, in float32 on the CPU. The client is this process. The trunk is in another process behind
gRPC on loopback. Each has one thread. docs/generation.md explains the figures.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsplit.wire.messages import ForwardRequest, GenerateRequest
from simulations.bench import one_machine
from simulations.bench.chats import first_tokens
from simulations.bench.drafts import NUM_DRAFTS, with_latency
from simulations.bench.long_prompt import beside_long_prompt
from simulations.bench.models import text_of
from simulations.bench.ordinary import on_ordinary_text
from simulations.bench.processes import Process, process, threads_of_torch
from simulations.bench.report import Report, in_turns
from simulations.bench.roles import client, name_of
from simulations.bench.scene import SIZES, Scene, Size, staged


def measure(size: str) -> Report:
    """Fill a report with all figures of generation; `size` is `full` or `toy`."""
    torch.set_num_threads(1)
    report = Report()
    report.row(
        "machine", cores=os.cpu_count(), torch=torch.__version__, model=str(SIZES[size].shape)
    )
    with staged(SIZES[size], report) as scene:
        _tokens(scene)
        _cached_against_hf(scene)
        _cached_against_uncached(scene)
        first_tokens(scene)
        _many_sessions(scene)
        with_latency(scene)
    beside_long_prompt(SIZES[size], report)
    one_machine.measure(size, report)
    on_ordinary_text(SIZES[size], report)
    return report


# --- the same tokens ------------------------------------------------------------------------------


def _tokens(scene: Scene) -> None:
    """Compare the tokens of every generation mode with those of the unsplit model."""
    size = scene.size
    ids_BT = scene.prompt(3, size.prompt)
    padding_BT = torch.ones_like(ids_BT)
    padding_BT[0, : size.prompt // 4] = 0
    draft = replace(size.shape, blocks=2).whole()
    batch = {"prompt_BT": ids_BT, "attention_mask": padding_BT}
    single = {"prompt_BT": ids_BT[:1], "attention_mask": padding_BT[1:2]}
    modes: dict[str, dict[str, Any]] = {
        "greedy": batch,
        "sampling": {**batch, "do_sample": True, "top_k": 50, "temperature": 0.8},
        "beams": {**batch, "num_beams": 3},
        "prompt_lookup": {**single, "prompt_lookup_num_tokens": NUM_DRAFTS},
        "assisted": {**single, "assistant_model": draft},
    }
    same = []
    for kv in ("server", "client"):
        scene.far(kv=kv)
        for mode, options in modes.items():
            same.append(_same(scene, options))
            scene.report.row("tokens", mode=mode, kv=kv, identical=same[-1])
    scene.report.figures["tokens_identical"] = all(same)


def _same(scene: Scene, options: dict[str, Any]) -> bool:
    texts = []
    for model in (scene.whole, scene.client):
        # Sampling draws from the process's generator.
        torch.manual_seed(scene.size.shape.seed)
        texts.append(text_of(model, new_tokens=scene.size.new_tokens, **options))
    return torch.equal(texts[0], texts[1])


# --- speed against the unsplit model --------------------------------------------------------------


def _cached_against_hf(scene: Scene) -> None:
    """Measure tokens per second against the unsplit model with one thread and with two."""
    size, report = scene.size, scene.report
    ids_BT = scene.prompt(1, size.prompt)

    def speed(model: Any, threads: int) -> float:
        with threads_of_torch(threads):
            return size.new_tokens / _seconds(lambda: text_of(model, ids_BT, size.new_tokens))

    scene.far()
    scene.link.forget()
    measures = {
        "split_1_and_1": lambda: speed(scene.client, 1),
        "hf_1": lambda: speed(scene.whole, 1),
        "hf_2": lambda: speed(scene.whole, 2),
    }
    found = in_turns(size.turns, measures)
    for name, values in found.items():
        report.spread("tokens_per_s", values, by=name)
    split = found["split_1_and_1"]
    report.figures["cached_vs_hf"] = report.ratio("split_1_and_1 / hf_1", split, found["hf_1"])
    report.ratio("split_1_and_1 / hf_2", split, found["hf_2"])
    _bytes_of_a_token(scene)


def _bytes_of_a_token(scene: Scene) -> None:
    """Measure bytes per token, with a cache at the trunk and without one."""
    size, report = scene.size, scene.report
    floor = 2 * size.shape.hidden * torch.float32.itemsize
    steady = [seen.num_bytes for seen in _decoding(scene)]
    report.figures["bytes_per_token"] = fmean(steady)
    report.figures["bytes_per_token_floor"] = floor
    report.row("bytes_per_token", kv="server", mean=fmean(steady), most=max(steady), floor=floor)
    scene.far(kv="client")
    scene.link.forget()
    text_of(scene.client, scene.prompt(1, size.prompt), size.new_tokens)
    grown = [seen.num_bytes for seen in _decoding(scene)]
    report.row("bytes_per_token", kv="client", first=grown[0], last=grown[-1], mean=fmean(grown))


def _decoding(scene: Scene) -> list[Any]:
    seen = scene.link.of(GenerateRequest)
    return [each for each in seen if each.request.past]


# --- speed against no cache -----------------------------------------------------------------------


def _cached_against_uncached(scene: Scene) -> None:
    """Measure a long answer to a long prompt, with and without a cache.

    Without a cache, some tokens of the answer are measured. The others are interpolated, because
    the cost of a token grows with the number of tokens before it.
    """
    size, report = scene.size, scene.report
    ids_BT = scene.prompt(1, size.long_prompt + size.long_new)
    at = np.linspace(size.long_prompt, size.long_prompt + size.long_new - 1, size.uncached_at)
    lengths = [round(length) for length in at]
    trunk = scene.far()
    cached: list[_Cost] = []
    uncached: list[_Cost] = []
    with trunk.session(training=False):
        for turn in range(1 + max(1, size.turns // 2)):
            answer = _cost(scene, ids_BT[:, : size.long_prompt], size.long_new, use_cache=True)
            tokens = [_cost(scene, ids_BT[:, :length], 1, use_cache=False) for length in lengths]
            # The first turn warms up.
            if turn:
                cached.append(answer)
                uncached.append(_integral(lengths, tokens, size))
    for name in ("trunk_s_per_token", "total_s", "num_bytes"):
        for kind, costs in (("cached", cached), ("uncached", uncached)):
            report.spread(name, [getattr(cost, name) for cost in costs], by=kind)
    figures = {
        "trunk_cached_vs_uncached": "trunk_s_per_token",
        "total_cached_vs_uncached": "total_s",
    }
    for figure, name in figures.items():
        both = ([getattr(cost, name) for cost in costs] for costs in (uncached, cached))
        report.figures[figure] = report.ratio(f"{name}: uncached / cached", *both)
    report.figures["bytes_saved"] = 1 - cached[0].num_bytes / uncached[0].num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cost:
    """The cost of an answer: trunk seconds per token after the first, total seconds and bytes."""

    trunk_s_per_token: float
    total_s: float
    num_bytes: float


def _cost(scene: Scene, ids_BT: Tensor, new_tokens: int, *, use_cache: bool) -> _Cost:
    scene.link.forget()
    # Discards the passes before this answer.
    scene.server.ask("passes")
    seconds = _seconds(lambda: text_of(scene.client, ids_BT, new_tokens, use_cache=use_cache))
    passes = [s for tokens, s in scene.server.ask("passes") if tokens == 1 or not use_cache]
    kind = GenerateRequest if use_cache else ForwardRequest
    return _Cost(
        trunk_s_per_token=fmean(passes),
        total_s=seconds,
        num_bytes=sum(seen.num_bytes for seen in scene.link.of(kind)),
    )


def _integral(lengths: list[int], tokens: list[_Cost], size: Size) -> _Cost:
    """Return the cost of an answer, interpolated from the cost of some of its tokens."""
    every = np.arange(size.long_prompt, size.long_prompt + size.long_new)

    def of(name: str) -> Any:
        return np.interp(every, lengths, [getattr(cost, name) for cost in tokens])

    return _Cost(
        trunk_s_per_token=float(of("trunk_s_per_token")[1:].mean()),
        total_s=float(of("total_s").sum()),
        num_bytes=float(of("num_bytes").sum()),
    )


# --- many sessions --------------------------------------------------------------------------------


def _many_sessions(scene: Scene) -> None:
    """Measure clients that replay vectors, against the same blocks with one batch of them."""
    size, report = scene.size, scene.report
    with ExitStack() as stack:
        clients = [stack.enter_context(_recorded(scene, 1 + i)) for i in range(size.sessions)]
        measures = {
            "sessions": lambda: _at_once(clients, "replay", size.new_tokens),
            "session": lambda: _at_once(clients[:1], "replay", size.new_tokens),
            "batch": lambda: _blocks_alone(scene, size.sessions),
            "batch_of_1": lambda: _blocks_alone(scene, 1),
        }
        found = in_turns(size.turns, measures)
        scene.server.ask("passes")
        _at_once(clients, "replay", size.new_tokens)
        widths = [tokens for tokens, _ in scene.server.ask("passes")]
        whole = [_at_once(clients, "generate", size.new_tokens) for _ in range(2)]
    for name, values in found.items():
        report.spread("trunk_tokens_per_s", values, by=name)
    report.spread("whole_clients_tokens_per_s", whole, by="sessions")
    report.row("tokens_in_a_pass", mean=fmean(widths), most=max(widths))
    report.figures["sessions8_of_batch8"] = report.ratio(
        "sessions / batch", found["sessions"], found["batch"]
    )
    report.ratio("batch / batch_of_1", found["batch"], found["batch_of_1"])


@contextmanager
def _recorded(scene: Scene, seed: int) -> Iterator[Process]:
    """Run a client that has recorded a generation to replay."""
    size, token = scene.size, scene.server.ask("token", name_of(seed))
    with process(client, size.shape, seed, scene.address, token, size.prompt) as one:
        one.ask("generate", 1 + size.new_tokens)
        one.ask("record")
        yield one


def _at_once(clients: list[Process], what: str, tokens: int) -> float:
    """Return tokens per second of all clients, from the first begin to the last end."""
    for each in clients:
        each.begin(what, tokens)
    spans = [each.end() for each in clients]
    seconds: float = max(end for _, end in spans) - min(begin for begin, _ in spans)
    return tokens * len(clients) / seconds


def _blocks_alone(scene: Scene, rows: int) -> float:
    """Return tokens per second of the trunk's blocks in this process, on one batch."""
    size = scene.size
    smashed_BTD = torch.randn(rows, size.prompt + size.new_tokens, size.shape.hidden)
    cache = scene.trunk.new_cache()
    with torch.no_grad():
        scene.trunk.run(smashed_BTD[:, : size.prompt], cache=cache)
        seconds = _seconds(
            lambda: [
                scene.trunk.run(vector_BTD, cache=cache)
                for vector_BTD in smashed_BTD[:, size.prompt :].split(1, dim=1)
            ]
        )
    return rows * size.new_tokens / seconds


# --- helpers --------------------------------------------------------------------------------------


def _seconds(work: Callable[[], Any]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began
