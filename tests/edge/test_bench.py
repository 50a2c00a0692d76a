"""The benches at toy size: that every figure is there. What it says is for a quiet machine."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulations.bench import naive
from simulations.bench.__main__ import BENCHES
from simulations.bench.attackers import ATTACKS
from simulations.bench.links import DelayedLink
from simulations.bench.report import Report, in_turns
from tests.edge.echo import EchoService, forward, linked, serving

ROOT = Path(__file__).parents[2]
FIGURES = {
    "accelerate": [
        "bf16_speedup",
        "compiled_speedup",
        "largest_loss_gap",
        "sdpa_speedup",
    ],
    "audit": [
        "attacks",
        "audit_s",
        "chance",
        "defences",
        "negative",
        "noise_labels",
        "positive_labels",
        "positive_text",
        "seal_share",
        "shield_overhead",
        "shield_overhead_768",
        "strict_labels",
        "strict_loss_cost",
        "strict_text",
        "strict_vs_no_trunk",
        "strict_words",
        "words",
    ],
    "clients": ["least_growth", "sample_cost_8c"],
    "scale": [
        "clients_128_of_8",
        "cores_gain",
        "idle_client_bytes",
        "servers_gain",
        "tp_bytes_per_rank",
    ],
    "memory": [
        "checkpointing_memory_saved",
        "checkpointing_memory_saved_computed",
        "client_peak_of_whole",
    ],
    "bridge": [
        "bridge_gain",
        "lookup_and_bridge_gain",
        "lookup_gain",
        "small_model_gain",
    ],
    "compress": [
        "bytes_ratio_default",
        "bytes_ratio_history",
        "bytes_ratio_strong",
        "loss_delta_default",
        "loss_delta_history",
        "loss_delta_strong",
    ],
    "faults": [
        "checkpoint_overhead",
        "equal",
        "leftover_processes",
        "persons",
        "points",
        "recovery_s_max",
        "recovery_s_max_inline",
    ],
    "fuzz": [
        "cases",
        "crashes",
        "foreign_errors",
        "hangs",
        "honest_changed",
        "rss_growth_mib",
        "threads_max",
    ],
    "generate": [
        "bf16_decoding",
        "bf16_prompts",
        "bf16_tokens_agree",
        "bytes_per_token",
        "bytes_per_token_floor",
        "bytes_saved",
        "cached_vs_hf",
        "draft_gain_80ms",
        "draft_speedup_100ms",
        "one_machine_vs_hf",
        "ordinary_speedup_80ms",
        "ordinary_speedup_loopback",
        "others_p99_under_long_prompt",
        "second_turn_first_token",
        "sessions8_of_batch8",
        "tokens_identical",
        "total_cached_vs_uncached",
        "trunk_cached_vs_uncached",
    ],
    "openai": ["chats8_gain", "http_vs_generate"],
    "wire": [
        "latency_ratio_3k",
        "p99_ms_5c",
        "requests_per_s_5c",
        "wire_ratio_128k",
        "wire_ratio_12m",
        "wire_ratio_1536k",
        "wire_ratio_5c",
        "wire_ratio_64m",
    ],
    "step": [
        "micro_batch_gain",
        "micro_batch_gain_50ms",
        "naive_wire_ratio",
        "step_ratio",
        "transfers_per_step",
    ],
    "guard": [
        "clean_clipped",
        "clean_refusals",
        "clean_steps",
        "loss_honest",
        "loss_mean",
        "loss_median",
        "loss_others_label_flip_x9_mean",
        "loss_others_label_flip_x9_median",
        "loss_others_many_backwards",
        "loss_others_weight1e15",
        "loss_others_x1e6",
        "overhead",
    ],
    "schedules": ["cpu_seconds", "planted_found", "schedules", "seconds", "violations"],
    "soak": ["faults", "growing", "rounds", "rounds_compared", "sessions", "violations"],
    "strangers": [
        "memory_per_mib",
        *(f"p99_as_busy_{attack}" for attack in sorted(ATTACKS)),
        *(f"p99_{attack}" for attack in sorted(ATTACKS)),
        "replies_changed",
        "slots_held",
    ],
    "telemetry": ["metrics_overhead", "trace_overhead_1pct"],
}


def cheap_to_read(told: dict[str, Any]) -> None:
    rows = {row["of"]: row for row in told["rows"]}
    assert rows["traced_s"]["median"] > rows["untraced_s"]["median"] > 0
    assert rows["reading_s"]["median"] > 0 and len(rows["with / without"]["turns"]) == 2


def exact_and_small(told: dict[str, Any]) -> None:
    figures, floor = told["figures"], told["figures"]["bytes_per_token_floor"]
    assert figures["tokens_identical"] is True
    assert floor < figures["bytes_per_token"] <= floor + 200
    assert 0.8 < figures["bytes_saved"] < 1
    assert 0.9 <= figures["bf16_tokens_agree"] <= 1
    assert min(figures[name] for name in ("one_machine_vs_hf", "bf16_decoding", "bf16_prompts")) > 0
    assert figures["others_p99_under_long_prompt"] > 0


def of_right_drafts(told: dict[str, Any]) -> None:
    figures = told["figures"]
    # That model has all blocks of the toy, so its drafts are right until a text ends.
    assert figures["small_model_gain"] >= max(3.0, figures["bridge_gain"])
    assert figures["lookup_gain"] >= 0 and figures["bridge_gain"] >= 0


def exact_with_four_transfers(told: dict[str, Any]) -> None:
    assert told["figures"]["transfers_per_step"] == 4
    assert [row["identical"] for row in told["rows"] if row["of"] == "losses"] == [True]


def measured_on_every_way(told: dict[str, Any]) -> None:
    of_echoes = [row for row in told["rows"] if row["of"] == "stack / unary"]
    assert {row["way"] for row in of_echoes if "way" in row} == {"tcp", "unix", "tls"}


def of_the_same_loss(told: dict[str, Any]) -> None:
    assert told["figures"]["largest_loss_gap"] < 1e-3


def of_all_chats(told: dict[str, Any]) -> None:
    assert told["figures"]["http_vs_generate"] > 0
    assert told["figures"]["chats8_gain"] > 0


def of_half_a_trunk_per_rank(told: dict[str, Any]) -> None:
    figures = told["figures"]
    assert 0.5 <= figures["tp_bytes_per_rank"] <= 0.55
    assert min(figures[name] for name in ("servers_gain", "cores_gain", "clients_128_of_8")) > 0
    assert figures["idle_client_bytes"] < 2**20


def saved_at_the_trunk(told: dict[str, Any]) -> None:
    assert 0 < told["figures"]["checkpointing_memory_saved_computed"] < 1
    assert 0 < told["figures"]["client_peak_of_whole"] < 1, "without the trunk"


def more_with_more_clients(told: dict[str, Any]) -> None:
    rows = [row for row in told["rows"] if row["of"] == "samples_per_s"]
    assert {row["by"] for row in rows} == {"together 1", "together 2", "in turns 2"}
    assert told["figures"]["sample_cost_8c"] > 0


def without_false_alarms(told: dict[str, Any]) -> None:
    figures = told["figures"]
    assert (figures["clean_steps"], figures["clean_refusals"]) == (70, 0)
    assert figures["loss_others_weight1e15"] == figures["loss_others_x1e6"] == 1.0
    assert abs(figures["loss_others_many_backwards"] - 1) < 0.01


def of_no_harm(told: dict[str, Any]) -> None:
    assert told["figures"]["replies_changed"] == told["figures"]["slots_held"] == 0


def ending_as_it_may(told: dict[str, Any]) -> None:
    figures = told["figures"]
    assert figures["cases"] > 0
    assert all(figures[name] == 0 for name in ("crashes", "foreign_errors", "hangs"))
    assert figures["honest_changed"] == 0


def costing_what_it_says(told: dict[str, Any]) -> None:
    figures = told["figures"]
    assert 0.25 < figures["bytes_ratio_default"] <= 0.27
    assert figures["bytes_ratio_strong"] < figures["bytes_ratio_default"]
    assert abs(figures["loss_delta_default"]) < 0.002


def of_right_numbers(told: dict[str, Any]) -> None:
    figures = told["figures"]
    violations = [row["text"] for row in told["rows"] if row["of"] == "violation"]
    assert figures["violations"] == 0, violations
    assert min(figures["rounds_compared"], figures["sessions"], figures["faults"]) > 0
    trends = [row for row in told["rows"] if "zero_within" in row]
    kinds = {row["of"].partition("_")[0] for row in trends}
    assert kinds == {"rss", "descriptors", "threads", "step"}
    assert sum(not row["zero_within"] for row in trends) == figures["growing"]


def of_equal_weights(told: dict[str, Any]) -> None:
    figures = told["figures"]
    assert figures["points"] == figures["equal"] > 0
    assert figures["persons"] == figures["leftover_processes"] == 0
    assert figures["checkpoint_overhead"] > 0


def of_no_violation(told: dict[str, Any]) -> None:
    figures = told["figures"]
    assert (figures["schedules"], figures["violations"], figures["planted_found"]) == (100, 0, 10)


def of_what_is_read(told: dict[str, Any]) -> None:
    figures = told["figures"]
    assert min(figures["positive_text"], figures["positive_labels"]) >= 0.99
    assert figures["negative"] <= figures["chance"] + 0.02
    assert figures["strict_labels"] == figures["strict_words"] == 0
    assert figures["attacks"] >= 6 and figures["defences"] >= 9


HOLDS: dict[str, Callable[[dict[str, Any]], None]] = {
    "accelerate": of_the_same_loss,
    "audit": of_what_is_read,
    "bridge": of_right_drafts,
    "clients": more_with_more_clients,
    "compress": costing_what_it_says,
    "faults": of_equal_weights,
    "fuzz": ending_as_it_may,
    "generate": exact_and_small,
    "guard": without_false_alarms,
    "memory": saved_at_the_trunk,
    "openai": of_all_chats,
    "scale": of_half_a_trunk_per_rank,
    "schedules": of_no_violation,
    "soak": of_right_numbers,
    "step": exact_with_four_transfers,
    "strangers": of_no_harm,
    "telemetry": cheap_to_read,
    "wire": measured_on_every_way,
}


# Without collections of garbage the libraries are imported in less time.
DRIVER = """
import gc, runpy, sys
gc.disable()
import simulations.bench.accelerate
gc.freeze()
gc.enable()

for name in sys.argv[1:]:
    sys.argv = ["bench", name, "--size", "toy", "--json", name]
    try:
        runpy.run_module("simulations.bench", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""


@pytest.mark.slow
def test_the_benches_at_toy_size(tmp_path: Path) -> None:
    """One after the other in one process, as what they import takes seconds."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *FIGURES],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    for name, figures in FIGURES.items():
        told = json.loads((tmp_path / name).read_text())
        assert sorted(told["figures"]) == figures
        assert all(math.isfinite(figure) for figure in told["figures"].values())
        assert all(figure in done.stdout for figure in figures)
        assert all(len(row) > 1 and row["of"] for row in told["rows"])
        HOLDS[name](told)


def test_every_bench_is_tried() -> None:
    assert set(FIGURES) == set(HOLDS) == set(BENCHES)


def test_the_naive_design_carries_an_array_whole() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.array_equal(naive.unpacked(naive.answered(naive.packed(array))), array)


def test_a_ratio_is_the_median_of_the_turns_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    assert report.ratio("a / b", [2.0, 9.0, 4.0], [1.0, 1.0, 1.0], by="test") == 4.0
    assert report.rows == [
        {"of": "a / b", "by": "test", "median": 4.0, "least": 2.0, "most": 9.0}
        | {"turns": [2.0, 9.0, 4.0]}
    ]
    assert capsys.readouterr().out == "a / b: by=test median=4 least=2 most=9 turns=[2 9 4]\n"


def test_turns_alternate_and_the_first_one_is_left_out() -> None:
    said = iter(range(6))
    count = {"a": lambda: next(said), "b": lambda: next(said)}
    assert in_turns(2, count) == {"a": [2, 4], "b": [3, 5]}


def test_a_delay_is_waited_for_once_an_exchange() -> None:
    waits: list[float] = []
    with serving(EchoService()) as address, linked(address) as link:
        reply = DelayedLink(link, 0.1, sleep=waits.append).exchange(forward())
    assert (reply.version, waits) == (0, [0.1])


def test_several_replies_are_late_at_the_same_time() -> None:
    waits: list[float] = []
    with serving(EchoService()) as address, linked(address) as link:
        stream = DelayedLink(link, 0.1, sleep=waits.append).stream()
        answers = [stream.begin(forward(call=call)) for call in range(2)]
        assert waits == []
        assert [answer().version for answer in answers] == [0, 1]
    assert waits == [0.1, 0.1]
