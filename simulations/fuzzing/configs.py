"""Cases for the settings of a run: every field with odd values, as objects, as YAML, as keys."""

import random
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any, get_type_hints

import yaml

from fedsplit.config import from_run_config, from_yaml
from fedsplit.config.overrides import RUN_CONFIG_KEYS
from fedsplit.errors import FedsplitError
from fedsplit.spec import RunSpec
from simulations.fuzzing import odd
from simulations.fuzzing.case import Case, Wrong
from simulations.fuzzing.stage import Stage

_THROUGH_YAML, _THROUGH_HYDRA = 0.01, 0.001
"""The shares of cases that take these ways, which are slow."""


def configs_case(case: Case, stage: Stage) -> None:
    """A run of which one or two fields have odd values."""
    rng, way = case.rng, case.rng.random()
    try:
        if way < _THROUGH_HYDRA:
            run = _of_keys(case)
        elif way < _THROUGH_HYDRA + _THROUGH_YAML:
            run = _of_yaml(case)
        else:
            run = _of_fields(case)
    except FedsplitError as error:
        case.got(error)
        return
    case.got(run)
    for step in (0, run.train.total_steps):
        if not 0 <= run.train.lr_at(step) < float("inf"):
            raise Wrong(f"the learning rate of step {step} is {run.train.lr_at(step)}")
    if rng.random() < 0.1 and not (run.fingerprint and run.texts):
        raise Wrong("a run has no fingerprint")
    if rng.random() < _THROUGH_YAML and from_yaml(yaml.safe_dump(asdict(run))) != run:
        raise Wrong("a run that was written as YAML is read as another one")


def _of_fields(case: Case) -> RunSpec:
    rng, run = case.rng, RunSpec()
    for _ in range(rng.choice((1, 1, 2))):
        group, name, kind = rng.choice(_FIELDS)
        value = _value(rng, kind)
        case.sent((group, name, value))
        if group:
            run = replace(run, **{group: replace(getattr(run, group), **{name: value})})
        else:
            run = replace(run, **{name: value})
    return run


def _of_yaml(case: Case) -> RunSpec:
    rng, whole = case.rng, asdict(RunSpec())
    group, name, kind = rng.choice(_FIELDS)
    values = [_value(rng, kind), odd.text(rng), odd.number(rng), [odd.text(rng)], {"a": None}, None]
    part = whole[group] if group else whole
    part[name if rng.random() < 0.9 else odd.text(rng)] = rng.choice(values)
    text = yaml.safe_dump(whole)
    if rng.random() < 0.3:
        text = odd.damaged(rng, text.encode()).decode("utf-8", "replace")
    case.sent(text)
    return from_yaml(text)


def _of_keys(case: Case) -> RunSpec:
    rng = case.rng
    key = rng.choice([*RUN_CONFIG_KEYS, "overrides", "config"])
    values: Any = [odd.text(rng), odd.integer(rng), odd.number(rng), rng.random() < 0.5]
    if key == "overrides":
        group, name, kind = rng.choice(_FIELDS)
        values = [f"{group}.{name}={_value(rng, kind)}".lstrip(".")]
    value = rng.choice(values)
    case.sent((key, value))
    return from_run_config({key: value})


def _fields_of(spec: Any, group: str) -> list[tuple[str, str, Any]]:
    found: list[tuple[str, str, Any]] = []
    for name, kind in get_type_hints(spec).items():
        if is_dataclass(kind):
            found += _fields_of(kind, name)
        elif name in {each.name for each in fields(spec)}:
            found.append((group, name, kind))
    return found


_FIELDS = _fields_of(RunSpec, "")


def _value(rng: random.Random, kind: Any) -> Any:
    if kind is int:  # of any length in YAML
        return rng.choice((-1, 1)) * odd.integer(rng)
    draw = odd.DRAWS.get(kind)
    return draw(rng) if draw else odd.some(rng, odd.integer)
