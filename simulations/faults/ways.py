"""The ways of use of a run, each as the commands that a machine's service manager keeps running."""

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from simulations.faults.services import ForkedModule, Program, Service
from simulations.faults.watcher import environment

NAME = "tiny"
ROUNDS = 3
_WORDS = "the of and to in is that it was for on are as with his they at be this from".split()
_ROOT = Path(__file__).parents[2]
_RUN = (
    "experiment=toy",
    f"name={NAME}",
    "clients=2",
    "resume=auto",
    "sharding=iid",
    "data=text",
    "data.sequence_length=16",
    "data.vocabulary=300",
    "model.config.n_embd=16",
    "model.config.n_head=2",
    "model.config.n_positions=32",
    # With dropout, a step that is repeated must draw the same numbers again.
    "model.config.resid_pdrop=0.1",
    f"train.rounds={ROUNDS}",
    "train.save_every=1",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A way of use.

    Attributes:
        services: Returns its commands for a folder, in the order of their start. The run is over
            when the last one ends without an error.
        roles: Patterns of the command lines of its processes, by role.
        managed: The roles of the services; such a process is started again by the harness, as by a
            service manager, and all others by the product.
    """

    services: Callable[[Path], Sequence[Service]]
    roles: dict[str, str]
    managed: frozenset[str]


def runs_in(folder: Path) -> Path:
    """Return the folder of the runs' folders."""
    return folder / "runs"


def _words(folder: Path, launch: str) -> list[str]:
    corpus = folder / "corpus.txt"
    chance = random.Random(0)
    lines = (" ".join(chance.choices(_WORDS, k=chance.randint(20, 60))) for _ in range(40))
    corpus.write_text("\n".join(lines), encoding="utf-8")
    places = (f"data.path={corpus}", f"launch.run_dir={runs_in(folder)}")
    # The group of the launch precedes its fields.
    return [*_RUN[:1], f"launch={launch}", *_RUN[1:], *places]


def _environment(folder: Path) -> dict[str, str]:
    # Threads that spin while they wait take cores from other processes.
    return {**environment(folder), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def _inline(folder: Path) -> Sequence[Service]:
    return [
        ForkedModule(
            name="run",
            command=["simulations.run", *_words(folder, "inline")],
            environment=_environment(folder),
            folder=_ROOT,
            log=folder / "run.log",
        )
    ]


def _flwr(folder: Path) -> Sequence[Service]:
    return [
        Program(
            name="run",
            command=[sys.executable, "-m", "simulations.run", *_words(folder, "flwr")],
            environment=_environment(folder),
            folder=_ROOT,
            log=folder / "run.log",
        )
    ]


WAYS = {
    "inline": Way(services=_inline, roles={}, managed=frozenset({"run"})),
    "flwr": Way(
        services=_flwr,
        roles={
            "launcher": r"-m simulations\.run",
            "superlink": r"flower-superlink",
            "superexec": r"flower-superexec",
            "simulation": r"flwr-simulation",
            "gcs": r"gcs_server",
            "raylet": r"raylet/raylet ",
            "worker": r"ray::ClientApp",
        },
        managed=frozenset({"launcher"}),
    ),
}
"""The ways of use by name."""
