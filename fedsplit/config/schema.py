"""The schema: `RunSpec` as Hydra sees it, the way back, and its errors in our own words."""

import copy
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    OmegaConfBaseException,
    ValidationError,
)

from fedsplit.config.renamed import with_current_names
from fedsplit.errors import ConfigError
from fedsplit.spec import RunSpec

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def make_schema() -> DictConfig:
    """`RunSpec` and its defaults as a schema that can be composed onto; the caller's own."""
    return copy.deepcopy(_schema())


@cache
def _schema() -> DictConfig:
    """The one that all are copies of: clients read their run anew for every message."""
    schema: DictConfig = OmegaConf.structured(RunSpec)
    _thaw(schema)
    return schema


def _thaw(node: DictConfig) -> None:
    """Undo what a frozen dataclass says of its nodes, and let free-form fields take any key."""
    OmegaConf.set_readonly(node, None)
    if OmegaConf.get_type(node) is dict:
        OmegaConf.set_struct(node, False)
    for child in node.values():
        if isinstance(child, DictConfig):
            _thaw(child)


def from_dictconfig(config: DictConfig) -> RunSpec:
    """Freeze a composed config.

    Raises:
        ConfigError: It has a key or a value that `RunSpec` does not allow.
    """
    try:
        # Merged again, although it was composed onto the schema: `+key=value` slips past that.
        spec = OmegaConf.to_object(OmegaConf.merge(_schema(), config))
    except OmegaConfBaseException as exc:
        raise told(exc) from exc
    if not isinstance(spec, RunSpec):
        raise ConfigError(f"a run is a mapping of fields, not {type(spec).__name__}")
    return spec


def to_yaml(spec: RunSpec) -> str:
    """The whole run as YAML; `from_yaml` gives an equal one back."""
    return yaml.safe_dump(asdict(spec), sort_keys=False)


def from_yaml(text: str) -> RunSpec:
    """Read what `to_yaml` wrote. A field that is not there has its default.

    Raises:
        ConfigError: The text is not YAML of plain values, or not a run.
    """
    if "${" in text:
        raise ConfigError("config holds '${', but a resolved run has no interpolations")
    try:
        loaded = yaml.safe_load(text)
        if not isinstance(loaded, dict):
            raise ConfigError(f"config is {loaded!r}, but a run is a mapping of fields")
        return from_dictconfig(OmegaConf.create(with_current_names(loaded)))
    except (yaml.YAMLError, OmegaConfBaseException) as exc:
        raise ConfigError(f"config is not YAML of plain values: {_first_line(exc)}") from exc


def told(exc: Exception) -> ConfigError:
    """An error of Hydra or OmegaConf in words that name field, value and what is allowed."""
    if isinstance(exc.__cause__, OmegaConfBaseException):
        return told(exc.__cause__)
    key = getattr(exc, "full_key", None) or ""
    if isinstance(exc, ConfigKeyError | ConfigAttributeError):
        return ConfigError(f"there is no field {key}; {_hint(key)}")
    word = _WORDS.get(type(OmegaConf.select(_schema(), key))) if key else None
    if isinstance(exc, ValidationError) and word:
        return ConfigError(f"{key}={exc.value!r} must be {word}")
    return ConfigError(_first_line(exc))


def field_names(node: Mapping[str, Any] | None = None, prefix: str = "") -> Iterator[str]:
    """The dotted names of all fields.

    >>> list(field_names({"seed": 0, "split": {"bottom": 1, "top": 1}}))
    ['seed', 'split.bottom', 'split.top']
    """
    for name, value in (asdict(RunSpec()) if node is None else node).items():
        if isinstance(value, dict) and value:
            yield from field_names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _hint(key: str) -> str:
    names = list(field_names())
    same = [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = same or difflib.get_close_matches(key, names)
    return f"did you mean {' or '.join(near)}?" if near else f"fields are: {', '.join(names)}"


def _first_line(exc: Exception) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0]
