"""Overrides: parsed and checked one by one, with error texts of our own, before Hydra."""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsplit.config.location import conf_dir
from fedsplit.config.renamed import current_name
from fedsplit.config.schema import as_config_error, field_names, has_interpolation, make_schema
from fedsplit.errors import ConfigError
from fedsplit.spec import RunSpec, SplitSpec

RunConfig: TypeAlias = Mapping[str, bool | int | float | str]
"""The run config that Flower passes to an app."""

RUN_CONFIG_KEYS = {
    "name": "name",
    "seed": "seed",
    "clients": "clients",
    "experiment": "experiment",
    "model": "model",
    "split": "split",
    "lora": "lora",
    "data": "data",
    "data-path": "data.path",
    "sharding": "sharding",
    "train": "train",
    "rounds": "train.rounds",
    "local-steps": "train.local_steps",
    "batch-size": "train.batch_size",
    "lr": "train.lr",
    "policy": "policy",
    "wire": "wire",
    "client-weights": "client_weights",
    "strategy": "strategy",
    "task": "task",
    "baseline": "baseline",
    "resume": "resume",
}
"""Keys of `[tool.flwr.app.config]`, and the group or field that each one sets."""
NO_SETTINGS = ("run-id", "end-mark")
"""Keys of it that are for a program that starts the app again, and no settings of the run."""


_LISTS = ("lora.targets", "launch.trunk_device")
"""Text fields that hold a list with commas."""

SEARCH_PATH = "hydra.searchpath"
"""Hydra's setting of more folders with options, such as a user's own experiments."""


def parse(overrides: Sequence[str], *, sweep: bool = False) -> list[Override]:
    """Parse overrides; `split=1/2/1` becomes overrides of three fields.

    Args:
        overrides: As typed. A `~` at the beginning of a value is the home folder, as in a shell.
        sweep: Whether values with commas are the values of a sweep, also in fields that hold a
            list with commas.

    Raises:
        ConfigError: One of them is not `group=option` or `field=value`.
    """
    return [override for text in overrides for override in _parse_one(_at_home(text), sweep)]


def _at_home(text: str) -> str:
    if "'" in text or '"' in text:
        return text
    return re.sub(r"(?<=[=,])~(?=[/,]|$)", lambda _: str(Path.home()), text)


def _parse_one(text: str, sweep: bool) -> list[Override]:
    parser = OverridesParser.create()
    try:
        override = parser.parse_override(text)
    # Deeply nested brackets raise RecursionError.
    except (HydraException, RecursionError) as exc:
        hint = f"put the value in quotes: {_quoted(text)}" if "=" in text[1:] else _FORM
        raise ConfigError(f"{text!r} cannot be read; {hint}") from exc
    if not override.key_or_group:
        raise ConfigError(f"{text!r} names no field; {_FORM}")
    if (name := current_name(override.key_or_group)) != override.key_or_group:
        return _parse_one(text.replace(override.key_or_group, name, 1), sweep)
    if name in _LISTS and not sweep and _is_listed(override):
        return [parser.parse_override(_with_literal(text))]
    if override.key_or_group != "split" or "/" not in text:
        return [override]
    if override.is_sweep_override():
        raise ConfigError(f"{text} cannot be swept; sweep over split.bottom and split.top instead")
    counts = asdict(SplitSpec.parse(str(override.value())))
    return [parser.parse_override(f"split.{part}={count}") for part, count in counts.items()]


_FORM = "write group=option or field=value"


def _is_listed(override: Override) -> bool:
    """Return whether an override has the form a,b."""
    value = override.value()
    return isinstance(value, ChoiceSweep) and value.simple_form


def _with_literal(text: str) -> str:
    """Return an override with its value in quotes."""
    key, _, value = text.partition("=")
    return f"{key}={QuotedString(text=value, quote=Quote.double).with_quotes()}"


def _quoted(text: str) -> str:
    """Return an override with its value in quotes, as it is typed in a shell."""
    return shlex.quote(_with_literal(text))


def check(overrides: Sequence[Override]) -> None:
    """Check overrides; Hydra would accept some wrong ones, and its errors do not say enough.

    Raises:
        ConfigError: There is no such option or field, or the value has the wrong type.
    """
    schema = make_schema()
    folders = [conf_dir(), *_search_path(overrides)]
    for override in overrides:
        _check(override, schema, folders)


def require_portable(words: Sequence[str]) -> None:
    """Refuse overrides that mean something else on each machine that reads them.

    Args:
        words: The overrides of a run config, which Flower sends to every client's machine.

    Raises:
        ConfigError: A value has an interpolation or begins with `~`, or a setting is Hydra's own.
    """
    for word in words:
        if _at_home(word) != word:
            raise ConfigError(f"{word}: ~ is another folder on each machine; write the whole path")
        if "${" in word:
            raise _interpolated(word)
    for override in parse(words):
        text = str(override.input_line)
        # An escaped bracket becomes an interpolation when Hydra reads it.
        if has_interpolation(override.value()):
            raise _interpolated(text)
        if _is_of_hydra(str(override.key_or_group)):
            raise ConfigError(f"{text}: a run config has fields of a run only; leave it out")


def _interpolated(text: str) -> ConfigError:
    return ConfigError(
        f"{text} has an interpolation, which every client's machine would resolve for itself; "
        "write the value"
    )


def _is_of_hydra(key: str) -> bool:
    """Return whether a key is one of Hydra's own settings, such as hydra.sweep.dir."""
    return bool(re.match(r"hydra\b", key))


def _search_path(overrides: Iterable[Override]) -> list[Path]:
    values = [o.value() for o in overrides if o.key_or_group == SEARCH_PATH]
    listed = [str(url) for value in values if isinstance(value, list) for url in value]
    return [Path(url.removeprefix("file://")) for url in listed if "pkg://" not in url]


def _check(override: Override, schema: DictConfig, folders: Sequence[Path]) -> None:
    key = str(override.key_or_group)
    if _is_of_hydra(key):
        return
    if override.is_delete():
        # In a field with free keys, Hydra removes the key.
        if OmegaConf.get_type(OmegaConf.select(schema, key.rpartition(".")[0])) is dict:
            return
        raise ConfigError(f"~{key}: a run has all its fields; set {key}=... instead")
    if override.is_sweep_override():
        raise ConfigError(_not_a_sweep(override))
    options = _options(key, folders)
    if options:
        _check_option(key, override.value(), options)
        return
    try:
        OmegaConf.update(schema, key, override.value())
    except OmegaConfBaseException as exc:
        raise as_config_error(exc) from exc


def _not_a_sweep(override: Override) -> str:
    text = str(override.input_line)
    told = f"{text} lists several values; that takes -m, and commas between them"
    return (
        f"{told}. A text with commas takes quotes: {_quoted(text)}"
        if _is_listed(override)
        else told
    )


def is_group(key: str) -> bool:
    """Return whether `key` is a group of `conf/`; its options are selected by name."""
    return bool(_options(key, [conf_dir()]))


def _options(group: str, folders: Iterable[Path]) -> list[str]:
    """Return the options of a group in these folders; none if there is no such group."""
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


def _check_option(group: str, value: object, options: Sequence[str]) -> None:
    if value in options:
        return
    section: Any = getattr(RunSpec(), group, None)
    if isinstance(value, str) and hasattr(section, "kind"):
        # The spec raises an error of its own for a planned value.
        type(section)(kind=value)
    fields = [name for name in field_names() if name.startswith(f"{group}.")]
    or_else = f"; or set one of its fields: {', '.join(fields)}" if fields else ""
    raise ConfigError(f"{group}={value} is not one of: {', '.join(options)}{or_else}")


def from_keys(run_config: RunConfig) -> list[str]:
    """Return the overrides for the keys of a run config, then those of the key `overrides`.

    >>> from_keys({"rounds": 3, "model": "tiny_llama", "overrides": "train.lr=0.1 lora=on"})
    ['train.rounds=3', "model='tiny_llama'", 'train.lr=0.1', 'lora=on']

    Raises:
        ConfigError: There is no such key, or the quotes in `overrides` do not match.
    """
    keys = dict(run_config)
    try:
        free = shlex.split(str(keys.pop("overrides", "")))
    except ValueError as exc:
        raise ConfigError(f"overrides cannot be read ({exc}); mind its quotes") from exc
    unknown = keys.keys() - RUN_CONFIG_KEYS.keys()
    if unknown:
        raise ConfigError(
            f"run config has the unknown keys {', '.join(sorted(unknown))}; allowed: "
            f"{', '.join([*RUN_CONFIG_KEYS, 'overrides', 'config', 'run-dir', *NO_SETTINGS])}"
        )
    return [f"{RUN_CONFIG_KEYS[key]}={_literal(value)}" for key, value in keys.items()] + free


def _literal(value: bool | int | float | str) -> str:
    """Return a value in the grammar of Hydra's overrides."""
    # Unquoted, a comma in a path would be a sweep.
    if isinstance(value, str):
        return QuotedString(text=value, quote=Quote.single).with_quotes()
    return str(value).lower()
