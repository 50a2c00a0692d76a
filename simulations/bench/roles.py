"""The roles of a benchmark's processes: a trunk's server, and a client that generates.

Shapes: B sequences, T tokens, D hidden width.
"""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor

from fedsplit.client.remote import RemoteTrunk
from fedsplit.model import TrunkPart, connect
from fedsplit.transport.client import GrpcLink
from fedsplit.transport.server import GrpcServer
from fedsplit.trunk.service import TrunkService
from fedsplit.wire.messages import GenerateRequest
from simulations.bench.links import WatchedLink
from simulations.bench.models import Shape, text_of
from simulations.bench.processes import Answers

MAX_CLIENTS = 16


class Stopwatch:
    """Times every pass of a trunk's blocks, without transport and scheduling."""

    def __init__(self, trunk: TrunkPart) -> None:
        self._passes: list[tuple[int, float]] = []
        self._began = 0.0
        trunk.register_forward_pre_hook(self._begin)
        trunk.register_forward_hook(self._end)

    def take(self) -> list[tuple[int, float]]:
        """Return the passes since the last call: tokens of all sequences, and seconds."""
        passes, self._passes = self._passes, []
        return passes

    def _begin(self, trunk: Any, inputs: tuple[Any, ...]) -> None:
        self._began = time.perf_counter()

    def _end(self, trunk: Any, inputs: tuple[Any, ...], out_BTD: Tensor) -> None:
        B, T, _ = out_BTD.shape
        self._passes.append((B * T, time.perf_counter() - self._began))


@contextmanager
def trunk_server(shape: Shape) -> Iterator[Answers]:
    """Serve a trunk over gRPC on loopback; answers `address`, `token` of a client, and `passes`."""
    trunk = shape.trunk()
    stopwatch = Stopwatch(trunk)
    with TrunkService(trunk, shape.run) as service:
        server = GrpcServer(
            service, wire=shape.run.wire, limits=service.limits, max_clients=MAX_CLIENTS
        )
        address = server.start()
        yield {
            "address": lambda: address,
            "token": service.admit,
            "passes": stopwatch.take,
        }
        server.stop()


@contextmanager
def client(shape: Shape, seed: int, address: str, token: str, prompt: int) -> Iterator[Answers]:
    """Run a client that generates, and then replays the vectors that it sent.

    `generate` generates so many tokens after a random prompt. `replay` sends as many recorded
    vectors to the trunk, one at a time, always after the same prompt. Both return their begin and
    end, in seconds of a clock that all processes share.
    """
    model = shape.client()
    with closing(WatchedLink(GrpcLink(address, token=token, wire=shape.run.wire))) as link:
        trunk = RemoteTrunk(link, model, shape.run, client=name_of(seed))
        connect(model, trunk)
        chance = torch.Generator().manual_seed(seed)
        ids_BT = torch.randint(shape.vocabulary, (1, prompt), generator=chance)

        def generate(new_tokens: int) -> tuple[float, float]:
            link.forget()
            began = time.monotonic()
            text_of(model, ids_BT, new_tokens)
            return began, time.monotonic()

        replayed = _Replay(trunk, link)
        yield {"generate": generate, "record": replayed.record, "replay": replayed}


def name_of(seed: int) -> str:
    """Return the name of a client with this seed."""
    return f"client{seed}"


class _Replay:
    """Sends the recorded vectors of a generation again, without running the client's blocks."""

    def __init__(self, trunk: RemoteTrunk, link: WatchedLink) -> None:
        self._trunk = trunk
        self._link = link
        self._call = 0

    def record(self) -> int:
        """Take the link's records, send their prompt, and return the number of vectors."""
        sent = [seen.request.smashed_BTD for seen in self._link.of(GenerateRequest)]
        self._link.forget()
        self._prompt_BTD, *self._vectors = sent
        # A session of its own: that of the generation already has the vectors in its cache.
        self._session, self._call = self._trunk.open_cache(0), 0
        self._send(self._prompt_BTD, past=0)
        return len(self._vectors)

    def __call__(self, steps: int) -> tuple[float, float]:
        """Send the first `steps` vectors, and return the begin and end in seconds."""
        self._link.forget()
        past = self._prompt_BTD.shape[1]
        began = time.monotonic()
        for i, vector_BTD in enumerate(self._vectors[:steps]):
            self._send(vector_BTD, past=past + i)
        return began, time.monotonic()

    def _send(self, smashed_BTD: Tensor, past: int) -> None:
        request = GenerateRequest(
            session=self._session,
            call=self._call,
            past=past,
            logits_to_keep=1,
            smashed_BTD=smashed_BTD,
        )
        self._trunk.exchange(request)
        self._call += 1
