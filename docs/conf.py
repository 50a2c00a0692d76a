"""The site that `make docs` makes of the pages that GitHub shows as well."""

import re
import tomllib
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = _PROJECT["name"]
release = version = _PROJECT["version"]
author = _PROJECT["authors"][0]["name"]
copyright = author
extensions = ["myst_parser"]
root_doc = "docs/README"
# The source is the checkout, so that links between these pages and files lead to both.
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**", "fedsplit/README.md"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = f"{project} {release}"
# The site begins at index.html, which leads to the root page.
html_additional_pages = {"index": "index.html"}
templates_path = ["templates"]


def add_contents(app: Any, page: str, source: list[str]) -> None:
    """Add the pages that docs/README.md links to, under its headings, to the site's contents."""
    if page != root_doc:
        return
    for section in source[0].split("\n## ")[1:]:
        pages = "\n".join(re.findall(r"\]\(([\w./-]+)\.md\)", section))
        caption = section.partition("\n")[0]
        source[0] += f"\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{pages}\n```\n"


def setup(app: Any) -> None:
    """Let Sphinx call `add_contents` when it reads a page."""
    app.connect("source-read", add_contents)
