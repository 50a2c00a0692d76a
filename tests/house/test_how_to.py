"""Every page in docs/how-to has a diff that applies and is small, and commands that run with it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.edge.blocks import blocks_of, toy
from tests.house.source import ROOT

PAGES = sorted((ROOT / "docs" / "how-to").glob("*.md"))
COPIED = ("conf", "fedsplit", "strategies", "simulations", "tests", "pyproject.toml", "README.md")
NOT_COUNTED = ("conf/", "tests/")
MAX_PRODUCT_FILES = 3


def diff_of(page: Path) -> str:
    """The one diff of a page."""
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
    return str(diff)


def changed_files(diff: str) -> list[str]:
    return re.findall(r"^diff --git a/\S+ b/(\S+)$", diff, re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_diff_touches_at_most_three_product_files(page: Path) -> None:
    changed = changed_files(diff_of(page))
    product = [name for name in changed if not name.startswith(NOT_COUNTED)]
    assert 1 <= len(product) <= MAX_PRODUCT_FILES, product


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run_the_test_that_its_diff_adds(page: Path) -> None:
    added = [name for name in changed_files(diff_of(page)) if re.match(r"tests/.*\.py$", name)]
    run = [word for module, *words in tasks_of_page(page) for word in words if module == "pytest"]
    assert added and set(added) <= set(run)


@pytest.mark.slow
def test_every_diff_applies_and_the_commands_of_its_page_run(tmp_path: Path) -> None:
    tasks_in = {str(changed(page, tmp_path / page.stem)): tasks_of_page(page) for page in PAGES}
    program = str(Path(__file__).with_name("pages.py"))
    done = call(ROOT, sys.executable, program, json.dumps(tasks_in))
    assert done.returncode == 0, done.stderr[-3000:]
    failed = done.stdout.split()
    assert failed == [], "\n".join(Path(each, "output").read_text()[-3000:] for each in failed)


def tasks_of_page(page: Path) -> list[list[str]]:
    """The modules that the blocks of a page run, with their arguments; runs are quick."""
    programs = [words[2:] for block in blocks_of(page) for words in block.programs]
    return [[module, *toy(module, words)] for module, *words in programs]


def changed(page: Path, folder: Path) -> Path:
    """Copy the tree to a folder and apply a page's diff; return the folder."""
    folder.mkdir()
    for source in (ROOT / name for name in COPIED):
        if source.is_dir():
            shutil.copytree(source, folder / source.name)  # with what is compiled already
        else:
            shutil.copy(source, folder)
    (folder / "page.diff").write_text(diff_of(page), encoding="utf-8")
    call(folder, "git", "init", "--quiet")
    applied = call(folder, "git", "apply", "page.diff")
    assert applied.returncode == 0, f"{page.name}: {applied.stderr}"
    return folder


def call(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
