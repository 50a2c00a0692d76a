"""Composition: `conf/` plus overrides, or Flower's run config, to a `RunSpec`."""

import threading
from collections.abc import Sequence
from dataclasses import asdict, replace

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsplit.config.location import conf_dir
from fedsplit.config.overrides import RunConfig, check, from_keys, is_group, parse
from fedsplit.config.schema import from_dictconfig, from_yaml, make_schema, told
from fedsplit.errors import ConfigError
from fedsplit.spec import RunSpec

_HYDRA = threading.Lock()  # Hydra keeps its state in a singleton: one composition at a time.


def compose(overrides: Sequence[str] = ()) -> RunSpec:
    """The run that `conf/` and some overrides describe; not to be called in a Hydra job.

    >>> compose(["model=tiny_llama", "split=1/2/1"]).model.family
    'llama'

    Args:
        overrides: `group=option` and `field=value`; `split=1/2/1` stands for its three fields.

    Raises:
        ConfigError: An override cannot be read, or names something that is not allowed.
    """
    parsed = parse(overrides)
    check(parsed)
    with _HYDRA:
        store_schema()
        try:
            with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
                config = hydra.compose("config", [str(o.input_line) for o in parsed])
        except (HydraException, OmegaConfBaseException) as exc:
            raise told(exc) from exc
    return from_dictconfig(config)


def changed(run: RunSpec, overrides: Sequence[str]) -> RunSpec:
    """A run with other values in some fields; a group's option cannot be chosen again.

    >>> changed(RunSpec(), ["train.lr=0.5"]).train.lr
    0.5

    Args:
        run: What to start from.
        overrides: `field=value`, or `split=1/2/1`.

    Raises:
        ConfigError: An override cannot be read, or names no field.
    """
    config = OmegaConf.create(asdict(run))
    parsed = parse(overrides)
    check(parsed)
    for override in parsed:
        key = str(override.key_or_group)
        if is_group(key):
            raise ConfigError(f"{key} was chosen when the run began; set one of its fields")
        OmegaConf.update(config, key, override.value())
    return from_dictconfig(config)


def from_run_config(run_config: RunConfig) -> RunSpec:
    """The run that Flower's run config describes; an empty value means what `conf/` says.

    `config` is a whole run as YAML and wins over every key but `run-dir`, which only says where
    results go.

    Raises:
        ConfigError: A key or a value is not allowed.
    """
    given = {key: value for key, value in run_config.items() if value != ""}
    text, run_dir = given.pop("config", None), given.pop("run-dir", None)
    spec = compose(from_keys(given)) if text is None else from_yaml(str(text))
    if run_dir is None:
        return spec
    return replace(spec, launch=replace(spec.launch, run_dir=str(run_dir)))


def store_schema() -> None:
    """Put the schema where the defaults list of `conf/config.yaml` finds it."""
    ConfigStore.instance().store("schema", make_schema())
