"""Runs the soak: starts its processes, disturbs and samples them, and finds what was wrong."""

import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import psutil

from fedsplit.errors import FedsplitError
from fedsplit.spec import WireSpec
from fedsplit.transport.client import GrpcLink
from fedsplit.wire.messages import ServiceInfoRequest
from simulations.bench.processes import Process, process
from simulations.proxy import proxied
from simulations.soak import roles
from simulations.soak.faults import Faults
from simulations.soak.samples import Rounds, Samples

_SAMPLES = 600
_LEAST_PAUSE_S = 0.1
_THREADS = 3
_REST_S = 0.3
_TRAINING = (
    *("name=soak", "clients=3", "data=text", "data.sequence_length=16", "data.vocabulary=300"),
    *("model.config.n_embd=16", "model.config.n_head=2", "model.config.n_positions=32"),
    *("train=toy", "train.rounds=1000000", "train.local_steps=3", "train.evaluate_every=10"),
    *("train.schedule=constant", "train.save_every=1", "policy.deadline_s=120"),
)
_FEWEST_ROUNDS = 8
"""A soak goes on until there are so many, so that some are disturbed."""

_SETTLE_S = 30.0
"""The seconds that a server has to free what its clients held, once all are gone."""


@dataclass(slots=True, kw_only=True)
class Findings:
    """What a soak found.

    Attributes:
        samples: The series of all quantities.
        faults: The number of faults of each kind.
        rounds: The rounds of the training run.
        compared: The rounds of the undisturbed run, with which they were compared.
        sessions: The texts that were generated, each in a session.
        violations: What was wrong.
    """

    samples: Samples
    faults: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    compared: int = 0
    sessions: int = 0
    violations: list[str] = field(default_factory=list)


def soak(folder: Path, seconds: float, *, seed: int, num_mortals: int = 2) -> Findings:
    """Run a soak of so many seconds, whose files are in `folder`."""
    model, where = roles.save_model(folder / "model"), f"127.0.0.1:{free_port()}"
    _write_corpus(folder / "corpus.txt")
    with ExitStack() as stack:
        served = stack.enter_context(process(roles.server, model, where))
        base = _usage(where)
        serving = stack.enter_context(proxied(where))
        trunk = f"127.0.0.1:{free_port()}"
        passing = stack.enter_context(proxied(trunk))
        wire = [f"wire.bind={trunk}", f"wire.advertise={passing.address}"]
        training = stack.enter_context(_training(folder / "disturbed", wire, seed))
        stack.enter_context(_training(folder / "undisturbed", [], seed))
        clients = stack.enter_context(
            process(roles.clients, model, serving.address, seed, _THREADS)
        )
        working = {"training": training, "clients": clients}
        watched = {name: _of(each) for name, each in {"server": served, **working}.items()}
        found = Findings(samples=Samples(watched))
        servers = [watched["server"], watched["training"]]
        mortals = Mortals(model, serving.address, seed, num_mortals)
        ours, theirs = Rounds(folder / "disturbed"), Rounds(folder / "undisturbed")
        with mortals, Faults([serving, passing], servers, seed) as faults:
            end = time.monotonic() + seconds
            while time.monotonic() < end or not _is_enough(found, ours):
                time.sleep(max(_LEAST_PAUSE_S, seconds / _SAMPLES))
                found.samples.take()
                for quantity, each in _collected(found, clients, ours).items():
                    found.samples.add(quantity, *each)
                if ended := [name for name, each in working.items() if not each.ask("alive")]:
                    found.violations += [f"{name} ended" for name in ended]
                    break
        clients.ask("stop")
        while clients.ask("alive"):
            time.sleep(_LEAST_PAUSE_S)
        # These are not in the series: what was measured without clients is no part of a trend.
        _collected(found, clients, ours)
        theirs.take()
        found.faults = faults.counts + Counter(kill=mortals.kills)
        found.rounds, found.compared = len(ours.read), min(len(ours.read), len(theirs.read))
        found.sessions += mortals.sessions
        found.violations += [*mortals.violations, *ours.differences(theirs)]
        found.violations += [f"{name} has too few values" for name in found.samples.too_few]
        found.violations += _left_behind(where, base)
    return found


def _is_enough(found: Findings, rounds: Rounds) -> bool:
    return len(rounds.read) >= _FEWEST_ROUNDS and not found.samples.too_few


def _collected(found: Findings, clients: Process, rounds: Rounds) -> dict[str, list[float]]:
    """Count what clients did since the last call, and return the seconds of rounds and sessions."""
    log = clients.ask("take")
    found.sessions += len(log["seconds"])
    found.violations += log["violations"]
    return {
        "step_round": [each["seconds"] for each in rounds.take()],
        "step_session": log["seconds"],
    }


class Mortals:
    """Clients that are killed at random times, each followed by a new one, until the end.

    Args:
        model: The directory of the model.
        address: The address of the trunk server.
        seed: Decides when they are killed.
        number: How many there are at a time.

    Attributes:
        kills: The number of clients that were killed.
        sessions: The texts that they generated.
        violations: What was wrong with these.
    """

    def __init__(self, model: str, address: str, seed: int, number: int) -> None:
        self.kills = self.sessions = 0
        self.violations: list[str] = []
        self._place = model, address
        self._lock = Lock()
        self._stopped = Event()
        chances = [random.Random(f"{seed}/mortal/{each}") for each in range(number)]
        self._threads = [Thread(target=self._lives, args=(rng,)) for rng in chances]

    def __enter__(self) -> "Mortals":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _lives(self, rng: random.Random) -> None:
        while not self._stopped.is_set():
            with process(roles.mortal, *self._place, rng.randrange(1 << 30)) as mortal:
                self._stopped.wait(rng.uniform(2.0, 12.0))
                log, alive = mortal.ask("take"), mortal.ask("alive")
                _of(mortal).kill()
            with self._lock:
                self.kills += 1
                self.sessions += len(log["seconds"])
                self.violations += log["violations"] + ([] if alive else ["a client ended"])


# --- processes ----------------------------------------------------------------------------------


@contextmanager
def _training(folder: Path, wire: list[str], seed: int) -> Iterator[Process]:
    words = [*_TRAINING, f"data.path={folder.parent}/corpus.txt", f"launch.run_dir={folder}", *wire]
    with process(roles.training, words, seed, _REST_S) as started:
        yield started
        _of(started).kill()  # it has no end


def _of(started: Process) -> psutil.Process:
    return psutil.Process(started.ask("pid"))


def free_port() -> int:
    """Return a port of this machine that no one listens on."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _write_corpus(file: Path) -> None:
    rng, words = random.Random(0), "the of and to in is that it was for on are as with".split()
    lines = (" ".join(rng.choices(words, k=rng.randint(20, 60))) for _ in range(60))
    file.write_text("\n".join(lines), encoding="utf-8")


# --- what clients leave behind --------------------------------------------------------------------


def _left_behind(address: str, base: dict[str, Any]) -> list[str]:
    """Return the budgets of a server that are in use though all of its clients are gone."""
    end = time.monotonic() + _SETTLE_S
    while time.monotonic() < end and (usage := _usage(address)) != base:
        time.sleep(0.5)
    return [f"{name} is {usage[name]} after the end" for name in base if usage[name] != base[name]]


def _usage(address: str) -> dict[str, str]:
    with closing(GrpcLink(address, wire=WireSpec())) as link:
        while True:
            with suppress(FedsplitError):
                budgets = dict(link.exchange(ServiceInfoRequest()).budgets)
                # A client is remembered for a while, in case that it comes back.
                budgets.pop("limits.clients")
                return budgets
            time.sleep(0.1)
