"""Client and trunk as processes of one machine, against the unsplit model; float32 and bfloat16.

Shapes: B sequences, T tokens, V vocabulary. The trunk is `fedsplit serve`. The client does what
`fedsplit generate` does, and plain transformers generates the same text. Each process has all
cores, and computes while the others wait. docs/generation.md explains the figures.
"""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from fedsplit.errors import Internal
from simulations.bench.models import TOY
from simulations.bench.processes import command_server
from simulations.bench.report import Report, in_turns
from simulations.bench.speaker import TOKEN
from simulations.smollm2 import save_smollm2

TEXT = (
    "The water in a kettle boils at a lower temperature in the mountains, because the pressure of "
    "the air is lower there. Cooks who live high up know this well: an egg needs more minutes in "
    "the pot, and bread rises faster than it does at the sea. "
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Size:
    """New tokens of a text, the sequences and tokens of a long prompt, and turns."""

    new_tokens: int
    rows: int
    tokens: int
    turns: int


_SIZES = {
    "full": _Size(new_tokens=48, rows=4, tokens=256, turns=7),
    "toy": _Size(new_tokens=4, rows=2, tokens=16, turns=1),
}


class Speaker:
    """A process that generates with a model: plain, or as the client of a server."""

    def __init__(self, *words: str) -> None:
        command = [sys.executable, "-m", "simulations.bench.speaker", *words]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment()
        )

    def __enter__(self) -> "Speaker":
        return self

    def __exit__(self, *_: object) -> None:
        with self._process as process:
            process.terminate()

    def ask(self, what: str, *values: Any) -> Any:
        """Call a function of `simulations.bench.speaker.Speech`, and return its result.

        Raises:
            Internal: The process has failed.
        """
        assert self._process.stdin and self._process.stdout
        try:
            print(json.dumps([what, *values]), file=self._process.stdin, flush=True)
        except BrokenPipeError as exc:
            raise Internal("a client of the benchmark has ended") from exc
        if not (line := self._process.stdout.readline()):
            raise Internal("a client of the benchmark failed; see its traceback above")
        return json.loads(line)


def measure(size: str, report: Report) -> None:
    """Add the figures of one machine to a report; `size` is `full` or `toy`."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        if size == "full":
            save_smollm2(folder / "model")
        else:
            TOY.whole().save_pretrained(folder / "model")
        model = str(folder / "model")
        speakers = {"hf": stack.enter_context(Speaker(model, "", "float32"))}
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(TOKEN)
        serve = ["serve", "--model", model, "--bind", "127.0.0.1:0", "--token-file", str(token)]
        for dtype in ("float32", "bfloat16"):
            words, environment = [*serve, f"model.dtype={dtype}"], _environment()
            address = stack.enter_context(command_server(*words, environment=environment))
            speakers[dtype] = stack.enter_context(Speaker(model, address, dtype))
        _decoding(_SIZES[size], report, speakers)
        _prompts(_SIZES[size], report, speakers)


def _decoding(size: _Size, report: Report, speakers: dict[str, Speaker]) -> None:
    def speed(name: str) -> float:
        return float(size.new_tokens / speakers[name].ask("text", TEXT, size.new_tokens))

    found = in_turns(size.turns, {name: partial(speed, name) for name in speakers})
    for name, values in found.items():
        report.spread("one_machine_tokens_per_s", values, by=name)
    report.figures["one_machine_vs_hf"] = report.ratio(
        "one machine: split / hf", found["float32"], found["hf"]
    )
    report.figures["bf16_decoding"] = report.ratio(
        "decoding: bfloat16 / float32", found["bfloat16"], found["float32"]
    )


def _prompts(size: _Size, report: Report, speakers: dict[str, Speaker]) -> None:
    def seconds(name: str) -> float:
        return float(speakers[name].ask("prompt", size.rows, size.tokens))

    found = in_turns(size.turns, {name: partial(seconds, name) for name in speakers})
    for name, values in found.items():
        report.spread("prompt_s", values, by=name)
    report.figures["bf16_prompts"] = report.ratio(
        "prompts: float32 s / bfloat16 s", found["float32"], found["bfloat16"]
    )
    tokens = {name: speaker.ask("tokens", TEXT) for name, speaker in speakers.items()}
    agree = {
        name: fmean(a == b for a, b in zip(tokens["hf"], own, strict=True))
        for name, own in tokens.items()
    }
    report.row("likeliest tokens equal to hf's", **agree)
    report.figures["bf16_tokens_agree"] = agree["bfloat16"]


def _environment() -> dict[str, str]:
    """Return the environment without the settings of OpenMP that benchmarks make."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
