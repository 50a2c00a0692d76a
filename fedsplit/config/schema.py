"""The schema: `RunSpec` as a config of OmegaConf, the way back, and the errors of both."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

import yaml
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    OmegaConfBaseException,
    ValidationError,
)

from fedsplit.config.hints import hint
from fedsplit.config.renamed import with_current_names
from fedsplit.errors import ConfigError
from fedsplit.spec import RunSpec

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_OF_PLUGINS = ("hydra/launcher", "hydra/sweeper")


def make_schema() -> DictConfig:
    """Return a new schema: `RunSpec` with its defaults, onto which Hydra composes a config."""
    return copy.deepcopy(_schema())


@cache
def _schema() -> DictConfig:
    # Cached, since it takes long to build and clients read their run for every message.
    schema: DictConfig = OmegaConf.structured(RunSpec)
    _thaw(schema)
    return schema


def _thaw(node: DictConfig) -> None:
    """Make the nodes of frozen dataclasses writable, and allow any key in fields of type dict."""
    OmegaConf.set_readonly(node, None)
    if OmegaConf.get_type(node) is dict:
        OmegaConf.set_struct(node, False)
    for child in node.values():
        if isinstance(child, DictConfig):
            _thaw(child)


def from_dictconfig(config: DictConfig) -> RunSpec:
    """Return the run of a composed config.

    Raises:
        ConfigError: It has a key or a value that `RunSpec` does not allow.
    """
    try:
        # Merged again: `+key=value` adds a key to a config that was composed onto the schema.
        spec = OmegaConf.to_object(OmegaConf.merge(_schema(), config))
    except OmegaConfBaseException as exc:
        raise as_config_error(exc) from exc
    if not isinstance(spec, RunSpec):
        raise ConfigError(f"a run is a mapping of fields, not {type(spec).__name__}")
    return spec


def to_yaml(spec: RunSpec) -> str:
    """Return the whole run as YAML; `from_yaml` returns an equal run."""
    return yaml.safe_dump(asdict(spec), sort_keys=False)


def from_yaml(text: str) -> RunSpec:
    """Return the run of a text of `to_yaml`; a missing field has its default.

    Raises:
        ConfigError: The text is not YAML of plain values, or not a run.
    """
    try:
        loaded = yaml.load(text, _Loader)
        if not isinstance(loaded, dict):
            raise ConfigError(f"config is {loaded!r}, but a run is a mapping of fields")
        # An interpolation of OmegaConf can read the environment of this process. It is searched in
        # the values, since YAML can write its characters as escapes.
        if has_interpolation(loaded):
            raise ConfigError("config holds '${', but a resolved run has no interpolations")
        return from_dictconfig(OmegaConf.create(with_current_names(loaded)))
    # Deeply nested brackets raise RecursionError.
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as exc:
        raise ConfigError(f"config is not YAML of plain values: {_first_line(exc)}") from exc


class _Loader(yaml.SafeLoader):
    """A loader of plain values that refuses aliases: with them, a short text can be a huge one."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node, and refuse an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias; write the value in its place")
        return super().compose_node(parent, index)


def has_interpolation(value: object) -> bool:
    """Return whether a value, or one in it, is text that OmegaConf would resolve.

    >>> has_interpolation({"name": ["a", "${oc.env:HOME}"]}), has_interpolation("$HOME")
    (True, False)
    """
    if isinstance(value, Mapping):
        return any(map(has_interpolation, [*value.keys(), *value.values()]))
    if isinstance(value, list):
        return any(map(has_interpolation, value))
    return isinstance(value, str) and "${" in value


def as_config_error(exc: Exception) -> ConfigError:
    """Return an error of Hydra or OmegaConf as one with the field, its value and the type."""
    # Hydra wraps errors of OmegaConf, which have the key.
    if isinstance(exc.__cause__, OmegaConfBaseException):
        return as_config_error(exc.__cause__)
    if isinstance(exc, MissingConfigException) and exc.missing_cfg_file:
        group, _, option = exc.missing_cfg_file.rpartition("/")
        if group in _OF_PLUGINS:
            plugin = f"hydra-{option.partition('_')[0]}-{group.removeprefix('hydra/')}"
            return ConfigError(
                f"{group}={option}: no plugin of Hydra that is installed here has it; plugins are "
                f"named as in: pip install {plugin}"
            )
    key = getattr(exc, "full_key", None) or ""
    if isinstance(exc, ConfigKeyError | ConfigAttributeError):
        return ConfigError(f"there is no field {key}; {hint(key, list(field_names()), _groups())}")
    word = _WORDS.get(type(OmegaConf.select(_schema(), key))) if key else None
    if isinstance(exc, ValidationError) and word:
        return ConfigError(f"{key}={exc.value!r} must be {word}")
    return ConfigError(_first_line(exc))


def field_names(node: Mapping[str, Any] | None = None, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all fields.

    >>> list(field_names({"seed": 0, "split": {"bottom": 1, "top": 1}}))
    ['seed', 'split.bottom', 'split.top']
    """
    for name, value in (asdict(RunSpec()) if node is None else node).items():
        # An empty dict is a field with free keys, not a group.
        if isinstance(value, dict) and value:
            yield from field_names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _groups() -> list[str]:
    return [name for name, value in asdict(RunSpec()).items() if isinstance(value, dict)]


def _first_line(exc: Exception) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0]
