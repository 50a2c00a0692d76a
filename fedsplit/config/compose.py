"""The composition of a `RunSpec` from `conf/` and overrides, or from Flower's run config."""

import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import lru_cache

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsplit.config.location import conf_dir
from fedsplit.config.overrides import (
    NO_SETTINGS,
    RunConfig,
    check,
    from_keys,
    is_group,
    parse,
    require_portable,
)
from fedsplit.config.schema import as_config_error, from_dictconfig, from_yaml, make_schema
from fedsplit.errors import ConfigError
from fedsplit.spec import RunSpec

# Hydra keeps its state in a singleton, so only one thread may compose at a time.
_HYDRA = threading.Lock()

# Each message of a run has the same text, and a client takes about as long to parse it as to train
# a small model for a step.
_parsed = lru_cache(maxsize=4)(from_yaml)


def compose(overrides: Sequence[str] = ()) -> RunSpec:
    """Compose a run from `conf/` and overrides; a Hydra job must not call this.

    >>> compose(["model=tiny_llama", "split=1/2/1"]).model.family
    'llama'

    Args:
        overrides: `group=option` and `field=value`; `split=1/2/1` stands for its three fields.

    Raises:
        ConfigError: An override cannot be read, or its field or value is not allowed.
    """
    parsed = parse(overrides)
    check(parsed)
    with _HYDRA:
        store_schema()
        try:
            with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
                config = hydra.compose("config", [str(o.input_line) for o in parsed])
        except (HydraException, OmegaConfBaseException) as exc:
            raise as_config_error(exc) from exc
    return from_dictconfig(config)


def changed(run: RunSpec, overrides: Sequence[str]) -> RunSpec:
    """Return a run with other values in some fields; options of groups cannot be changed.

    >>> changed(RunSpec(), ["train.lr=0.5"]).train.lr
    0.5

    Args:
        run: The run to change.
        overrides: `field=value`, or `split=1/2/1`.

    Raises:
        ConfigError: An override cannot be read, or names no field.
    """
    config = OmegaConf.create(asdict(run))
    parsed = parse(overrides)
    check(parsed)
    for override in parsed:
        key = str(override.key_or_group)
        if is_group(key) or override.is_delete():
            raise ConfigError(f"{key} was chosen when the run began; set one of its fields")
        OmegaConf.update(config, key, override.value())
    return from_dictconfig(config)


def from_run_config(run_config: RunConfig) -> RunSpec:
    """Return the run of Flower's run config; an empty value means the default of `conf/`.

    The key `config` is a whole run as YAML and takes precedence over all other keys except
    `run-dir`, the folder for results. The keys `run-id` and `end-mark` are no settings
    of the run.

    Raises:
        ConfigError: A key or a value is not allowed, or a value is an interpolation.
    """
    # Flower requires a default for every key, and pyproject.toml has empty ones.
    keys = {key: value for key, value in run_config.items() if value != ""}
    for key in NO_SETTINGS:
        keys.pop(key, None)
    text, run_dir = keys.pop("config", None), keys.pop("run-dir", None)
    spec = _composed(from_keys(keys)) if text is None else _parsed(str(text))
    if run_dir is None:
        return spec
    return replace(spec, launch=replace(spec.launch, run_dir=str(run_dir)))


def _composed(words: Sequence[str]) -> RunSpec:
    require_portable(words)
    return compose(words)


def store_schema() -> None:
    """Register the schema under the name that the defaults list of `conf/config.yaml` uses."""
    ConfigStore.instance().store("schema", make_schema())
