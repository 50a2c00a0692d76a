"""The fields of a run in words: what each one is, its unit, and the values that it may have.

All of it is read from the specs: phrase and unit from the `Attributes` of their docstrings, and
allowed values from the `Annotated` types that the checks use.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

from fedsplit.spec.checks import Allowed
from fedsplit.spec.run import RunSpec

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict[str, Any]: "a mapping",
    dict[str, str]: "a mapping to texts",
    dict[str, float]: "a mapping to numbers",
    list[int]: "a list of whole numbers",
}

_ATTRIBUTE = re.compile(r"^    (\w+)(?: \((\w+)\))?: (.+(?:\n {5,}.+)*)", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """The description of a field.

    Attributes:
        name: Its dotted name.
        phrase: What it is.
        values: The values that it may have, with their unit.
    """

    name: str
    phrase: str
    values: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The description of a group of fields.

    Attributes:
        name: Its name; empty for the fields of a run that are in no group.
        phrase: What it is.
        fields: Its fields.
    """

    name: str
    phrase: str
    fields: tuple[Field, ...]


@cache
def described() -> tuple[Group, ...]:
    """Return all fields of a run by group, those without a group first."""
    types = get_type_hints(RunSpec)
    groups = {each.name: types[each.name] for each in fields(RunSpec)}
    return tuple(
        Group(name=name, phrase=_summary(spec), fields=tuple(_fields(spec, name)))
        for name, spec in {"": RunSpec, **groups}.items()
        if is_dataclass(spec)
    )


def _fields(spec: Any, group: str) -> Iterator[Field]:
    types = get_type_hints(spec, include_extras=True)
    attributes = str(inspect.getdoc(spec)).partition("Attributes:\n")[2]
    texts = {name: (unit, text) for name, unit, text in _ATTRIBUTE.findall(attributes)}
    for each in fields(spec):
        if is_dataclass(types[each.name]):
            continue
        unit, text = texts[each.name]
        yield Field(
            name=f"{group}.{each.name}".lstrip("."),
            phrase=" ".join(text.split()),
            values=_values(types[each.name], unit),
        )


def _values(kind: Any, unit: str) -> str:
    """Return the values of a type in words.

    >>> from typing import Annotated
    >>> from fedsplit.spec.checks import AtLeast, OneOf
    >>> _values(Annotated[int, AtLeast(1)], "steps")
    'a whole number of steps, at least 1'
    >>> _values(Annotated[str, OneOf("off", "on")], "")
    'off, on'
    """
    allowed: list[Allowed] = list(getattr(kind, "__metadata__", ()))
    word = _WORDS[kind.__origin__ if allowed else kind]
    # A text that may not be any text is described by what it may be.
    words = [] if allowed and word == _WORDS[str] else [f"{word} of {unit}" if unit else word]
    return ", ".join([*words, *map(str, allowed)])


def _summary(spec: Any) -> str:
    return str(inspect.getdoc(spec)).partition("\n\n")[0]
