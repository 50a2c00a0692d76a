"""The end of a run: whatever interrupts it, a resumed run leaves the same files, bit for bit."""

import json
import logging
import os
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fedsplit import atomic
from fedsplit.errors import Diverged, StorageError
from fedsplit.runs.folder import RunFolder
from fedsplit.spec import RunSpec
from tests.edge.federation import SGD, federate, joined, spec_for, without_seconds
from tests.edge.resuming import folder_of, interrupted, resumed

# Server steps this large make the later rounds worse.
WORSE = (
    *SGD,
    "client_weights.strategy=flwr.serverapp.strategy.FedAdam",
    "client_weights.options={eta: 0.3}",
)
WORDS = ("clients=1", "train.rounds=2", "train.save_every=1", "train.load_best=true", *WORSE)
WORDS += ("train.local_steps=3",)
_watchers: list[Callable[[str], None]] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if not _watchers or event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
        return
    writes = event != "open" or (
        isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    )
    if writes and isinstance(arguments[0], str | os.PathLike):
        for watcher in list(_watchers):
            watcher(os.fspath(arguments[0]))


sys.addaudithook(_hook)


@contextmanager
def watched_by(watcher: Callable[[str], None]) -> Iterator[None]:
    """Call `watcher` with the path before each operation that changes files."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def moved(run: RunSpec, runs: Path, to: Path) -> RunSpec:
    """The run, of which `runs` is a copy of its folder, with a copy in `to`."""
    shutil.copytree(runs, to)
    return replace(run, launch=replace(run.launch, run_dir=str(to)))


def files_in(folder: Path) -> dict[str, object]:
    """The content of every file, without what the machine's speed and chance decide."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            # A client's checkpoint has the random id of its state in its name.
            name = re.sub(r"(round-\d{4})-\w{16}/", r"\1/", str(path.relative_to(folder)))
            found[name] = content_of(path)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found["metrics.jsonl"] = [json.loads(line) | {"seconds": 0} for line in lines]
    return found


def content_of(path: Path) -> object:
    """The content of a file without the random ids of the clients' states, and without times."""
    if path.name == "report.html":
        return re.findall(r'class="state[^>]*>[^<]*', path.read_text(encoding="utf-8"))
    if path.name == "checkpoint.json":
        label = json.loads(path.read_text(encoding="utf-8"))
        for name in ("id", "states"):
            label["facts"].pop(name, None)
        return {key: value for key, value in label.items() if key not in ("digest", "state")}
    return path.read_bytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """A run that was interrupted before its last round, and the files that it has to leave.

    `killed` are copies of its folder, each as it was before an operation on files after the last
    step: what a process that is killed there leaves.
    """

    run: RunSpec
    runs: Path
    files: dict[str, object]
    killed: list[Path]


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Ending:
    place = tmp_path_factory.mktemp("ending")
    run = spec_for(place, *WORDS)
    interrupted(run, 2)
    runs = shutil.copytree(run.launch.run_dir, place / "interrupted")
    copies = place / "copies"
    copies.mkdir()
    watched = str(run.launch.run_dir)

    def keep_copy(path: str) -> None:
        if path.startswith(watched) or not os.path.isabs(path):  # relative: inside of rmtree
            shutil.copytree(watched, copies / f"{len(list(copies.iterdir())):03}")

    with watched_by(keep_copy):
        folder = resumed(run)
    first, last = folder.rounds()
    assert first.eval_loss < last.eval_loss, "the result has to be that of best/"
    return Ending(run=run, runs=runs, files=files_in(folder.path), killed=sorted(copies.iterdir()))


@pytest.mark.slow
def test_a_process_killed_anywhere_at_the_end_loses_nothing(ending, tmp_path):
    # States that are equal once leftovers are removed, which comes first, are resumed once.
    distinct: dict[str, Path] = {}
    for number, state in enumerate(ending.killed):
        run = moved(ending.run, state, tmp_path / f"tidied-{number}")
        folder = folder_of(run)
        folder.tidy()
        atomic.recover(folder.path / "clients" / "client-0" / folder.id)
        distinct[repr(files_in(folder.path))] = state
    assert len(ending.killed) > 25 and len(distinct) > 5
    for number, state in enumerate(distinct.values()):
        run = replace(moved(ending.run, state, tmp_path / f"resumed-{number}"), resume="auto")
        if RunFolder.to_resume(run):
            federate(run)
        found = files_in(folder_of(run).path)
        odd = [n for n in found.keys() | ending.files.keys() if found.get(n) != ending.files.get(n)]
        assert not odd, f"killed before operation {state.name}: {sorted(odd)} differ"


@pytest.mark.parametrize("full", ["clients/", "checkpoints/", ".unfinished-model"])
def test_a_full_disk_is_reported_in_a_line_and_loses_nothing(ending, tmp_path, full, caplog):
    run = moved(ending.run, ending.runs, tmp_path / "runs")
    folder = folder_of(run)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    caplog.set_level(logging.CRITICAL, logger="flwr")  # the limit is on the log's file as well

    def fill(path: str) -> None:
        if path.startswith(str(folder.path / full)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))

    try:
        with watched_by(fill), pytest.raises((StorageError, Diverged)) as error:
            resumed(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    text = str(error.value)
    name = full.replace(".unfinished-", "")
    assert f"{folder.path / name}" in text and "cannot be written: " in text
    assert "File too large" in text and "\n" not in text
    assert not list(folder.path.rglob(".unfinished-*")), "it fills the disk"
    assert files_in(resumed(run).path) == ending.files


def test_a_number_in_the_metrics_does_not_decide_which_round_is_best(ending, tmp_path):
    run = moved(ending.run, ending.runs, tmp_path / "runs")
    lines = folder_of(run).path / "metrics.jsonl"
    lines.write_text(json.dumps(json.loads(lines.read_text()) | {"eval_loss": 99.0}) + "\n")
    weights = files_in(resumed(run).path)["model/model.safetensors"]
    assert weights == ending.files["model/model.safetensors"]


def test_a_run_that_stopped_early_and_was_killed_does_not_train_again(tmp_path):
    words = (*WORSE, "clients=1", "train.rounds=9", "train.local_steps=3", "train.patience=1")
    run = spec_for(tmp_path, *words, "train.save_every=1")
    folder = federate(run)
    rounds, weights = folder.rounds(), joined(folder)
    assert len(rounds) < 9
    shutil.rmtree(folder.model)
    again = resumed(run)
    assert without_seconds(again.rounds()) == without_seconds(rounds)
    assert all(tensor.equal(weights[name]) for name, tensor in joined(again).items())
