"""Runs one benchmark and prints its figures; a benchmark is a module named in `BENCHES`.

    python -m simulations.bench generate --json FILE

`all` runs all benchmarks, one after the other. FILE gets one JSON object: `figures` by name, and
`rows`, the measurements behind them. Pictures are written beside FILE. Times are meaningful only on
a machine without other load.
`--size toy` only tests that the program runs.
"""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

from fedsplit.console import ending_with_its_reader, quiet_libraries
from fedsplit.errors import FedsplitError
from simulations.bench.report import Report

BENCHES = (
    "accelerate",
    "audit",
    "bridge",
    "clients",
    "compress",
    "faults",
    "fuzz",
    "generate",
    "guard",
    "memory",
    "openai",
    "scale",
    "schedules",
    "soak",
    "step",
    "strangers",
    "telemetry",
    "wire",
)
"""Each has `measure(size)` for the sizes `full` and `toy`. A module is imported only to run it, so
that one that needs only the core runs without the other dependencies."""

_OPTIONS: dict[str, tuple[str, type[int] | type[float] | type[str], str]] = {
    "cases": ("fuzz", int, "the number of cases"),
    "count": ("schedules", int, "the number of schedules"),
    "minutes": ("soak", float, "the number of minutes"),
    "only": ("faults", str, "the ways of use, or overhead, with commas"),
    "rows": ("faults", str, "the file of rows, from which a call continues"),
}
"""The options of single benchmarks, by the argument of their `measure`."""

# Threads that spin while they wait take cores from other processes. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@ending_with_its_reader()
def main(words: list[str] | None = None) -> int:
    """Run the benchmarks of the command line; return 0, or 2 for an error."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.bench", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("name", choices=(*BENCHES, "all"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and rows there")
    parser.add_argument("--size", choices=("full", "toy"), default="full")
    for option, (bench, kind, text) in _OPTIONS.items():
        metavar = "TEXT" if kind is str else "N"
        parser.add_argument(f"--{option}", type=kind, metavar=metavar, help=f"{bench}: {text}")
    arguments = parser.parse_args(words)
    options = {name: value for name in _OPTIONS if (value := getattr(arguments, name))}
    for option in options:
        if arguments.name != _OPTIONS[option][0]:
            parser.error(f"--{option} is for {_OPTIONS[option][0]}")
    quiet_libraries()
    report = Report()
    try:
        for name in BENCHES if arguments.name == "all" else (arguments.name,):
            module = importlib.import_module(f"{__package__}.{name}")
            report.take(module.measure(arguments.size, **options))
    except FedsplitError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
        for name, picture in report.pictures.items():
            arguments.json.with_name(name).write_bytes(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
