"""The page of the errors: for each code what you see, why, and what to do."""

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache

from fedsplit import errors
from fedsplit.errors import FedsplitError
from simulations.reference import ROOT

_HEAD = """# Error codes

Every error of fedsplit has a code. A command prints the message of an error and ends with status 1.
Over the network the code travels with the message, and a client decides by the code. Each section
has some of the messages of a code, the reason, and what to do.
[Troubleshooting](../troubleshooting.md) has more messages.

This page is made of `fedsplit/errors.py` by `python -m simulations.reference --write`."""

_EXAMPLES = 3
"""The most messages of a code that are shown, each of another file."""
_TEXT_LENGTH = 160
_PACKAGES = ("fedsplit", "strategies")
_TO_DO = "To do: "


def page() -> str:
    """Return the page: a section for each class of errors, sorted by code."""
    classes = [cls for cls in vars(errors).values() if inspect.isclass(cls)]
    own = [c for c in classes if issubclass(c, FedsplitError) and c is not FedsplitError]
    return "\n\n".join([_HEAD, *map(_section, sorted(own, key=lambda cls: cls.code))]) + "\n"


def _section(cls: type[FedsplitError]) -> str:
    why, _, to_do = str(inspect.getdoc(cls)).partition(f"\n\n{_TO_DO}")
    if not to_do:
        raise SystemExit(
            f"error: fedsplit.errors.{cls.__name__} has no {_TO_DO!r} in its docstring"
        )
    retry = "A retry can succeed." if cls.retryable else "A retry alone does not help."
    lines = [
        f"## {cls.code}",
        "",
        f"`fedsplit.errors.{cls.__name__}`, sent with the gRPC status `{cls.status}`. {retry}",
        "",
        "* **What you see**",
        *(f"  * `{message}`" for message in _examples(cls.__name__)),
        f"* **Why**: {' '.join(why.split())}",
        f"* **What to do**: {' '.join(to_do.split())}",
    ]
    return "\n".join(lines)


def _examples(name: str) -> list[str]:
    """Return the first message of each of the first files that raise an error of this class."""
    messages = {file: message for cls, file, message in reversed(_raised()) if cls == name}
    return [messages[file] for file in sorted(messages)[:_EXAMPLES]]


@cache
def _raised() -> list[tuple[str, str, str]]:
    """Return class, file and message wherever an error is made, in the order of files and lines."""
    return [
        (name, file.relative_to(ROOT).as_posix(), message)
        for package in _PACKAGES
        for file in sorted((ROOT / package).rglob("*.py"))
        for name, message in _made(ast.parse(file.read_text(encoding="utf-8")))
    ]


def _made(code: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the class and the message of each error that code makes.

    >>> list(_made(ast.parse("raise DataError(f'{name} has no documents; give it one')")))
    [('DataError', '... has no documents; give it one')]
    """
    for node in ast.walk(code):
        match node:
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[first, *_]):
                message = _text(first)
            # A row of a table of errors.
            case ast.Tuple(elts=[*_, ast.Attribute(attr=name), first]):
                message = _text(first)
            case _:
                continue
        # Some messages are of other values only.
        if re.search("[a-z]{3}", message):
            yield name, message


def _text(node: ast.expr) -> str:
    """Return a text of the code with `...` in place of its values; "" for other code."""
    match node:
        case ast.Constant(value=str(text)):
            pieces = [re.sub(r"\{[^}]*\}", "...", text)]
        case ast.JoinedStr(values=values):
            pieces = [str(v.value) if isinstance(v, ast.Constant) else "..." for v in values]
        case _:
            return ""
    text = "".join(pieces).replace("`", "'")
    return text if len(text) <= _TEXT_LENGTH else f"{text[:_TEXT_LENGTH].rpartition(' ')[0]} ..."
