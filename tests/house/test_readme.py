"""README is short, the contents are whole, and every link of the documentation leads somewhere."""

import re
from functools import cache
from pathlib import Path

from tests.house.source import ROOT, require_none

MAX_README = 9 * 1024
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "fedsplit" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
SECTIONS = [
    "Start",
    "Concepts",
    "Guides",
    "How to add",
    "Reference",
    "Measurements",
    "Troubleshooting",
    "Change",
]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= MAX_README


def links(page: Path) -> list[str]:
    """The targets of a page's links, without those of other sites and those in code."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if not target.startswith(("http://", "https://"))]


@cache
def anchors(page: Path) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def leads_somewhere(page: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    there = (page.parent / path).resolve() if path else page
    return there.exists() and (not anchor or anchor in anchors(there))


def test_every_link_leads_somewhere():
    require_none(
        (
            f"{page.relative_to(ROOT)}: {target}"
            for page in [*PAGES, NOTEBOOK]
            for target in links(page)
            if not leads_somewhere(page, target)
        ),
        "correct the link or the heading",
    )


def test_the_contents_have_their_sections():
    contents = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert re.findall("^## (.*)$", contents, re.MULTILINE) == SECTIONS


def test_every_test_that_a_page_names_is_there():
    require_none(
        (
            f"{page.relative_to(ROOT)}: {file}::{test}"
            for page in PAGES
            for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text("utf-8"))
            if not (ROOT / file).is_file() or f"def {test}(" not in (ROOT / file).read_text("utf-8")
        ),
        "name the test as it is called now",
    )


def test_every_page_can_be_reached_from_readme():
    reached, ahead = set[Path](), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page.is_dir():
            ahead += page.glob("*.md")
        elif page.suffix == ".md" and page not in reached:
            reached.add(page)
            ahead += [(page.parent / target.partition("#")[0]).resolve() for target in links(page)]
    assert [str(page.relative_to(ROOT)) for page in PAGES if page not in reached] == []


def files_named(page: Path) -> list[str]:
    """The modules that a page names in code, but for the lists of files and of old names."""
    text = page.read_text(encoding="utf-8").partition("## Renamed")[0]
    return re.findall(r"`((?:\w+/)+\w+\.(?:py|proto))`", re.sub(r"```.*?```", "", text, flags=re.S))


def test_every_file_named_is_there():
    require_none(
        (
            f"{page.relative_to(ROOT)}: {file}"
            for page in PAGES
            for file in files_named(page)
            if not (ROOT / file).exists() and not (ROOT / "fedsplit" / file).exists()
        ),
        "name the file as it is called now",
    )
