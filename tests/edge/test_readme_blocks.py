"""Every shell and Python block of the pages is run, by this test or one that it names.

Blocks without a comment run as they stand, at toy size, in their order, one after the other.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.edge.blocks import (
    BLOCKS,
    COMMENT,
    NEEDS,
    PAGES,
    experiment_of,
    subject_of,
    tasks_of,
)
from tests.edge.processes import free_ports
from tests.house.source import ROOT, require_none

ADDRESS = re.compile(r"127\.0\.0\.1:9\d{3}\b")


def pages() -> list[list[list[str]]]:
    """The tasks of each page, without those that are on a page before, at free ports."""
    seen = list[list[str]]()
    result = []
    for page in dict.fromkeys(block.page for block in BLOCKS):
        blocks = [block for block in BLOCKS if block.page == page and block.is_run]
        tasks = [task for block in blocks for task in tasks_of(block)]
        result.append([task for task in tasks if task[0] == "serve" or task not in seen])
        seen += tasks
    addresses = sorted({a for page in result for task in page for a in ADDRESS.findall(str(task))})
    ports = dict(zip(addresses, free_ports(len(addresses)), strict=True))

    def at_free_ports(text: str) -> str:
        return ADDRESS.sub(lambda found: f"127.0.0.1:{ports[found[0]]}", text)

    return [[[at_free_ports(word) for word in task] for task in page] for page in result]


def test_a_comment_is_directly_above_a_block():
    comments = [
        (page.relative_to(ROOT), comment)
        for page in PAGES
        for comment in re.findall(f"^{COMMENT}$", page.read_text("utf-8"), re.MULTILINE)
    ]
    marked = [block.where for block in BLOCKS if not block.is_run]
    assert len(comments) == len(marked), comments


def test_what_a_block_needs_is_one_of_a_few_things():
    require_none(
        (f"{b.where}: {b.needs}" for b in BLOCKS if b.needs and b.needs not in NEEDS),
        f"name one of {', '.join(NEEDS)}",
    )


def cannot_be_run() -> Iterator[str]:
    for block in BLOCKS:
        try:
            assert not block.is_run or list(tasks_of(block))
        except ValueError as exc:
            yield f"{block.where}: {exc}"


def test_every_block_is_run_or_says_why_not():
    require_none(
        cannot_be_run(),
        "write <!-- needs: WORD --> or <!-- run by: tests/FILE --> in the line above the block",
    )


def is_about(subject: str, test: Path) -> bool:
    """Whether a test has a command's word, or runs blocks itself."""
    text = test.read_text(encoding="utf-8")
    return subject in text or "blocks_of" in text


def test_a_test_that_a_block_names_is_about_its_commands():
    require_none(
        (
            f"{block.where}: {shlex.join(words)} is not in {', '.join(block.run_by)}"
            for block in BLOCKS
            if block.run_by
            for words in block.programs
            if not any(is_about(subject_of(words), ROOT / file) for file in block.run_by)
        ),
        "name the test that runs such a command",
    )


def test_no_command_is_in_a_block_of_text():
    command = (
        r"\$ |(?:[A-Z_]+=\S+ )*(?:python -m|fedsplit|flwr|flower-\w+|make|pip|docker|kubectl) "
    )
    require_none(
        (
            f"{page.relative_to(ROOT)}: {line}"
            for page in PAGES
            for text in re.findall(r"^```text\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
            for line in text.splitlines()
            if re.match(command, line)
        ),
        "make it a block of sh",
    )


def test_every_experiment_is_there():
    named = {experiment_of(words) for block in BLOCKS for words in block.programs} - {""}
    there = {file.stem for file in (ROOT / "conf" / "experiment").glob("*.yaml")}
    assert named == there - {"default"}


def test_every_program_is_there():
    modules = {
        ".".join(words[2:4]) if words[2] == "simulations.bench" else words[2]
        for block in BLOCKS
        for words in block.programs
        if words[:2] == ["python", "-m"] and words[2] != "pytest"
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
    lines = [line for block in BLOCKS for line in block.lines if line.startswith("make ")]
    assert {line.split()[1] for line in lines} <= set(targets)


@pytest.mark.slow
def test_every_block_runs(tmp_path):
    shutil.copy(ROOT / "LICENSE", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.edge.run_blocks", json.dumps(pages())],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
