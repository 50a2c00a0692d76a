"""The interface to Hydra: makes a frozen `RunSpec` of `conf/`, overrides, or YAML.

No other package imports hydra or omegaconf, and none of their objects leaves this one. Their
errors become `ConfigError`, with the field, the value and the allowed values.
"""

from fedsplit.config.commandline import CommandLine, Variants
from fedsplit.config.compose import changed, compose, from_run_config
from fedsplit.config.schema import from_dictconfig, from_yaml, to_yaml
from fedsplit.config.targets import build, resolve, resolve_class

__all__ = [
    "CommandLine",
    "Variants",
    "build",
    "changed",
    "compose",
    "from_dictconfig",
    "from_run_config",
    "from_yaml",
    "resolve",
    "resolve_class",
    "to_yaml",
]
