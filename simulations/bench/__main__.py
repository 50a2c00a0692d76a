"""Measures one thing and prints it; a bench is a module of this package named in `BENCHES`.

    python -m simulations.bench generate --json FILE

`all` measures everything, one bench after the other. FILE is one JSON object: `figures` by name,
and `rows`, which are what they were made of. Times are worth something on a machine that does
nothing else; `--size toy` only tries the program.
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

BENCHES = ("accelerate", "clients", "compress", "generate", "memory", "step", "wire")
"""Each has `measure(size)`, of size `full` or `toy`; imported when asked for, so that one that
needs the core alone runs where there is no more."""

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Read when torch is imported: threads that wait by spinning take the cores from other processes.


@ending_with_its_reader()
def main(words: list[str] | None = None) -> int:
    """Measure as the command line says; 0 if it came to an end."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.bench", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("name", choices=(*BENCHES, "all"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and rows there")
    parser.add_argument("--size", choices=("full", "toy"), default="full")
    asked = parser.parse_args(words)
    quiet_libraries()
    report = Report()
    try:
        for name in BENCHES if asked.name == "all" else (asked.name,):
            report.take(importlib.import_module(f"{__package__}.{name}").measure(asked.size))
    except FedsplitError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print(report)
    if asked.json:
        asked.json.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
