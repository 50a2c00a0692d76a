"""The command line of a run: that of Hydra, but all of it is checked before the first job."""

import itertools
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from fedsplit import atomic
from fedsplit.config.compose import compose, store_schema
from fedsplit.config.help import help_page
from fedsplit.config.location import conf_dir
from fedsplit.config.overrides import SEARCH_PATH, parse
from fedsplit.config.paths import with_absolute_paths
from fedsplit.config.schema import from_dictconfig
from fedsplit.console import print_error
from fedsplit.errors import ConfigError, error_text
from fedsplit.spec import RunSpec, SweepSpec

Variants = dict[str, list[RunSpec]]
"""The runs of an experiment (`sweep.variants`) by variant, one for each seed."""

_ADD = "add a variant: 'sweep.variants.NAME=\"field=value\"'"
_MULTIRUN = {"-m", "--multirun"}
_HELP = {"-h", "--help"}
_CONFIG_DIR = ("-cd", "--config-dir")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandLine:
    """A command line, with all runs that it stands for.

    Attributes:
        runs: The runs of its jobs. If a sweeper chooses the values, a run for each bound of them.
        variants: The runs of an experiment; empty for a run or a Hydra sweep.
        help: The help, if it asks for that; otherwise empty.
        is_sweep: Whether it asks for a Hydra sweep (-m).
        debug: Whether errors are reported with a traceback.
        arguments: What Hydra reads.
    """

    runs: list[RunSpec]
    variants: Variants
    help: str
    is_sweep: bool
    debug: bool
    arguments: list[str]

    @staticmethod
    def read(arguments: Sequence[str]) -> "CommandLine":
        """Read the arguments of a program; paths become absolute.

        Raises:
            ConfigError: The run, or one job of the sweep, cannot be composed.
        """
        flags, words = _flags_and_overrides(arguments)
        debug = "--debug" in flags
        flags = [flag for flag in flags if flag != "--debug"]
        is_sweep = bool(_MULTIRUN & set(flags))
        overrides = parse(words, sweep=is_sweep)
        # All jobs are composed here, so that a wrong one fails before the first one starts.
        jobs = _jobs(overrides) if is_sweep else [_texts(overrides)]
        composed = [compose(job) for job in jobs]
        runs = [with_absolute_paths(run, Path.cwd()) for run in composed]
        is_experiment = bool(runs[0].sweep.variants) and _MULTIRUN.issuperset(flags)
        return CommandLine(
            runs=runs,
            variants=_variants(runs, overrides, words) if is_experiment else {},
            help=help_page(composed[0]) if _HELP & set(flags) else "",
            is_sweep=is_sweep,
            debug=debug,
            arguments=[*flags, *_texts(overrides)],
        )

    def launch(self, task: Callable[[RunSpec], float]) -> None:
        """Call `task` with the run, or with each run of a Hydra sweep (-m), or print the help.

        A sweep goes on after a job that failed, and the process ends with status 1 after the last
        job.

        Args:
            task: Returns the value that a sweeper minimizes. A launcher may pickle it for another
                process.

        Raises:
            StorageError: The folder of the sweep's runs cannot be made.
            SystemExit: A job failed; its error has been printed.
        """
        if self.help:
            print(self.help)
            return
        if self.is_sweep:
            # Hydra makes it too, but reports a failure with a traceback.
            for folder in {run.launch.run_dir for run in self.runs}:
                atomic.make_folder(Path(folder))
        # Hydra reads sys.argv.
        sys.argv[1:] = self.arguments
        store_schema()
        job = _Job(task=task, debug=self.debug)
        hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(job)()


class _JobFailed(CompactHydraException):
    """A job of a sweep failed. Hydra prints the text of this class, and no traceback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """The function that Hydra calls with the config of each job; an object can be pickled."""

    task: Callable[[RunSpec], float]
    debug: bool

    def __call__(self, config: DictConfig) -> float:
        settings = HydraConfig.get()
        try:
            run = from_dictconfig(config)
            return self.task(with_absolute_paths(run, Path(settings.runtime.cwd)))
        except Exception as exc:
            # Here, because Hydra would print a single run's error with a traceback of its own, and
            # of a sweep only the first error, after the last job.
            if settings.mode is RunMode.RUN:
                print_error(exc, debug=self.debug)
                sys.exit(1)
            job = f"job {settings.job.num}"
            overrides = shlex.join(settings.overrides.task)
            print_error(exc, debug=self.debug, subject=f"{job} ({overrides})")
            raise _JobFailed(f"error: {job}: {error_text(exc)}") from exc


def _flags_and_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return Hydra's flags, and the overrides, to which those of --config-dir are added.

    Raises:
        ConfigError: --config-dir is not a folder.
    """
    flags: list[str] = []
    words: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        flag, _, value = argument.partition("=")
        if flag in _CONFIG_DIR:
            folder = Path(value or next(rest, "")).expanduser().resolve()
            if not folder.is_dir():
                raise ConfigError(f"{flag} {folder} is not a folder; name one with options")
            # Hydra reads this setting as well where it composes without a command line.
            words.append(f"{SEARCH_PATH}=['file://{folder}']")
        elif argument.startswith("~") or ("=" in argument and not argument.startswith("-")):
            words.append(argument)
        else:
            flags.append(argument)
    return flags, words


def _texts(overrides: Sequence[Override]) -> tuple[str, ...]:
    return tuple(str(override.input_line) for override in overrides)


def _jobs(overrides: Sequence[Override]) -> Iterator[tuple[str, ...]]:
    """Yield the overrides of each job of a sweep.

    Hydra's own sweeper takes every combination of the listed values. Other sweepers choose, so
    that only each value with the first values of the other fields is certain to be tried.
    """
    sweepers = [override for override in overrides if override.key_or_group == "hydra/sweeper"]
    values = [_values(override, chosen=bool(sweepers)) for override in overrides]
    if not sweepers:
        yield from itertools.product(*values)
        return
    first = [listed[0] for listed in values]
    yield tuple(first)
    for number, listed in enumerate(values):
        for value in listed[1:]:
            yield (*first[:number], value, *first[number + 1 :])


def _values(override: Override, *, chosen: bool) -> list[str]:
    key, value = override.get_key_element(), override.value()
    # Hydra's own sweeper takes no interval; `check` refuses it.
    if isinstance(value, IntervalSweep) and chosen:
        return [f"{key}={bound}" for bound in (value.start, value.end)]
    # Hydra expands a glob over the options of a group; `check` refuses it.
    if override.is_discrete_sweep() and not isinstance(value, Glob):
        return [f"{key}={element}" for element in override.sweep_string_iterator()]
    return [str(override.input_line)]


def _variants(
    runs: Sequence[RunSpec], overrides: Sequence[Override], words: Sequence[str]
) -> Variants:
    """Return the runs of an experiment, in a folder of its name.

    The overrides of a variant take precedence over those of the command line.

    Args:
        runs: The jobs of the command line; only one is allowed.
        overrides: The overrides of the command line.
        words: The overrides as typed.

    Raises:
        ConfigError: A variant cannot be composed, or the command line lists values too or chooses
            a launcher.
    """
    sweep = runs[0]
    for override in overrides:
        if override.key_or_group in ("hydra/launcher", "hydra/sweeper"):
            raise ConfigError(
                f"{override.input_line} has no effect: {sweep.name} trains its variants itself, "
                "sweep.at_once at a time; leave it out"
            )
    if len(runs) > 1:
        raise ConfigError(
            f"{sweep.name} is a sweep of its own ({', '.join(sweep.sweep.variants)}), so no values "
            f"can be listed beside it; {_ADD}"
        )
    folder = str(Path(sweep.launch.run_dir, sweep.name))
    variants: Variants = {}
    for name, line in sweep.sweep.variants.items():
        try:
            run = with_absolute_paths(compose([*words, *shlex.split(line)]), Path.cwd())
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
