"""The page of the config: every field of a run, and every option of `conf/`."""

from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

from fedsplit.config.help import typed
from fedsplit.spec import RunSpec
from fedsplit.spec.fields import Group, described
from simulations.reference import ROOT, table

_HEAD = """# Config fields

Every field of a run, with its default, the values that it may have, and what it is. On a command
line, `field=value` sets a field, and `group=option` chooses an option, which sets several.
[Configuration](../configuration.md) says how they are composed.
`python -m simulations.run --help` shows the same with the values of a run.

This page is made of `fedsplit/spec/` and `conf/` by `python -m simulations.reference --write`."""


def page() -> str:
    """Return the page: a section for each group of fields, and for each other group of options."""
    groups = described()
    options = {
        folder.name: folder for folder in sorted((ROOT / "conf").iterdir()) if folder.is_dir()
    }
    sections = [_HEAD, *(_section(group, options.pop(group.name, None)) for group in groups)]
    sections += [f"## {name}\n\n{_options(folder)}" for name, folder in options.items()]
    return "\n\n".join(sections) + "\n"


def _section(group: Group, options: Path | None) -> str:
    heading = f"## {group.name}\n\n{group.phrase}" if group.name else "## Without a group"
    parts = [heading, table(["field", "default", "values", "what it is"], _rows(group))]
    if options:
        parts.append(_options(options))
    return "\n\n".join(parts)


def _rows(group: Group) -> Iterator[list[str]]:
    defaults = RunSpec()
    for field in group.fields:
        default = typed(attrgetter(field.name)(defaults))
        yield [f"`{field.name}`", f"`{default}`", _plain(field.values), _plain(field.phrase)]


def _options(folder: Path) -> str:
    """Return a table of the options of a group, with the comments at the top of their files."""
    rows = [
        [f"`{folder.name}={file.stem}`", _plain(_comment(file))]
        for file in sorted(folder.glob("*.yaml"))
    ]
    return table(["option", "what it chooses"], rows)


def _comment(file: Path) -> str:
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(line for line in lines if not line.startswith("@package"))


def _plain(text: str) -> str:
    r"""Return a text without what Markdown would read as a tag, a link or emphasis.

    >>> _plain("a [list] of <names>, 1/*/1")
    'a \\[list\\] of \\<names>, 1/\\*/1'
    """
    return "".join(f"\\{letter}" if letter in "[]<*_" else letter for letter in text)
