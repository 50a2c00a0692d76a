"""The processes of the soak: a trunk server, a training run, and clients.

The trunk server has two trunks of one model. Clients generate with the first, which never changes,
so that their tokens are known. Clients train the second. The training run is a whole run of Flower
in one process, whose clients call its trunk over gRPC.
"""

import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fedsplit.client.trainer import ClientTrainer
from fedsplit.config import compose, to_yaml
from fedsplit.errors import ConnectionLost, FedsplitError
from fedsplit.flower import client_app, server_app
from fedsplit.flower.inline import run_inline
from fedsplit.flower.records import JoinInfo
from fedsplit.serve.client import Reached, reach
from fedsplit.serve.trunk_server import Served, hosted
from fedsplit.spec import LimitsSpec, PolicySpec, RunSpec, WireSpec
from simulations.bench.models import Shape, text_of
from simulations.bench.processes import Answers

SHAPE = Shape(blocks=3, hidden=32, heads=2, vocabulary=128, split="1/1/1", rows=2, tokens=32)
NEW_TOKENS = 8
_PROMPTS = 24
_GONE = 0.05
"""The share of the rounds in which a client of the training run is gone."""

_STEPS = 4
"""The steps that a client of the trunk server takes in a session."""

# Nobody waits long for a client that was killed, and what it held is freed within the soak. The
# server soon remembers as many clients as it may, or the memory for them would grow for long.
SERVED = replace(
    SHAPE.run,
    clients=16,
    policy=PolicySpec(deadline_s=2.0),
    wire=WireSpec(stash_ttl_s=10.0),
    limits=LimitsSpec(clients=64),
)


def save_model(folder: Path) -> str:
    """Write the model of the trunk server, and return its directory."""
    SHAPE.whole().save_pretrained(folder)
    return str(folder)


# --- servers --------------------------------------------------------------------------------------


@contextmanager
def server(model: str, bind: str) -> Iterator[Answers]:
    """Serve two trunks of the model; answers `pid`."""
    _quiet()
    trunks = [Served(name=name, model=model) for name in ("constant", "trained")]
    with hosted(trunks, SERVED, replace(SERVED.wire, bind=bind)):
        yield {"pid": os.getpid}


@contextmanager
def training(words: list[str], seed: int, pause_s: float) -> Iterator[Answers]:
    """Run Flower's apps without end; answers `pid` and `alive`. The process has to be killed.

    Clients are gone in rounds that `seed` decides, and pause for `pause_s` before each round.
    """
    _quiet()
    run = compose(words)
    config = {"config": to_yaml(run), "run-dir": run.launch.run_dir}
    apps = server_app.app, leaving(seed, pause_s)
    work = partial(run_inline, *apps, num_clients=run.num_nodes, run_config=config)
    yield {"pid": os.getpid, "alive": _started([work])}


def leaving(seed: int, pause_s: float) -> ClientApp:
    """Return Flower's app of clients who are gone in some rounds.

    The same clients are gone in the same rounds of every run with this seed.
    """
    app = ClientApp()
    app.query("hello")(client_app.hello)
    app.evaluate()(client_app.evaluate)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        time.sleep(pause_s)
        number = JoinInfo.of(message.content).round
        name, clients = (
            int(context.node_config[key]) for key in ("partition-id", "num-partitions")
        )
        if name in gone_in(number, seed, clients):
            raise ConnectionLost(f"client {name} is gone in round {number}")
        return client_app.train(message, context)

    return app


def gone_in(number: int, seed: int, clients: int) -> set[int]:
    """Return the clients that are gone in a round; never all, since a run without any ends."""
    chances = {name: random.Random(f"{seed}/{number}/{name}").random() for name in range(clients)}
    stays = max(chances, key=chances.__getitem__)
    return {name for name, chance in chances.items() if chance < _GONE and name != stays}


# --- clients --------------------------------------------------------------------------------------


class Texts:
    """Prompts, and what the unsplit model generates after each.

    Args:
        model: The directory of the model.
    """

    def __init__(self, model: str) -> None:
        whole = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False).eval()
        chance = torch.Generator().manual_seed(SHAPE.seed)
        lengths = [2 + number % 11 for number in range(_PROMPTS)]
        self._prompts = [
            torch.randint(1, SHAPE.vocabulary, (1, length), generator=chance) for length in lengths
        ]
        self._texts = [greedy(whole, prompt_BT, NEW_TOKENS) for prompt_BT in self._prompts]

    def generate(self, model: PreTrainedModel, rng: random.Random) -> str:
        """Generate a text with a model; return what is wrong with it, or an empty string."""
        number, new_tokens = rng.randrange(_PROMPTS), rng.randint(1, NEW_TOKENS)
        prompt_BT = self._prompts[number]
        got_BT = greedy(model, prompt_BT, new_tokens)
        expected_BT = self._texts[number][:, : prompt_BT.shape[1] + new_tokens]
        if torch.equal(got_BT, expected_BT):
            return ""
        return f"tokens {got_BT.tolist()} in place of {expected_BT.tolist()}"


def greedy(model: PreTrainedModel, prompt_BT: Tensor, new_tokens: int) -> Tensor:
    """Return a prompt and the tokens that a model generates after it."""
    mask_BT = torch.ones_like(prompt_BT)
    return text_of(model, prompt_BT, new_tokens, attention_mask=mask_BT, do_sample=False)


class Log:
    """What the threads of a process did since it was read: sessions, seconds, violations."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._seconds: list[float] = []
        self._violations: list[str] = []

    def session(self, seconds: float, violation: str) -> None:
        """Add a session, and what was wrong with it."""
        with self._lock:
            self._seconds.append(seconds)
            if violation:
                self._violations.append(violation)

    def take(self) -> dict[str, list[Any]]:
        """Return what was added since the last call."""
        with self._lock:
            taken: dict[str, list[Any]] = {
                "seconds": self._seconds,
                "violations": self._violations,
            }
            self._seconds, self._violations = [], []
        return taken


@contextmanager
def clients(model: str, address: str, seed: int, threads: int) -> Iterator[Answers]:
    """Run clients that generate until `stop`; answers `pid`, `alive` and `take`."""
    _quiet()
    log, stopped, texts = Log(), Event(), Texts(model)

    def work(number: int) -> None:
        rng = random.Random(f"{seed}/{number}")
        while not stopped.is_set():
            with reached(model, address, "constant") as client:
                for _ in range(rng.randint(5, 30)):
                    if not stopped.is_set():
                        log.session(*timed(texts, client, rng))
                if rng.random() < 0.3:
                    client.link.close()  # without closing the sessions first

    alive = _started([partial(work, number) for number in range(threads)])
    yield {"pid": os.getpid, "alive": alive, "take": log.take, "stop": stopped.set}


@contextmanager
def mortal(model: str, address: str, seed: int) -> Iterator[Answers]:
    """Run a client that trains and generates until it is killed; answers as `clients` does."""
    _quiet()
    log, rng = Log(), random.Random(seed)
    texts, batch = Texts(model), SHAPE.batch()

    def work() -> None:
        with (
            reached(model, address, "trained") as trained,
            reached(model, address, "constant") as constant,
        ):
            trainer, version = ClientTrainer(trained.model, trained.trunk, SERVED), 0
            while True:
                trainer.fit([[batch]] * _STEPS)
                if trained.trunk.version < version:
                    log.session(0.0, f"version {trained.trunk.version} came after {version}")
                version = trained.trunk.version
                log.session(*timed(texts, constant, rng))

    yield {"pid": os.getpid, "alive": _started([work]), "take": log.take}


def timed(texts: Texts, client: Reached, rng: random.Random) -> tuple[float, str]:
    """Generate a text in a session; return its seconds, and what was wrong."""
    began = time.monotonic()
    try:
        wrong = texts.generate(client.model, rng)
    except FedsplitError as error:
        wrong = f"{error.code}: {error}"
    return time.monotonic() - began, wrong


def _started(works: Sequence[Callable[[], None]]) -> Callable[[], bool]:
    """Start threads; return a function that returns whether all of them still run."""
    threads = [Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    return lambda: all(thread.is_alive() for thread in threads)


def _quiet() -> None:
    """Log no warnings of requests that are sent again, and not the lines of every round."""
    for name in ("fedsplit", "flwr"):
        logging.getLogger(name).setLevel(logging.ERROR)


def reached(model: str, address: str, trunk: str) -> Reached:
    """Connect to a trunk; the first request is not retried by itself."""
    run: RunSpec = SERVED
    while True:
        try:
            return reach(model, address, served_model_name=trunk, run=run)
        except FedsplitError as error:
            if not error.retryable:
                raise
            time.sleep(0.2)
