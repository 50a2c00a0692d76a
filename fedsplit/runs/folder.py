"""A run's folder: the only reader of a run's files, and the only definition of "finished".

`run.json` and `config.yaml` are written when the run begins. Every round adds a line to
`metrics.jsonl`, and every checkpoint a folder to `checkpoints/`. `model/` is written last and
atomically: a run is finished if and only if it has this folder.
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
from fedsplit.runs.metrics import closing_table
from fedsplit.spec import RunSpec
from fedsplit.telemetry.jsonl import MetricsFile
from fedsplit.telemetry.round import RoundStats

_ID, _CONFIG, _DIVERGED = "run.json", "config.yaml", "diverged.txt"
_RUN_ID = re.compile(r"[0-9a-f]{16}")
STILL_TRAINED = "is still trained by another process"


def new_run_id() -> str:
    """Return a random id for a run; two runs do not have the same one, on any machine."""
    # Not from the run's seed: two runs with one seed need different ids.
    return secrets.token_hex(8)


def is_run_id(text: str) -> bool:
    """Return whether a text is a run id, and so safe as the name of a folder."""
    return bool(_RUN_ID.fullmatch(text))


class RunFolder:
    """One run's folder.

    Args:
        path: The folder; `claim` and `begin` find one that no other run uses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    # --- find one ---------------------------------------------------------------------------------

    @staticmethod
    def claim(parent: Path, name: str) -> "RunFolder":
        """Make a new folder `name` in `parent`, or `name-2`, `name-3`, ..., for a run to begin."""
        # Of two processes, one makes the folder.
        return RunFolder(next(filter(atomic.make_folder, _candidates(parent, name))).resolve())

    @staticmethod
    def begin(parent: Path, name: str, config: str, run_id: str = "") -> "RunFolder":
        """Write `config` into the claimed folder of this name, or into a new one.

        Returns:
            The folder, which now has a run id and a config. A run that is begun again, with the
            `run_id` that it had before, has its earlier folder.
        """
        for path in _candidates(parent, name):
            atomic.make_folder(path)
            folder = RunFolder(path.resolve())
            # Folders of earlier versions have a config, but no run.json.
            has_config = folder._config.exists()
            identity = json.dumps({"id": run_id or new_run_id()})
            # Of two processes, only one can create it.
            is_new = not has_config and atomic.create(path / _ID, identity)
            if is_new or (run_id and folder._has_id(run_id)):
                # A config that is there may be locked by another process.
                if not has_config:
                    atomic.write_text(folder._config, config)
                return folder
        raise AssertionError("the candidates do not end")

    @staticmethod
    def of_id(parent: Path, name: str, run_id: str) -> "RunFolder | None":
        """Return the folder of the run with this name and id; None if it has not begun."""
        return next((each for each in _of_name(parent, name) if each._has_id(run_id)), None)

    @staticmethod
    def to_resume(run: RunSpec) -> "RunFolder | None":
        """Return the folder to resume; None for a new run.

        Raises:
            ConfigError: The folder that `run.resume` names does not exist, has no checkpoint, or
                belongs to a finished run; or the last run of this name diverged.
        """
        if not run.resume:
            return None
        if run.resume == "auto":
            folders = _of_name(Path(run.launch.run_dir), run.name)
            # A process may have been killed between its result and its cleanup.
            for folder in (each for each in folders if each.is_finished):
                folder.tidy()
            if folders and folders[-1].is_finished and (why := folders[-1].divergence):
                raise ConfigError(
                    f"{folders[-1].path} ended, because it diverged ({why}), and would do so "
                    "again; change the settings and the name, or leave resume out to begin anew"
                )
            resumable = [folder for folder in folders if folder._is_resumable]
            return resumable[-1] if resumable else None
        folder = RunFolder(Path(run.resume).resolve())
        folder.require_resumable()
        return folder

    @staticmethod
    def finished_as(run: RunSpec) -> "RunFolder | None":
        """Return the last folder of this name, if it has the result that `resume=auto` asks for.

        Without this, a process that is killed after it wrote its result would train again.
        """
        folders = _of_name(Path(run.launch.run_dir), run.name) if run.resume == "auto" else []
        # One that can be resumed comes first.
        if not folders or any(each._is_resumable for each in folders):
            return None
        last = folders[-1]
        # A config of another version has other settings.
        with suppress(DataError):
            if last.is_finished and not last.divergence and last.run.fingerprint == run.fingerprint:
                last.tidy()
                return last
        return None

    def require_resumable(self) -> None:
        """Refuse to resume a run that has no checkpoint or is finished.

        Raises:
            ConfigError: It is such a run.
        """
        if self._is_resumable:
            return
        found = "is finished" if self.is_finished else "has no checkpoint"
        raise ConfigError(
            f"{self.path} {found}, so it cannot be resumed; name the folder of a run that was "
            "interrupted, or leave resume out to begin anew"
        )

    @staticmethod
    def finished(path: str | Path) -> "RunFolder":
        """Return the folder of a finished run that has a joined model.

        Raises:
            DataError: The folder is not that of such a run.
        """
        folder = RunFolder(Path(path))
        folder._require_config()
        if not folder.is_finished:
            raise DataError(f"{path} has no model yet; serve it when the run is over")
        if folder.run.client_weights.sealed:
            raise DataError(f"{path} has sealed client weights; `fedsplit join` opens them")
        return folder

    @contextmanager
    def held(self) -> Iterator[None]:
        """A context in which this process alone writes the run; the end of the process ends it.

        Raises:
            ConfigError: Another process writes the run.
            DataError: The folder is not a run's folder.
        """
        self._require_config()
        with self._config.open("r+", encoding="utf-8") as file:
            if not atomic.lock(file, self.path):
                raise ConfigError(
                    f"{self.path} {STILL_TRAINED}; stop that one, or wait for its end, before the "
                    "run is resumed"
                )
            yield

    def give_back(self) -> None:
        """Remove the folder if it is empty."""
        with suppress(OSError):  # it has content
            self.path.rmdir()

    # --- its content ------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The run's id; a resumed run has the same one.

        Raises:
            CheckpointError: The folder is of an earlier version, or the file is damaged.
        """
        file = self.path / _ID
        try:
            run_id = json.loads(file.read_text(encoding="utf-8"))["id"]
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise CheckpointError(
                f"{file} has no run id ({exc!r}), so the clients' checkpoints cannot be found; "
                "start a new run, without resume"
            ) from exc
        return str(run_id)

    @property
    def run(self) -> RunSpec:
        """The run's settings.

        Raises:
            DataError: The folder is not a run's folder, or is that of another version.
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
        """Whether the run has written its result; after it, the run writes nothing."""
        return self.model.is_dir()

    @property
    def divergence(self) -> str:
        """Why the run diverged and ended early; empty if it did not."""
        file = self.path / _DIVERGED
        return file.read_text(encoding="utf-8").strip() if file.exists() else ""

    @property
    def model(self) -> Path:
        """Folder of the joined model: a Hugging Face checkpoint with tokenizer and model card."""
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        """Folder of the run's LoRA adapters, if it has any."""
        return self.path / "adapter"

    @property
    def sample(self) -> Path:
        """File of the words that the trained language model writes, if it writes any."""
        return self.path / "sample.txt"

    @property
    def checkpoints(self) -> Path:
        """Folder of the server's checkpoints."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """Folder of the best round so far; it is removed when the run is finished."""
        return self.path / "best"

    @property
    def last_saved_round(self) -> int | None:
        """The round of the newest checkpoint by its name; None if there is none."""
        numbers = (path.name.removeprefix("round-") for path in self.checkpoints.glob("round-*"))
        return max((int(number) for number in numbers if number.isdigit()), default=None)

    @property
    def last_checkpoint(self) -> int:
        """The round after which a resumed run continues."""
        return max(self._checkpoints_by_round)

    @property
    def metrics(self) -> MetricsFile:
        """The file of the run's rounds, and on request of its steps."""
        return MetricsFile(self.path / "metrics.jsonl")

    def rounds(self) -> list[RoundStats]:
        """Return the finished rounds of the run.

        Raises:
            DataError: The file is damaged.
        """
        return self.metrics.rounds()

    def closing_table(self, *, with_text: bool = True) -> str:
        """Return the table at the end of the run, which has a result.

        Args:
            with_text: Whether it has the sample of the model's text, which may be of the data.
        """
        config = json.loads((self.model / "config.json").read_text(encoding="utf-8"))
        vocabulary = config.get("vocab_size", 0) if self.run.task == "causal_lm" else 0
        has_text = with_text and self.sample.exists()
        sample = self.sample.read_text(encoding="utf-8").strip() if has_text else None
        return closing_table(self.rounds(), vocabulary, sample)

    def measured_rounds(self) -> list[RoundStats]:
        """Return the finished rounds of the run, at least one.

        Raises:
            DataError: The folder is not a run's folder, is damaged, or has no finished round.
        """
        self._require_config()
        rounds = self.rounds()
        if not rounds:
            raise DataError(f"{self.path} has no finished round yet; try again after the first")
        return rounds

    # --- written by the run's server --------------------------------------------------------------

    def set_divergence(self, reason: str) -> None:
        """Record, before the result is written, why the run diverged, or that it did not."""
        if reason:
            atomic.write_text(self.path / _DIVERGED, f"{reason}\n")
        else:
            # That of a process that was killed at the end, before the run was resumed.
            (self.path / _DIVERGED).unlink(missing_ok=True)

    def forget_after(self, number: int) -> None:
        """Remove the rounds after `number`, which a resumed run repeats, from the metrics."""
        self.metrics.forget_after(number)

    def tidy(self) -> None:
        """Remove the temporary files of a killed process, and `best` of a finished run."""
        for folder in (self.path, self.checkpoints, self.best):
            atomic.recover(folder)
        if self.is_finished:
            atomic.remove(self.best)

    # --- the address of its trunk -----------------------------------------------------------------

    @property
    def lock_file(self) -> Path:
        """The file that the process that trains the run has open."""
        return self._config

    @property
    def address(self) -> str:
        """The address at which the run's trunk is served now.

        Raises:
            DataError: No process serves it.
        """
        try:
            return self._address.read_text(encoding="utf-8").strip()
        except FileNotFoundError as exc:
            raise DataError(
                f"no process serves {self.path}; start `fedsplit serve {self.path}`, or give the "
                "address of its trunk with --trunk"
            ) from exc

    @contextmanager
    def announced(self, address: str) -> Iterator[None]:
        """Publish `address` in the folder for the time of a block."""
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
    def _address(self) -> Path:
        return self.path / "trunk.address"

    def _has_id(self, run_id: str) -> bool:
        # A folder whose id cannot be read belongs to another run.
        with suppress(CheckpointError):
            return self.id == run_id
        return False

    @property
    def _is_resumable(self) -> bool:
        return bool(self._checkpoints_by_round) and not self.is_finished

    @property
    def _checkpoints_by_round(self) -> dict[int, Path]:
        # This module imports torch, which commands that read only metrics start faster without.
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


def _of_name(parent: Path, name: str) -> list[RunFolder]:
    """Return the folders of the runs of a name, in the order in which they began."""
    return list(map(RunFolder, itertools.takewhile(Path.exists, _candidates(parent, name))))
