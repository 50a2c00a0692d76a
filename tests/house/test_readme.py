"""The file structure in README.md: every line names a file, and every file has a line."""

import re

import pytest

from tests.house.source import FILES, ROOT, require_none


def listed() -> dict[str, bool]:
    """The paths in README's first block under a heading with "structure".

    Two blanks of indent are one folder deeper; a folder ends in a slash.
    """
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^#+ .*structure.*?\n```\w*\n(.*?)```", readme, re.I | re.M | re.S)
    assert found, "README.md has no block under a heading with 'structure'"
    paths, folders = {}, list[str]()
    for line in filter(str.strip, found.group(1).splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        paths["".join([*folders[:depth], name])] = len(line.split()) > 1
        folders[depth:] = [name] if name.endswith("/") else []
    return paths


@pytest.fixture(scope="module")
def paths() -> dict[str, bool]:
    return listed()


def test_every_line_names_something_that_is_there(paths):
    gone = (f"README.md: {path}" for path in paths if not (ROOT / path).exists())
    require_none(gone, "remove the line")


def test_every_line_says_what_it_is(paths):
    bare = (f"README.md: {path}" for path, described in paths.items() if not described)
    require_none(bare, "say beside the path what it is")


def test_every_module_has_a_line(paths):
    modules = {file for file in FILES if not file.endswith("/__init__.py")}
    require_none(sorted(modules - paths.keys()), "add a line under the heading in README.md")
