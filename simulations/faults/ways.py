"""The ways of use of a run, each as the commands that a machine's service manager keeps running."""

import os
import random
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tomli_w
from safetensors.torch import load_file
from torch import Tensor

from fedsplit.runs.folder import RunFolder
from simulations.faults import served_clients
from simulations.faults.served_clients import FIELDS, SAVE_EVERY, SPLIT, make_model
from simulations.faults.services import ForkedModule, Program, Service
from simulations.faults.watcher import environment

_ROUNDS, _DEPLOYED_ROUNDS = 3, 2
# Each message to a deployed client is a process of its own, which imports for seconds.
_DEPLOYED_WORDS = (f"train.rounds={_DEPLOYED_ROUNDS}", f"train.evaluate_every={_DEPLOYED_ROUNDS}")
_WORDS = "the of and to in is that it was for on are as with his they at be this from".split()
_CHECKPOINTS = "runs/*/checkpoints/round-*/checkpoint.json"
_ROOT = Path(__file__).parents[2]
_BIN = Path(sys.executable).parent
_RUN = (
    "experiment=toy",
    "name=tiny",
    "clients=2",
    "sharding=iid",
    "data=text",
    "data.sequence_length=16",
    "data.vocabulary=300",
    "model.config.n_embd=16",
    "model.config.n_head=2",
    "model.config.n_positions=32",
    # With dropout, a step that is repeated must draw the same numbers again.
    "model.config.resid_pdrop=0.1",
    f"train.rounds={_ROUNDS}",
    "train.save_every=1",
    "policy.missing=wait",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A way of use.

    Attributes:
        services: Returns its commands for a folder, in the order of their start. The run is over
            when the last one, that of the run, ends without an error. It is started again only
            after the harness has killed it, and the others always.
        run: The role of the last service.
        roles: Patterns of the command lines of its processes, by role.
        checkpoints: Pattern of the files that complete the checkpoints of the server.
        result: Returns the tensors of the result in a folder, and what is wrong with it, if it is.
    """

    services: Callable[[Path], Sequence[Service]]
    run: str
    roles: dict[str, str]
    checkpoints: str
    result: Callable[[Path], tuple[dict[str, Tensor], str]]


def runs_in(folder: Path) -> Path:
    """Return the folder of the runs' folders."""
    return folder / "runs"


def settings(folder: Path) -> list[str]:
    """Return the settings of the run, whose text is written into a folder."""
    corpus = folder / "corpus.txt"
    chance = random.Random(0)
    lines = (" ".join(chance.choices(_WORDS, k=chance.randint(20, 60))) for _ in range(40))
    corpus.write_text("\n".join(lines), encoding="utf-8")
    return [*_RUN, f"data.path={corpus}"]


def _command(folder: Path, launch: str) -> list[str]:
    """Return the words of a program that carries out the run, or continues it."""
    first, *others = settings(folder)
    places = ("resume=auto", f"launch.run_dir={runs_in(folder)}")
    # The groups precede their fields.
    return ["simulations.run", first, f"launch={launch}", *others, *places]


def _environment(folder: Path) -> dict[str, str]:
    # Threads that spin while they wait take cores from other processes.
    return {**environment(folder), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def _inline(folder: Path) -> Sequence[Service]:
    return [
        ForkedModule(
            name="run",
            command=_command(folder, "inline"),
            environment=_environment(folder),
            folder=_ROOT,
            log=folder / "run.log",
        )
    ]


def _flwr(folder: Path) -> Sequence[Service]:
    return [
        Program(
            name="run",
            command=[sys.executable, "-m", *_command(folder, "flwr")],
            environment=_environment(folder),
            folder=_ROOT,
            log=folder / "run.log",
        )
    ]


def _deployed(folder: Path) -> Sequence[Service]:
    place, home = folder / "place", folder / "home"
    place.mkdir()
    home.mkdir()
    link, *nodes = _free_ports(3)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "127.0.0.1:{link}"\n'
        "insecure = true\n",
        encoding="utf-8",
    )
    environment = {
        **_environment(folder),
        "PATH": f"{_BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    }

    def program(name: str, *command: str) -> Program:
        words = [str(_BIN / command[0]), *command[1:]]
        log = folder / f"{name}.log"
        return Program(name=name, command=words, environment=environment, folder=place, log=log)

    address, database = f"127.0.0.1:{link}", str(folder / "superlink.db")
    own = ["--host", "127.0.0.1", "--port", str(link), "--database", database]
    services = [program("superlink", "flower-superlink", "--insecure", *own)]
    for number, port in enumerate(nodes):
        node = f'partition-id={number} num-partitions=2 allowed-path="{folder}"'
        node += f' state-dir="{folder / "kept"}"'
        words = ["--insecure", "--superlink", address, "--port", str(port), "--node-config", node]
        services.append(program(f"supernode-{number}", "flower-supernode", *words))
    config, state = home / "run.toml", str(folder / "run.state")
    overrides = " ".join([*settings(folder), *_DEPLOYED_WORDS])
    texts = {"overrides": overrides, "run-dir": str(runs_in(folder))}
    config.write_text(tomli_w.dumps(texts), encoding="utf-8")
    words = [str(_ROOT), "own", "--run-config", str(config), "--state", state]
    services.append(program("run", "fedsplit", "supervise", *words))
    return services


def _served(folder: Path) -> Sequence[Service]:
    make_model(folder / "model")
    address = f"127.0.0.1:{_free_ports(1)[0]}"
    serve = [str(_BIN / "fedsplit"), "serve", "--model", f"base={folder / 'model'}"]
    serve += ["--split", SPLIT, "--bind", address, "--state-dir", str(folder / "state")]
    serve += ["--save-every", str(SAVE_EVERY), *FIELDS]
    clients = [sys.executable, "-m", served_clients.__name__, str(folder), address]
    return [
        Program(
            name=name,
            command=command,
            environment=_environment(folder),
            folder=_ROOT,
            log=folder / f"{name}.log",
        )
        for name, command in {"server": serve, "run": clients}.items()
    ]


def _result(rounds: int, folder: Path) -> tuple[dict[str, Tensor], str]:
    parent = runs_in(folder)
    folders = map(RunFolder, parent.iterdir() if parent.is_dir() else ())
    finished = [folder for folder in folders if folder.is_finished]
    if not finished:
        return {}, "the run has no result"
    tensors = load_file(finished[0].model / "model.safetensors")
    recorded = [stats.round for stats in finished[0].rounds()]
    if recorded != list(range(1, rounds + 1)):
        return tensors, f"metrics.jsonl has the rounds {recorded}"
    # A run without a checkpoint may begin again beside its dead folder.
    if len(finished) > 1:
        return tensors, f"the run was carried out {len(finished)} times"
    return tensors, ""


def _served_result(folder: Path) -> tuple[dict[str, Tensor], str]:
    file = folder / "clients.safetensors"
    if not file.exists():
        return {}, "the clients have no result"
    # The server has saved its trunk at its end.
    trunk = load_file(max(folder.glob("state/base/round-*")) / "trunk.safetensors")
    parameters = {name: tensor for name, tensor in trunk.items() if "parameter/" in name}
    return {**load_file(file), **parameters}, ""


def _free_ports(number: int) -> list[int]:
    with ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


WAYS = {
    "inline": Way(
        services=_inline,
        run="run",
        roles={},
        checkpoints=_CHECKPOINTS,
        result=partial(_result, _ROUNDS),
    ),
    "flwr": Way(
        services=_flwr,
        run="launcher",
        roles={
            "launcher": r"-m simulations\.run",
            "superlink": r"flower-superlink",
            "superexec": r"flower-superexec",
            "simulation": r"flwr-simulation",
            "gcs": r"gcs_server",
            "raylet": r"raylet/raylet ",
            "worker": r"ray::ClientApp",
        },
        checkpoints=_CHECKPOINTS,
        result=partial(_result, _ROUNDS),
    ),
    "deployed": Way(
        services=_deployed,
        run="supervisor",
        roles={
            "superlink": r"flower-superlink",
            "serverapp": r"flwr-serverapp",
            "supernode": r"flower-supernode",
            "clientapp": r"flwr-clientapp",
            "supervisor": r"fedsplit supervise",
        },
        checkpoints=_CHECKPOINTS,
        result=partial(_result, _DEPLOYED_ROUNDS),
    ),
    "served": Way(
        services=_served,
        run="clients",
        roles={"server": r"fedsplit serve"},
        checkpoints="state/base/round-*/checkpoint.json",
        result=_served_result,
    ),
}
"""The ways of use by name."""
