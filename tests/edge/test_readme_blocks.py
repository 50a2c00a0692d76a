"""The blocks of README and docs/ run as they stand there, in their order, one after the other.

Not run are benches and experiments of several runs, which have tests of their own at toy size.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.house.source import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    block
    for page in PAGES
    for block in re.findall(
        r"^```(sh|bash|python)\n(.*?)^```",
        page.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
]

# What makes a command quick without changing what it is; later settings win over those of a page.
TOY = {
    "simulations.run": "experiment=toy train.rounds=1 train.local_steps=1 data.held_out=0.01",
    "simulations.parity": "steps=2",
    "simulations.families": "gpt2",
    "simulations.one_step": "",
    "fedsplit.cli": "",
}
SEVERAL_RUNS = {"convergence", "straggler", "noniid", "memory"}

# Without collections of garbage the libraries are imported in less time.
DRIVER = """
import gc, json, runpy, sys
gc.disable()
import fedsplit.flower.server_app
from fedsplit.cli import main
gc.freeze()
gc.enable()

for kind, *words in json.loads(sys.argv[1]):
    print("---", kind, *words, flush=True)
    sys.argv = words
    try:
        if kind == "python":
            exec(compile(words[0], "README.md", "exec"), {})
        elif kind == "fedsplit.cli":
            sys.exit(main(words[1:]))
        else:
            runpy.run_module(kind, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""


def commands_of(text: str) -> list[list[str]]:
    """The words of every command in a block."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


LINES = [words for language, text in BLOCKS if language != "python" for words in commands_of(text)]


def experiment_of(words: list[str]) -> str:
    """The experiment that a command names, or nothing."""
    return next((w.partition("=")[2] for w in words if w.startswith("experiment=")), "")


def two_of(words: list[str]) -> list[str]:
    """A command's words, in which only the first setting that is swept has two values."""
    swept = [word for word in words if re.fullmatch(r"[\w.]+=\w+(,\w+)+", word)]
    short = {word: word.split(",")[0] for word in swept[1:]}
    return [short.get(word, word) for word in words]


def toy(words: list[str]) -> list[str]:
    """A command that runs a module, made quick."""
    if words[2] == "simulations.run":
        words = two_of([word for word in words if not word.startswith("experiment=")])
    return [*words[2:], *shlex.split(TOY[words[2]])]


def commands() -> list[list[str]]:
    """What to run, each once: the program or "python", and its arguments or its text."""
    found = []
    for language, text in BLOCKS:
        if language == "python":
            found.append(["python", text])
            continue
        for words in commands_of(text):
            if words[:1] == ["fedsplit"]:
                found.append(["fedsplit.cli", *words])
            elif words[:2] == ["python", "-m"] and words[2] in TOY:
                if experiment_of(words) not in SEVERAL_RUNS:
                    found.append([words[2], *toy(words)])
    return [words for number, words in enumerate(found) if words not in found[:number]]


def test_the_pages_have_blocks_of_every_kind():
    assert {kind for kind, *_ in commands()} == {"python", *TOY}


def test_every_experiment_is_there():
    named = {experiment_of(words) for words in LINES if words[0] == "python"} - {""}
    there = {file.stem for file in (ROOT / "conf" / "experiment").glob("*.yaml")}
    assert named == there - {"default"}


def test_every_program_is_there():
    modules = {
        ".".join(words[2:4]) if words[2] == "simulations.bench" else words[2]
        for words in LINES
        if words[:2] == ["python", "-m"]
    }
    paths = {module: ROOT / module.replace(".", "/") for module in modules}
    assert [
        module
        for module, path in paths.items()
        if not (path.with_suffix(".py").exists() or (path / "__main__.py").exists())
    ] == []


def test_every_target_is_in_the_makefile():
    targets = re.findall(
        r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {words[1] for words in LINES if words[0] == "make"} <= set(targets)


@pytest.mark.slow
def test_every_block_runs(tmp_path):
    shutil.copy(ROOT / "LICENSE", tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(commands())],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
