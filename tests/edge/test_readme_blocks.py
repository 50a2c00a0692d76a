"""README's blocks run as they stand there, in their order, one after the other."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.house.source import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(sh|bash|python)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)

# What makes a command quick without changing what it is; later settings win over README's.
TOY = {
    "simulations.run": "experiment=toy train.rounds=1 train.local_steps=1 data.held_out=0.02",
    "simulations.parity": "steps=2",
    "simulations.families": "gpt2",
    "simulations.one_step": "",
    "fedsplit.cli": "",
}

DRIVER = """
import json, runpy, sys
from fedsplit.cli import main

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


def commands() -> list[list[str]]:
    """What to run: the program or "python", and its arguments or its text."""
    found = []
    for language, text in BLOCKS:
        if language == "python":
            found.append(["python", text])
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] == ["python", "-m"] and words[2].startswith("simulations."):
                found.append([words[2], *words[2:], *shlex.split(TOY[words[2]])])
            elif words[:1] == ["fedsplit"]:
                found.append(["fedsplit.cli", *words])
    return found


def test_readme_has_blocks_of_every_kind():
    assert {kind for kind, *_ in commands()} == {"python", *TOY}


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
