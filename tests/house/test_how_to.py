"""Every page in docs/how-to has a diff that applies, is small, and passes the test that it adds."""

import json
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_diff_touches_at_most_three_product_files(page: Path) -> None:
    changed = changed_files(diff_of(page))
    product = [name for name in changed if not name.startswith(NOT_COUNTED)]
    assert 1 <= len(product) <= MAX_PRODUCT_FILES, product


@pytest.mark.slow
def test_every_diff_applies_and_passes_the_test_that_it_adds(tmp_path: Path) -> None:
    tests_of = {tmp_path / page.stem: changed_by(page, tmp_path / page.stem) for page in PAGES}
    asked = json.dumps({str(folder): tests for folder, tests in tests_of.items()})
    done = call(ROOT, sys.executable, str(Path(__file__).with_name("pages.py")), asked)
    printed = (f"{each.stem}:\n{(each / 'pytest.out').read_text()[-3000:]}" for each in tests_of)
    assert done.returncode == 0, done.stderr[-3000:] or "\n".join(printed)


def changed_by(page: Path, folder: Path) -> list[str]:
    """Copy the tree to a folder and apply a page's diff; return the tests that the diff adds."""
    folder.mkdir()
    for source in (ROOT / name for name in COPIED):
        if source.is_dir():
            shutil.copytree(source, folder / source.name)  # with what is compiled already
        else:
            shutil.copy(source, folder)
    diff = diff_of(page)
    (folder / "page.diff").write_text(diff, encoding="utf-8")
    call(folder, "git", "init", "--quiet")
    applied = call(folder, "git", "apply", "page.diff")
    assert applied.returncode == 0, f"{page.name}: {applied.stderr}"
    tests = [n for n in changed_files(diff) if n.startswith("tests/") and n.endswith(".py")]
    assert tests, f"the diff of {page.name} adds no test"
    return tests


def call(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
