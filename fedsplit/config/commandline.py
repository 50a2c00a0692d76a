"""The command line of a run: Hydra's, but checked whole before the first job starts."""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence

import hydra
from hydra.core.override_parser.types import Glob, Override
from omegaconf import DictConfig

from fedsplit.config.compose import compose, store_schema
from fedsplit.config.overrides import parse
from fedsplit.config.schema import from_dictconfig
from fedsplit.errors import ConfigError, FedsplitError
from fedsplit.spec import RunSpec


def main(task: Callable[[RunSpec], object]) -> None:
    """Run `task` with the run that the command line describes; with -m, with each of a sweep.

    An error of ours ends the process with one line on stderr and status 1.
    """
    flags = [a for a in sys.argv[1:] if not _is_override(a)]
    try:
        overrides = parse([a for a in sys.argv[1:] if _is_override(a)])
        for job in _jobs(overrides, sweep=bool({"-m", "--multirun"} & set(flags))):
            compose(job)
    except ConfigError as exc:
        sys.exit(f"error: {exc}")

    @hydra.main(config_path="pkg://conf", config_name="config", version_base="1.3")
    def run(config: DictConfig) -> None:
        try:
            task(from_dictconfig(config))
        except FedsplitError as exc:
            sys.exit(f"error: {exc}")

    sys.argv[1:] = flags + [str(override.input_line) for override in overrides]
    store_schema()
    run()


def _is_override(argument: str) -> bool:
    return argument.startswith("~") or ("=" in argument and not argument.startswith("-"))


def _jobs(overrides: Sequence[Override], sweep: bool) -> Iterator[tuple[str, ...]]:
    """The overrides of each job: in a sweep, every combination of the values listed."""

    def values(override: Override) -> list[str]:
        listed = override.is_discrete_sweep() and not isinstance(override.value(), Glob)
        if sweep and listed:
            key = override.get_key_element()
            return [f"{key}={value}" for value in override.sweep_string_iterator()]
        return [str(override.input_line)]

    return itertools.product(*map(values, overrides))
