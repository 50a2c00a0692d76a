"""Every page in docs/how-to has a diff that applies, is small, and passes the test that it adds."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.fixture(params=PAGES, ids=lambda page: page.stem)
def diff(request: pytest.FixtureRequest) -> str:
    return diff_of(request.param)


def test_a_diff_touches_at_most_three_product_files(diff: str) -> None:
    product = [name for name in changed_files(diff) if not name.startswith(NOT_COUNTED)]
    assert 1 <= len(product) <= MAX_PRODUCT_FILES, product


@pytest.mark.slow
def test_a_diff_applies_and_passes_the_test_that_it_adds(diff: str, tmp_path: Path) -> None:
    for source in (ROOT / name for name in COPIED):
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, tmp_path / source.name, ignore=ignored)
        else:
            shutil.copy(source, tmp_path)
    call(tmp_path, "git", "init", "--quiet")
    (tmp_path / "page.diff").write_text(diff, encoding="utf-8")
    call(tmp_path, "git", "apply", "page.diff")
    tests = [n for n in changed_files(diff) if n.startswith("tests/") and n.endswith(".py")]
    assert tests, "the diff adds no test"
    call(tmp_path, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)


def call(folder: Path, *words: str) -> None:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words[:3]}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
