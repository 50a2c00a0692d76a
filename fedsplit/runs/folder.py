"""A run's folder: the one reader of what a run leaves, and what "finished" means.

`run.json` and `config.yaml` are there when the run begins, `metrics.jsonl` grows by a line a round,
and `checkpoints/` by a folder where the run keeps them. `model/` is written last and appears whole:
a run is finished when it has one.
"""

import itertools
import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedsplit import atomic
from fedsplit.config import from_yaml
from fedsplit.errors import CheckpointError, ConfigError, DataError
from fedsplit.runs import metrics
from fedsplit.runs.metrics import RoundStats
from fedsplit.spec import RunSpec

_ID, _CONFIG = "run.json", "config.yaml"
_RUN_ID = re.compile(r"[0-9a-f]{16}")


def new_run_id() -> str:
    """A name for a run that no other run has, at any machine."""
    return secrets.token_hex(8)


def is_run_id(text: str) -> bool:
    """Whether a text is such a name, and so safe as the name of a folder."""
    return bool(_RUN_ID.fullmatch(text))


class RunFolder:
    """One run's folder.

    Args:
        path: The folder; `claim` and `begin` find one that no other run has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    # --- find one ---------------------------------------------------------------------------------

    @staticmethod
    def claim(parent: Path, name: str) -> "RunFolder":
        """A new folder `name` in `parent`, or `name-2`, `name-3`, ...; for a run to begin in."""
        for folder in _candidates(parent, name):
            with suppress(FileExistsError):
                folder.mkdir(parents=True)
                return RunFolder(folder.resolve())
        raise AssertionError("the candidates do not end")

    @staticmethod
    def begin(parent: Path, name: str, config: str) -> "RunFolder":
        """The folder that was claimed under this name, else a new one, with `config` in it."""
        for path in _candidates(parent, name):
            path.mkdir(parents=True, exist_ok=True)
            # An old folder has no run.json.
            has_config = (path / _CONFIG).exists()
            if not has_config and atomic.create(path / _ID, json.dumps({"id": new_run_id()})):
                folder = RunFolder(path.resolve())
                atomic.write_text(folder._config, config)
                return folder
        raise AssertionError("the candidates do not end")

    @staticmethod
    def to_resume(run: RunSpec) -> "RunFolder | None":
        """The folder that `run.resume` names; nothing for a run that begins anew.

        Raises:
            ConfigError: There is no such folder, nothing to go on from in it, or it is finished.
        """
        if not run.resume:
            return None
        if run.resume == "auto":
            candidates = _candidates(Path(run.launch.run_dir), run.name)
            folders = list(map(RunFolder, itertools.takewhile(Path.exists, candidates)))
            for folder in folders:
                if folder.is_finished:
                    folder.tidy()  # it may have been killed right after its result
            waiting = [folder for folder in folders if folder._can_go_on]
            return waiting[-1] if waiting else None
        folder = RunFolder(Path(run.resume).resolve())
        if not folder._can_go_on:
            found = "is finished" if folder.is_finished else "has no checkpoint"
            if (folder.path / "snapshots").is_dir():
                found = "has checkpoints of format 1 (snapshots/), which this version does not read"
            raise ConfigError(
                f"resume={run.resume}: {folder.path} {found}; name the folder of a run with "
                "train.save_every that was interrupted, or leave resume out to begin anew"
            )
        return folder

    @staticmethod
    def finished(path: str | Path) -> "RunFolder":
        """The folder of a finished run.

        Raises:
            DataError: It is no run's folder, or the run is not finished.
        """
        folder = RunFolder(Path(path))
        folder._require_config()
        if not folder.is_finished:
            raise DataError(f"{path} has no model yet; serve it when the run is over")
        return folder

    def give_back(self) -> None:
        """Remove the folder if the run left nothing in it."""
        with suppress(OSError):
            self.path.rmdir()

    # --- what is in it ----------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The run's own name, which it keeps when it is resumed.

        Raises:
            CheckpointError: The folder is of an earlier version, or the file is damaged.
        """
        file = self.path / _ID
        try:
            found = json.loads(file.read_text(encoding="utf-8"))["id"]
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise CheckpointError(
                f"{file} has no run id ({exc!r}), so the clients' checkpoints cannot be found; "
                "begin the run anew without resume"
            ) from exc
        return str(found)

    @property
    def run(self) -> RunSpec:
        """The run's settings.

        Raises:
            DataError: It is no run's folder, or one of another version.
        """
        self._require_config()
        try:
            return from_yaml(self._config.read_text(encoding="utf-8"))
        except (ConfigError, UnicodeDecodeError) as exc:
            raise DataError(
                f"{self._config} does not describe a run of this version: {exc}"
            ) from exc

    @property
    def is_finished(self) -> bool:
        """Whether the run has left its result; nothing is written to the folder after that."""
        return self.model.is_dir()

    @property
    def model(self) -> Path:
        """The joined model, a plain Hugging Face checkpoint with tokenizer and card."""
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        """The run's adapters by themselves, where it has some."""
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Where the server's checkpoints are."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """Where the best round so far is kept while the run lasts."""
        return self.path / "best"

    @property
    def last_checkpoint(self) -> int:
        """The round that a resumed run goes on after."""
        return max(self._kept)

    def rounds(self) -> list[RoundStats]:
        """The rounds so far; a line that is being written does not count yet.

        Raises:
            DataError: The file is damaged.
        """
        if not self._metrics.exists():
            return []
        try:
            text = self._metrics.read_text(encoding="utf-8")
            return metrics.parse(text[: text.rfind("\n") + 1].splitlines())
        except (ValueError, TypeError) as exc:
            raise DataError(f"{self._metrics} does not hold the rounds of a run: {exc}") from exc

    def measured_rounds(self) -> list[RoundStats]:
        """The rounds of a run's folder that has at least one.

        Raises:
            DataError: It is no run's folder, is damaged, or has no finished round.
        """
        self._require_config()
        rounds = self.rounds()
        if not rounds:
            raise DataError(
                f"{self.path} has no finished round yet; try again when the first one is over"
            )
        return rounds

    # --- what a run's server writes ---------------------------------------------------------------

    def append(self, stats: RoundStats) -> None:
        """Keep one round."""
        atomic.append_line(self._metrics, metrics.line_of(stats))

    def forget_after(self, number: int) -> None:
        """Drop the rounds after `number`: a resumed run does them again."""
        kept = [metrics.line_of(stats) for stats in self.rounds() if stats.round <= number]
        atomic.write_text(self._metrics, "".join(f"{line}\n" for line in kept))

    def tidy(self) -> None:
        """Remove what a killed process left unfinished, and what a finished run needs no more."""
        for folder in (self.path, self.checkpoints, self.best):
            atomic.recover(folder)
        if self.is_finished:
            atomic.remove(self.best)

    # --- where it is served -----------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Where the run's trunk is served now.

        Raises:
            DataError: No process serves it.
        """
        try:
            return self._address.read_text(encoding="utf-8").strip()
        except FileNotFoundError as exc:
            raise DataError(
                f"nobody serves {self.path}; start `fedsplit serve {self.path}`, or say --trunk "
                "where its trunk is"
            ) from exc

    @contextmanager
    def announced(self, address: str) -> Iterator[None]:
        """A block during which `address` is found in the folder."""
        atomic.write_text(self._address, f"{address}\n")
        try:
            yield
        finally:
            self._address.unlink(missing_ok=True)

    # --- its files --------------------------------------------------------------------------------

    @property
    def _config(self) -> Path:
        return self.path / _CONFIG

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def _address(self) -> Path:
        return self.path / "trunk.address"

    @property
    def _can_go_on(self) -> bool:
        return bool(self._kept) and not self.is_finished

    @property
    def _kept(self) -> dict[int, Path]:
        # It imports torch, and those who only read a folder's numbers start without it.
        from fedsplit.runs.checkpoint import checkpoints_in

        return checkpoints_in(self.checkpoints)

    def _require_config(self) -> None:
        if not self._config.is_file():
            raise DataError(
                f"{self.path} is not a run's folder: it has no config.yaml; give one that a run "
                "left, such as runs/default"
            )


def _candidates(parent: Path, name: str) -> Iterator[Path]:
    yield parent / name
    for number in itertools.count(2):
        yield parent / f"{name}-{number}"
