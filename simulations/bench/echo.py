"""What the benches of the wire talk to: a bare gRPC echo, and the whole stack around no trunk.

Shapes: B sequences, T tokens, D hidden width. The echo's serializers are the identity, so its
messages are bytes from end to end: it is what gRPC itself costs in Python.
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
    """A bare echo at an `address`: of one message, of a stream, and as the naive design does it."""
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
    """The server as it is, with a trunk that hands back what it gets: `address` and `token`."""
    trunk: Any = shape.trunk()
    trunk.run = _handed_back
    with TrunkService(trunk, shape.run) as service:
        server = GrpcServer(service, wire=wire, limits=service.limits, max_clients=MAX_CLIENTS)
        address = server.start()
        yield {"address": lambda: address, "token": service.admit}
        server.stop()


def _handed_back(smashed_BTD: Tensor, **_: Any) -> Tensor:
    return smashed_BTD


# --- a client -------------------------------------------------------------------------------------


@contextmanager
def talker(
    shape: Shape, wire: WireSpec, name: str, echo: str, hollow: str, token: str
) -> Iterator[Answers]:
    """A client of both servers, given their addresses and how it is admitted.

    Its answers are `stack`, `unary`, `stream` and `naive`. Each takes rows and tokens, and how
    many round trips to make one after the other, and says when each began and ended, in seconds
    of a clock that all processes share; before, it makes one more that does not count.
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
            with torch.no_grad():
                return _timed(trips, trunk, shape.smashed(rows, tokens))

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
    """One stream whose every message is answered by itself."""

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


# --- all of them ----------------------------------------------------------------------------------


@contextmanager
def talkers(shape: Shape, wire: WireSpec, num_clients: int = 1) -> Iterator[list[Process]]:
    """So many clients of an echo and of the stack, each with a process; gone after the block.

    Args:
        shape: Of the trunk that is not there, whose limits are those of the stack's messages.
        wire: TLS, and where both servers listen; of a unix: address, the folder.
        num_clients: At most `MAX_CLIENTS`.
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
