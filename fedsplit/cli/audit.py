"""The command `audit`: what a server can read of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer
from click import UsageError

from fedsplit.cli.command import Command
from fedsplit.errors import ConfigError

_NOISE = "0.2,0.4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit(Command):
    """Measure what a curious server can read of a run or a model, with and without defences."""

    example: ClassVar[str] = "runs/default --quick"

    path: Annotated[
        str,
        typer.Argument(
            metavar="RUN_DIR|MODEL",
            help="the folder of a finished run, or a model with --split, --private and --public",
        ),
    ]
    split: Annotated[
        str, typer.Option(metavar="1/2/1", help="of a model: blocks of bottom/trunk/top")
    ] = ""
    private: Annotated[
        str, typer.Option(metavar="FILE", help="of a model: text that the server should not read")
    ] = ""
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
            help="folder for table.json, audit.md and audit.png; default audit/, in the run's",
        ),
    ] = ""

    def __post_init__(self) -> None:
        if self.split and not (self.private and self.public):
            raise UsageError("a model needs --private FILE and --public FILE")
        if self.private and not self.split:
            raise UsageError("--private goes with a model and --split; a run has its own text")

    def run(self) -> None:
        """Print the table, the census and the controls, and write them to `out`."""
        from fedsplit.audit.report import audit, audit_scene, sample_of
        from fedsplit.audit.scene import Scene
        from fedsplit.console import quiet_libraries
        from fedsplit.runs.folder import RunFolder

        quiet_libraries()
        if self.split:
            sequences, tokens = sample_of(self.quick)
            scene = Scene.of_model(
                self.path,
                self.split,
                sequences,
                tokens,
                private=self.private,
                public=self.public,
            )
            found, out = audit_scene(scene, self._sizes()), Path(self.out or "audit")
        else:
            folder = RunFolder(Path(self.path))
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
