"""The command line of a run: that of Hydra, but all of it is checked before the first job."""

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
"""The runs of an experiment (`sweep.variants`) by variant, one for each seed."""

_ADD = "add a variant: 'sweep.variants.NAME=\"field=value\"'"
_MULTIRUN = {"-m", "--multirun"}


def main(
    task: Callable[[RunSpec], object], sweep_task: Callable[[RunSpec, Variants], object]
) -> None:
    """Call `task` with the run of the command line, or with each run of a Hydra sweep (-m).

    An experiment (`sweep.variants`) is passed to `sweep_task` in place of `task`, with or without
    -m. A FedsplitError ends the process with one line on stderr and status 1.

    Args:
        task: Gets one run.
        sweep_task: Gets the experiment's own settings and the runs of its variants.
    """
    flags = [a for a in sys.argv[1:] if not _is_override(a)]
    words = [a for a in sys.argv[1:] if _is_override(a)]
    try:
        overrides = parse(words)
        # All jobs are composed here, so that a wrong one fails before the first one starts.
        runs = [compose(job) for job in _jobs(overrides, sweep=bool(_MULTIRUN & set(flags)))]
        if runs[0].sweep.variants and _MULTIRUN.issuperset(flags):
            # Not in a Hydra job: Hydra's singleton does not allow to compose there.
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

    # Hydra reads sys.argv, and does not know short forms such as split=1/2/1.
    sys.argv[1:] = flags + [str(override.input_line) for override in overrides]
    store_schema()
    run()


def _is_override(argument: str) -> bool:
    return argument.startswith("~") or ("=" in argument and not argument.startswith("-"))


def _jobs(overrides: Sequence[Override], sweep: bool) -> Iterator[tuple[str, ...]]:
    """Yield the overrides of each job: in a sweep, every combination of the listed values."""

    def values(override: Override) -> list[str]:
        # Hydra expands a glob over the options of a group; `check` refuses it.
        listed = override.is_discrete_sweep() and not isinstance(override.value(), Glob)
        if sweep and listed:
            key = override.get_key_element()
            return [f"{key}={value}" for value in override.sweep_string_iterator()]
        return [str(override.input_line)]

    return itertools.product(*map(values, overrides))


def _variants(runs: Sequence[RunSpec], words: Sequence[str]) -> Variants:
    """Return the runs of an experiment, in a folder of its name.

    The overrides of a variant take precedence over those of the command line.

    Args:
        runs: The jobs of the command line; only one is allowed.
        words: The overrides of the command line.

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
        # shlex raises ValueError for a quote without its pair.
        except (ConfigError, ValueError) as exc:
            raise ConfigError(
                f"sweep.variants.{name} ({line}): {exc}. Every variant takes what the command line "
                f"sets; for what only some can take, {_ADD}"
            ) from exc
    return variants
