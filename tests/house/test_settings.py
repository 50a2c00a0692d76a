"""Every setting of a run is read by code that is not only its check."""

import ast
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from fedsplit.spec import RunSpec
from tests.house.source import FILES, require_none, tree


def settings(spec: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of a spec's fields."""
    for each in fields(spec):
        value = getattr(spec, each.name)
        if is_dataclass(value):
            yield from settings(value, f"{prefix}{each.name}.")
        else:
            yield prefix + each.name


def attributes(node: ast.AST) -> Iterator[str]:
    """The attributes that code reads, but for the checks of a spec."""
    if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
        return
    if isinstance(node, ast.Attribute):
        yield node.attr
    for child in ast.iter_child_nodes(node):
        yield from attributes(child)


def test_every_setting_has_an_effect():
    read = {name for file in FILES for name in attributes(tree(file))}
    require_none(
        (name for name in settings(RunSpec()) if name.rpartition(".")[2] not in read),
        "use the setting, or remove it",
    )
