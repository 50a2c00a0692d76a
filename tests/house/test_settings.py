"""Every setting of a run is described, and read by code that is not only its check."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from operator import attrgetter
from typing import Any

import pytest

from fedsplit.errors import ConfigError
from fedsplit.spec import RunSpec
from fedsplit.spec.fields import described
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


FIELDS = {field.name: field for group in described() for field in group.fields}

UNITS = {
    "s": "seconds",
    "bytes": "bytes",
    "tokens": "tokens",
    "steps": "steps",
    "size": "sequences",
}
"""Units by the last word of a number's name."""

PURE_NUMBERS = set(
    """
    seed lora.rank lora.alpha lora.dropout data.held_out sharding.alpha sharding.skew train.lr
    train.beta1 train.beta2 train.eps train.momentum train.weight_decay train.label_smoothing
    train.clip_norm policy.discount_a policy.mixing launch.trace_share
    """.split()
)
"""The numbers that have no unit."""


def test_every_setting_has_a_phrase_and_says_its_values():
    assert list(FIELDS) == list(settings(RunSpec()))
    for field in FIELDS.values():
        assert re.fullmatch(r"[A-Za-z].*[.]", field.phrase) and "`" not in field.phrase
        assert field.values


def test_every_number_with_a_dimension_has_its_unit():
    unit_of = {}
    for name in FIELDS:
        if type(attrgetter(name)(RunSpec())) in (int, float):
            found = re.match(r"a(?: whole)? number(?: of (\w+))?,", FIELDS[name].values)
            unit_of[name] = found[1]
    assert {name for name, unit in unit_of.items() if not unit} == PURE_NUMBERS
    for name, unit in unit_of.items():
        assert unit == UNITS.get(re.split(r"[_.]", name)[-1], unit), name


def test_the_words_of_an_enumeration_are_those_that_its_check_allows():
    enumerations = [f for f in FIELDS.values() if re.fullmatch(r"[\w-]+(, [\w-]+)+", f.values)]
    assert {"task", "train.optimizer", "policy.kind"} <= {field.name for field in enumerations}
    for field in enumerations:
        group, _, name = field.name.rpartition(".")
        spec = attrgetter(group)(RunSpec()) if group else RunSpec()
        with pytest.raises(
            ConfigError, match=rf"^{field.name}='\?' is not one of: {field.values}$"
        ):
            replace(spec, **{name: "?"})
