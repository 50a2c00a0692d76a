"""The help of a run's command line: groups, examples, and all fields of a run in words."""

import re
import shutil
import string
import textwrap
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import yaml

from fedsplit.config.location import conf_dir
from fedsplit.spec import RunSpec
from fedsplit.spec.fields import Field, described

_COLUMN = 32
"""The column in which the words of a field begin."""

_MOST_COLUMNS = 120
"""The width from which on lines are hard to read."""

_START = re.compile(r" *(?:\S+ {2,})?")
"""What a line has before its second column, or before its text."""


def help_page(run: RunSpec) -> str:
    """Return the help for the terminal's width: the template of `conf/config.yaml`, filled in.

    Args:
        run: The run whose values are shown.
    """
    config = yaml.safe_load((conf_dir() / "config.yaml").read_text(encoding="utf-8"))
    template = string.Template(config["hydra"]["help"]["template"])
    page = template.substitute(CONFIG="\n".join(_lines(run)))
    width = min(shutil.get_terminal_size().columns, _MOST_COLUMNS)
    return "\n".join(_wrapped(line, width) for line in page.splitlines())


def _lines(run: RunSpec) -> Iterator[str]:
    for group in described():
        if group.name:
            yield from ("", f"{group.name}: {group.phrase}")
        for field in group.fields:
            yield from _entry(field, attrgetter(field.name)(run))


def _entry(field: Field, value: Any) -> Iterator[str]:
    """Yield the setting and the words of a field; side by side if the setting is short."""
    setting = f"  {field.name}={typed(value)}"
    if len(setting) > _COLUMN - 2:
        yield setting
        setting = ""
    yield f"{setting:{_COLUMN}}{field.phrase}"
    yield f"{'':{_COLUMN}}({field.values})"


def typed(value: Any) -> str:
    """Return a value as it is typed on the command line.

    >>> typed(True), typed(""), typed({"n_layer": 4})
    ('true', "''", '{n_layer: 4}')
    """
    if isinstance(value, str):
        return value or "''"
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1 << 20)
    return text.removesuffix("\n").removesuffix("\n...")


def _wrapped(line: str, width: int) -> str:
    """Return a line in lines of this width, which continue below its second column."""
    start = _START.match(line)
    assert start
    # A long setting or example, which has no second column, continues further to the right.
    indent = " " * (6 if start.end() == 2 else start.end())
    return textwrap.fill(
        line,
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
