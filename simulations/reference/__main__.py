"""Writes the pages of docs/reference/, or checks that they are up to date.

python -m simulations.reference --write
python -m simulations.reference --check
"""

import argparse

from simulations.reference import ROOT, api, commands, config, errors, wire

FOLDER = ROOT / "docs" / "reference"
PAGES = {
    "api.md": api.page,
    "config.md": config.page,
    "errors.md": errors.page,
    "commands.md": commands.page,
    "wire.md": wire.page,
}
"""The function that returns the text of each page."""


def stale_pages() -> dict[str, str]:
    """Return the pages whose files are not up to date: their new texts by name."""
    files = {name: FOLDER / name for name in PAGES}
    old = {name: file.read_text("utf-8") if file.exists() else "" for name, file in files.items()}
    new = {name: page() for name, page in PAGES.items()}
    return {name: text for name, text in new.items() if text != old[name]}


def main() -> None:
    """Write the pages, or check them.

    Raises:
        SystemExit: With --check, a page is not up to date.
    """
    parser = argparse.ArgumentParser(prog="python -m simulations.reference")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="write the pages that are out of date")
    what.add_argument("--check", action="store_true", help="fail if a page is out of date")
    arguments = parser.parse_args()
    stale = stale_pages()
    if arguments.check and stale:
        raise SystemExit(
            f"error: out of date in {FOLDER.relative_to(ROOT)}: {', '.join(stale)}; run: python -m "
            "simulations.reference --write"
        )
    FOLDER.mkdir(exist_ok=True)
    for name, text in stale.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
