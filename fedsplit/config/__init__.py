"""The border to Hydra: `conf/` and overrides go in, a frozen `RunSpec` comes out, once.

No other place imports hydra or omegaconf, and nothing of theirs leaves this one: below it there
is no DictConfig. Their errors become `ConfigError`, with the field, the value and what is allowed.
"""

from fedsplit.config.commandline import Variants, main
from fedsplit.config.compose import changed, compose, from_run_config
from fedsplit.config.schema import from_dictconfig, from_yaml, to_yaml
from fedsplit.config.targets import build, resolve

__all__ = [
    "Variants",
    "build",
    "changed",
    "compose",
    "from_dictconfig",
    "from_run_config",
    "from_yaml",
    "main",
    "resolve",
    "to_yaml",
]
