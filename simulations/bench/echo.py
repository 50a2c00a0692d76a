"""The servers and clients of the wire's benchmarks: a bare gRPC echo, and the stack without blocks.

Shapes: B sequences, T tokens, D hidden width. The echo's serializers are the identity, so its
messages stay bytes from end to end, and it measures the cost of gRPC itself in Python.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import grpc
import torch
from torch import Tensor

from fedsplit.client.remote import RemoteTrunk
from fedsplit.spec import WireSpec
from fedsplit.transport.client import GrpcLink
from fedsplit.transport.server import GrpcServer
from fedsplit.transport.tls import channel_credentials, server_credentials
from fedsplit.trunk.service import TrunkService
from simulations.bench import naive
from simulations.bench.models import Shape
from simulations.bench.processes import Answers, Process, process

SERVICE = "Echo"
MAX_CLIENTS = 8
_ANY_LENGTH = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)


# --- servers --------------------------------------------------------------------------------------


@contextmanager
def echo_server(wire: WireSpec) -> Iterator[Answers]:
    """Serve a bare echo at `address`: of a unary call, of a stream, and of the naive design."""
    methods = {
        "Unary": grpc.unary_unary_rpc_method_handler(lambda message, context: message),
        "Stream": grpc.stream_stream_rpc_method_handler(lambda messages, context: messages),
        "Naive": grpc.unary_unary_rpc_method_handler(
            lambda message, context: naive.answered(message)
        ),
    }
    server = grpc.server(ThreadPoolExecutor(MAX_CLIENTS), options=_ANY_LENGTH)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    if wire.tls_cert:
        port = server.add_secure_port(wire.bind, server_credentials(wire))
    else:
        port = server.add_insecure_port(wire.bind)
    server.start()
    is_file = wire.bind.startswith("unix:")
    address = wire.bind if is_file else f"{wire.bind.rpartition(':')[0]}:{port}"
    yield {"address": lambda: address}
    server.stop(grace=0).wait()


@contextmanager
def hollow_server(shape: Shape, wire: WireSpec) -> Iterator[Answers]:
    """Serve the whole stack with a trunk that returns its input.

    Its answers are `address`, the `token` of a client, and the `usage` of the server's slots.
    """
    trunk: Any = shape.trunk()
    trunk.forward = _identity
    with TrunkService(trunk, shape.run) as service:
        server = GrpcServer(service, wire=wire, limits=service.limits, max_clients=MAX_CLIENTS)
        address = server.start()
        yield {
            "address": lambda: address,
            "token": service.admit,
            "usage": lambda: server.usage,
        }
        server.stop()


def _identity(smashed_BTD: Tensor, *_: Any) -> Tensor:
    return smashed_BTD


# --- a client -------------------------------------------------------------------------------------


@contextmanager
def talker(
    shape: Shape, wire: WireSpec, name: str, echo: str, hollow: str, token: str
) -> Iterator[Answers]:
    """Run a client of both servers.

    Its answers are `stack`, `unary`, `stream` and `naive`. Each takes rows, tokens and a number of
    round trips, and returns the begin and end of each round trip, in seconds of a clock that all
    processes share. A round trip before the first one warms up and is left out.

    Args:
        shape: The model, of which messages have the width.
        wire: The TLS settings.
        name: The client's name.
        echo: The address of the echo.
        hollow: The address of the stack.
        token: The client's token at the stack.
    """
    model = shape.client()
    with closing(GrpcLink(hollow, token=token, wire=wire)) as link, _channel(echo, wire) as channel:
        trunk = RemoteTrunk(link, model, shape.run, client=name)
        unary = channel.unary_unary(f"/{SERVICE}/Unary", None, None)
        naively = channel.unary_unary(f"/{SERVICE}/Naive", None, None)
        stream = _Streamed(channel)

        def of_bytes(trip: Callable[[bytes], Any]) -> Callable[..., list[list[float]]]:
            return lambda rows, tokens, trips: _timed(
                trips, trip, shape.smashed(rows, tokens).numpy().tobytes()
            )

        def of_tensors(rows: int, tokens: int, trips: int) -> list[list[float]]:
            smashed_BTD = shape.smashed(rows, tokens)
            with torch.no_grad():
                assert trunk(smashed_BTD).equal(smashed_BTD), "the stack's trunk is not hollow"
                return _timed(trips, trunk, smashed_BTD)

        def of_arrays(rows: int, tokens: int, trips: int) -> list[list[float]]:
            array_BTD = shape.smashed(rows, tokens).numpy()
            return _timed(
                trips, lambda each: naive.unpacked(naively(naive.packed(each))), array_BTD
            )

        with trunk.session(training=False):
            yield {
                "stack": of_tensors,
                "unary": of_bytes(unary),
                "stream": of_bytes(stream),
                "naive": of_arrays,
            }


def _channel(address: str, wire: WireSpec) -> grpc.Channel:
    if wire.tls_cert:
        return grpc.secure_channel(address, channel_credentials(wire), _ANY_LENGTH)
    return grpc.insecure_channel(address, _ANY_LENGTH)


class _Streamed:
    """A stream on which each message gets one reply."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._outbox: SimpleQueue[bytes] = SimpleQueue()
        stream = channel.stream_stream(f"/{SERVICE}/Stream", None, None)
        self._replies: Any = stream(iter(self._outbox.get, None))

    def __call__(self, message: bytes) -> bytes:
        self._outbox.put(message)
        reply: bytes = next(self._replies)
        return reply


def _timed(trips: int, trip: Callable[[Any], Any], value: Any) -> list[list[float]]:
    trip(value)
    marks = [time.monotonic()]
    for _ in range(trips):
        trip(value)
        marks.append(time.monotonic())
    return [list(pair) for pair in zip(marks, marks[1:], strict=False)]


# --- servers and clients --------------------------------------------------------------------------


@contextmanager
def talkers(shape: Shape, wire: WireSpec, num_clients: int = 1) -> Iterator[list[Process]]:
    """Run an echo, the stack, and clients of both inside the block, each in a process.

    Args:
        shape: The model, which decides the limits of the stack's messages.
        wire: The TLS settings, and the address of both servers; for unix: the folder.
        num_clients: The number of clients, at most `MAX_CLIENTS`.
    """
    with ExitStack() as stack:
        echo = stack.enter_context(process(echo_server, _at(wire, "echo")))
        hollow = stack.enter_context(process(hollow_server, shape, _at(wire, "hollow")))
        addresses = echo.ask("address"), hollow.ask("address")
        names = [f"client{i}" for i in range(num_clients)]
        tokens = [hollow.ask("token", name) for name in names]
        yield [
            stack.enter_context(process(talker, shape, wire, name, *addresses, token))
            for name, token in zip(names, tokens, strict=True)
        ]


def _at(wire: WireSpec, name: str) -> WireSpec:
    return replace(wire, bind=wire.bind + name) if wire.bind.startswith("unix:") else wire
