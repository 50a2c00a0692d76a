"""The command `audit`: what a server can read of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from fedsplit.cli.command import Command
from fedsplit.errors import ConfigError

_NOISE = "0.2,0.4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit(Command):
    """Measure what a curious server can read of a run, with and without defences."""

    example: ClassVar[str] = "runs/default --quick"

    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="the folder of a finished run")]
    public: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="text that the server knows anyway; default: the run's text, since what is "
            "attacked is its held-out text",
        ),
    ] = ""
    quick: Annotated[bool, typer.Option("--quick", help="attack a smaller sample")] = False
    noise: Annotated[
        str, typer.Option(metavar="Z,...", help="sizes of noise, in units of the public radius")
    ] = _NOISE
    out: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="folder for table.json, audit.md and audit.png; default audit/ in the run's",
        ),
    ] = ""

    def run(self) -> None:
        """Print the table, the census and the controls, and write them to `out`."""
        from fedsplit.audit.report import audit
        from fedsplit.runs.folder import RunFolder

        folder = RunFolder(Path(self.run_dir))
        found = audit(folder, public=self.public, quick=self.quick, noise=self._sizes())
        out = Path(self.out or folder.path / "audit")
        found.write(out)
        print(f"{found}\n\n{out}")

    def _sizes(self) -> list[float]:
        try:
            sizes = [float(each) for each in self.noise.split(",")]
        except ValueError:
            sizes = [-1.0]
        if not all(0 <= size < 100 for size in sizes):
            raise ConfigError(
                f"--noise={self.noise}: give numbers from 0 to 100 with commas, such as {_NOISE}"
            )
        return sizes
