"""The command line of a run: Hydra's, but checked whole before the first job starts."""

import itertools
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import hydra
from hydra.core.override_parser.types import Glob, Override
from omegaconf import DictConfig

from fedsplit.config.compose import compose, store_schema
from fedsplit.config.location import conf_dir
from fedsplit.config.overrides import parse
from fedsplit.config.schema import from_dictconfig
from fedsplit.errors import ConfigError, FedsplitError
from fedsplit.spec import RunSpec, SweepSpec

Variants = dict[str, list[RunSpec]]
"""The runs of an experiment with a sweep of its own: of each variant one for each seed."""

_ADD = "add a variant: 'sweep.variants.NAME=\"field=value\"'"
_MULTIRUN = {"-m", "--multirun"}


def main(
    task: Callable[[RunSpec], object], sweep_task: Callable[[RunSpec, Variants], object]
) -> None:
    """Run `task` with the run that the command line describes; with -m, with each of a sweep.

    A run that is a sweep itself (`sweep.variants`) goes to `sweep_task`, with or without -m. An
    error of ours ends the process with one line on stderr and status 1.
    """
    flags = [a for a in sys.argv[1:] if not _is_override(a)]
    words = [a for a in sys.argv[1:] if _is_override(a)]
    try:
        overrides = parse(words)
        runs = [compose(job) for job in _jobs(overrides, sweep=bool(_MULTIRUN & set(flags)))]
        if runs[0].sweep.variants and _MULTIRUN.issuperset(flags):
            # Not in a Hydra job: there nothing can be composed.
            sweep_task(runs[0], _variants(runs, words))
            return
    except FedsplitError as exc:
        sys.exit(f"error: {exc}")

    @hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")
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


def _variants(runs: Sequence[RunSpec], words: Sequence[str]) -> Variants:
    """The runs of a sweep of its own, in a folder named after it; later overrides win.

    Raises:
        ConfigError: A variant cannot be composed, or the command line lists values too.
    """
    sweep = runs[0]
    if len(runs) > 1:
        raise ConfigError(
            f"{sweep.name} is a sweep of its own ({', '.join(sweep.sweep.variants)}), so no values "
            f"can be listed beside it; {_ADD}"
        )
    folder = str(Path(sweep.launch.run_dir, sweep.name))
    variants: Variants = {}
    for name, line in sweep.sweep.variants.items():
        try:
            run = compose([*words, *shlex.split(line)])
            variants[name] = [
                replace(
                    run,
                    name=f"{name}-seed{seed}",
                    seed=seed,
                    sweep=SweepSpec(),
                    launch=replace(run.launch, run_dir=folder),
                )
                for seed in sweep.sweep.seeds
            ]
        except (ConfigError, ValueError) as exc:
            raise ConfigError(
                f"sweep.variants.{name} ({line}): {exc}. Every variant takes what the command line "
                f"sets; for what only some can take, {_ADD}"
            ) from exc
    return variants
