"""The page of the public names: the signatures and docstrings of `fedsplit.__all__`."""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any

import fedsplit
from simulations.reference import ROOT

_HEAD = """# API

The names that `import fedsplit` gives. [Library](../library.md) shows how they are used together.

This page is made of the docstrings in `fedsplit/` by `python -m simulations.reference --write`."""

_WIDTH = 100
_LISTS = ("Args", "Attributes", "Returns", "Raises", "Yields")


def page() -> str:
    """Return the page: a section for each name, with those of its methods below it."""
    sections = [_HEAD]
    for name in fedsplit.__all__:
        sections += _sections(getattr(fedsplit, name))
    return "\n\n".join(sections) + "\n"


def _sections(public: type | Callable[..., Any]) -> Iterator[str]:
    file = inspect.getsourcefile(public)
    assert file, "it is written in Python"
    yield f"## {public.__name__}\n\nIn `{file.removeprefix(f'{ROOT}/')}`."
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(public))).body
    if isinstance(node, ast.FunctionDef):
        yield _signature(node, node.name)
        yield from _docstring(public)
        return
    assert isinstance(node, ast.ClassDef), "a public name is a function or a class"
    yield _class_signature(node, has_fields=is_dataclass(public))
    yield from _docstring(public)
    for method in _methods(node):
        if not method.name.startswith("_"):
            name = f"{node.name}.{method.name}"
            yield f"### {name}"
            yield _signature(method, name)
            yield from _docstring(inspect.getattr_static(public, method.name))


def _methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [each for each in node.body if isinstance(each, ast.FunctionDef)]


def _class_signature(node: ast.ClassDef, *, has_fields: bool) -> str:
    if has_fields:
        fields = [_field(each) for each in node.body if isinstance(each, ast.AnnAssign)]
        return _code(f"class {node.name}", ["*", *fields])
    made = [each for each in _methods(node) if each.name == "__init__"]
    return _code(f"class {node.name}", _arguments(made[0]) if made else None)


def _field(node: ast.AnnAssign) -> str:
    """Return a field of a dataclass, without the checks of its value.

    >>> _field(ast.parse("top: Annotated[int, AtLeast(1)] = 1").body[0])
    'top: int = 1'
    """
    kind = ast.unparse(node.annotation)
    if checked := re.fullmatch(r"Annotated\[(\w+), .*\]", kind):
        kind = checked[1]
    default = ast.unparse(node.value) if node.value else ""
    made = re.fullmatch(r"field\(default_factory=(\w+)\)", default)
    default = f"{made[1]}()" if made else default
    return f"{ast.unparse(node.target)}: {kind}{' = ' if default else ''}{default}"


def _signature(node: ast.FunctionDef, name: str) -> str:
    returns = f" -> {ast.unparse(node.returns)}".replace("'", "") if node.returns else ""
    is_property = "property" in [ast.unparse(each) for each in node.decorator_list]
    return _code(name, None if is_property else _arguments(node), returns)


def _arguments(node: ast.FunctionDef) -> list[str]:
    """Return the arguments of a function, but for the first one of a method."""
    # Only a comma outside of brackets ends an argument.
    arguments = re.split(r", (?![^\[(]*[\])])", ast.unparse(node.args))
    spaced = [re.sub(r"^(\w+: [^=]*)=", r"\1 = ", each) for each in arguments]
    return [each for each in spaced if each not in ("self", "")]


def _code(name: str, arguments: Sequence[str] | None, returns: str = "") -> str:
    """Return a block of code, with a line for each argument if one line is too long."""
    if arguments is None:
        return f"```text\n{name}{returns}\n```"
    line = f"{name}({', '.join(arguments)}){returns}"
    if len(line) > _WIDTH:
        line = "\n".join([f"{name}(", *(f"    {each}," for each in arguments), f"){returns}"])
    return f"```text\n{line}\n```"


def _docstring(documented: object) -> Iterator[str]:
    """Yield the paragraphs, lists and examples of a docstring as Markdown."""
    for block in str(inspect.getdoc(documented)).split("\n\n"):
        title, _, rest = block.partition(":\n")
        if title in _LISTS:
            yield f"**{title}**\n\n{_items(textwrap.dedent(rest))}"
        elif block.startswith(">>>"):
            yield f"```pycon\n{block}\n```"
        else:
            yield block


def _items(text: str) -> str:
    r"""Return the entries of a list of a docstring, whose further lines are indented.

    >>> print(_items("name: What it is,\n    in short.\ntop (blocks): Another."))
    * `name`: What it is, in short.
    * `top` (blocks): Another.
    """
    lines = []
    for entry in re.split(r"\n(?! )", text.strip()):
        name, colon, said = " ".join(entry.split()).partition(": ")
        name, bracket, unit = name.partition(" (")
        lines.append(f"* `{name}`{bracket}{unit}: {said}" if colon else f"* {name}{bracket}{unit}")
    return "\n".join(lines)
