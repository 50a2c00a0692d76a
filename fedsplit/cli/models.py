"""The commands `split` and `join` for model directories."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, ClassVar

import typer
from click import UsageError

from fedsplit import atomic
from fedsplit.cli.command import Command
from fedsplit.errors import ConfigError
from fedsplit.spec import SplitSpec

Out = Annotated[str, typer.Option(metavar="DIR", help="new or empty directory")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split(Command):
    """Split a model into the client's part and the trunk."""

    example: ClassVar[str] = "gpt2 --split 1/10/1 --out parts"

    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="directory of a whole model, or a hub id")
    ]
    split: Annotated[str, typer.Option(metavar="1/2/1", help="blocks of bottom/trunk/top")]
    out: Out
    revision: Annotated[str, typer.Option(metavar="R", help="of a hub id")] = "main"

    def run(self) -> None:
        """Write the two parts, and print a line for each."""
        from fedsplit.console import quiet_libraries
        from fedsplit.model.checkpoint import split_checkpoint

        quiet_libraries()
        split = SplitSpec.parse(self.split)
        with _filled_whole(Path(self.out)) as folder:
            made = split_checkpoint(self.model, split, folder, revision=self.revision)
        for name in made:
            print(_part_line(Path(self.out, name)))


def _part_line(directory: Path) -> str:
    from fedsplit.model.manifest import Manifest
    from fedsplit.model.part_files import WEIGHTS
    from fedsplit.model.tensor_files import tensor_names
    from fedsplit.telemetry.round import in_mib

    manifest, weights = Manifest.read(directory), directory / WEIGHTS
    first, end = manifest.trunk_blocks
    split = SplitSpec.parse(manifest.split)
    num_blocks = end - first if manifest.part == "trunk" else split.bottom + split.top
    return (
        f"{directory}: {num_blocks} blocks, {len(tensor_names(weights))} tensors, "
        f"{in_mib(weights.stat().st_size)}, fingerprint {manifest.fingerprint}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Join(Command):
    """Join the two parts of a model, or the sealed result of a run."""

    example: ClassVar[str] = "parts/bottom-top parts/trunk --out whole"

    client: Annotated[
        str,
        typer.Argument(
            metavar="CLIENT_DIR",
            help="the bottom-top part's directory, or the folder of a run with sealed weights",
        ),
    ]
    out: Out
    trunk: Annotated[
        str,
        typer.Argument(metavar="TRUNK_DIR", help="the trunk part's directory; not for a run"),
    ] = ""
    key: Annotated[
        str, typer.Option(metavar="FILE", help="of a run: the key that its clients share")
    ] = ""

    def __post_init__(self) -> None:
        if bool(self.trunk) == bool(self.key):
            raise UsageError("give TRUNK_DIR for two parts, or --key for the folder of a run")

    def run(self) -> None:
        """Write the whole model, with the tokenizer and other texts of the client's directory."""
        if self.key:
            self._join_sealed()
            return
        from fedsplit.console import quiet_libraries
        from fedsplit.model.checkpoint import join_checkpoint
        from fedsplit.model.source import Source

        quiet_libraries()
        with _filled_whole(Path(self.out)) as folder:
            join_checkpoint(self.client, self.trunk, folder)
            Source(name=self.client).copy_texts(folder)
        self._print_made()

    def _join_sealed(self) -> None:
        from fedsplit.client.seal import Seal
        from fedsplit.console import quiet_libraries
        from fedsplit.model.source import Source
        from fedsplit.runs.folder import RunFolder
        from fedsplit.runs.sealed_result import joined

        quiet_libraries()
        run = RunFolder(Path(self.client))
        whole = joined(run, Seal.of(Path(self.key)))
        with _filled_whole(Path(self.out)) as folder:
            whole.save_pretrained(folder)
            Source(name=str(run.model)).copy_texts(folder)
        self._print_made()

    def _print_made(self) -> None:
        print(f"{self.out}: the whole model, for AutoModelForCausalLM.from_pretrained")


@contextmanager
def _filled_whole(out: Path) -> Iterator[Path]:
    """Yield a temporary folder; its content is moved to `out` unless there is an error.

    Raises:
        ConfigError: `out` exists and is not an empty directory.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {out} is there already; give a new or an empty directory")
    atomic.make_folder(out)
    # Inside of `out`, since a rename works only within one file system.
    with TemporaryDirectory(dir=out, prefix=".unfinished-") as folder:
        yield Path(folder)
        for written in Path(folder).iterdir():
            written.rename(out / written.name)
