"""An attacker of a server: it opens calls that take what others need, and gives nothing back."""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import grpc

from fedsplit.transport import fedsplit_pb2 as pb
from fedsplit.transport.frames import CHUNK_BYTES, FRAME_BYTES, SERVICE
from fedsplit.transport.status import TOKEN_KEY
from simulations.bench.processes import Answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """Calls of one method, each with the same frames, after which it neither sends nor ends.

    It waits `pace_s` seconds before a new call, so that its own work does not take a whole core.
    """

    method: str
    frames: str = "none"
    at_once: int = 100
    pace_s: float = 0.02
    has_token: bool = False


ATTACKS = {
    "bodies": Attack(method="Compute"),
    "empty": Attack(method="Exchange", frames="empty", pace_s=0.2),
    "tensor": Attack(method="Exchange", frames="tensor", pace_s=0.2),
    "info": Attack(method="GetServiceInfo"),
    "info_empty": Attack(method="GetServiceInfo", frames="empty", pace_s=0.2),
    "streams": Attack(method="Exchange", at_once=64, has_token=True),
}
"""By name; all but the last one have no token."""

_PIECE_S = 0.02


@contextmanager
def attacker(address: str, token: str) -> Iterator[Answers]:
    """Run an attacker.

    Its answer `start` begins an attack, and `compute` takes a share of a core without an attack.
    `stop` ends either; it returns the MiB that were sent and the share of a core that was taken.
    """
    running: list[_Work] = []

    def start(name: str) -> None:
        attack = ATTACKS[name]
        running.append(_Calls(address, token if attack.has_token else "", attack))

    yield {
        "start": start,
        "compute": lambda share: running.append(_Computing(share)),
        "stop": lambda: running.pop().stop(),
    }


class _Work(ABC):
    """What an attacker does in a thread until it is stopped."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.stopped = threading.Event()
        self._began = time.perf_counter(), time.process_time()
        self._thread = threading.Thread(target=self.run, daemon=True)
        self._thread.start()

    @abstractmethod
    def run(self) -> None:
        """Work until `stopped` is set."""

    def stop(self) -> tuple[float, float]:
        """Stop; return the MiB that were given to gRPC to send, and the share of a core."""
        self.stopped.set()
        self._thread.join()
        wall_s, cpu_s = self._began
        share = (time.process_time() - cpu_s) / (time.perf_counter() - wall_s)
        return self.num_bytes / (1 << 20), share


class _Computing(_Work):
    """Takes a share of a core in small pieces."""

    def __init__(self, share: float) -> None:
        self._share = min(share, 1.0)
        super().__init__()

    def run(self) -> None:
        """See `_Work`."""
        while not self.stopped.wait(_PIECE_S * (1 - self._share)):
            end = time.thread_time() + _PIECE_S * self._share
            while time.thread_time() < end:
                pass


class _Calls(_Work):
    """Keeps the calls of an attack open: one that was ended is replaced."""

    def __init__(self, address: str, token: str, attack: Attack) -> None:
        self._attack = attack
        self._metadata = ((TOKEN_KEY, token),)
        self._channel = grpc.insecure_channel(address, (("grpc.use_local_subchannel_pool", 1),))
        super().__init__()

    def run(self) -> None:
        """See `_Work`."""
        open_stream = self._channel.stream_stream(f"/{SERVICE}/{self._attack.method}", None, None)
        calls: list[Any] = []
        while not self.stopped.wait(self._attack.pace_s):
            calls = [call for call in calls if call.is_active()]
            if len(calls) < self._attack.at_once:
                calls.append(open_stream(self._frames(), metadata=self._metadata))
        self._channel.close()

    def _frames(self) -> Iterator[bytes]:
        for frame in _FRAMES[self._attack.frames]():
            self.num_bytes += len(frame)
            yield frame
        self.stopped.wait()


@cache
def _empty_messages() -> list[bytes]:
    """A frame of messages without fields, for which protobuf takes 30 times its bytes."""
    empty = [pb.TensorMeta()] * ((FRAME_BYTES - 64) // 2)
    header = pb.Header(forward_request=pb.ForwardRequest(references=empty))
    return [pb.Frame(header=header).SerializeToString()]


@cache
def _compressed_tensor() -> list[bytes]:
    """The frames of a tensor of 7.5 MiB that a codec expands to 240 MiB."""
    rows, width = 60, 1 << 20
    num_bytes = rows * (2 + width // 8 + 6)
    meta = pb.TensorMeta(dtype="FLOAT32", codec=5, shape=[1, rows, width], nbytes=num_bytes)
    request = pb.ForwardRequest(session="s", training=True, smashed_BTD=meta)
    total = num_bytes + -num_bytes % 8
    headers = [pb.Header(forward_request=request, payload_bytes=total)]
    offsets = range(0, total, CHUNK_BYTES)
    headers += [pb.Header(chunk=pb.Chunk(offset=offset)) for offset in offsets[1:]]
    return [
        pb.Frame(header=header, payload=bytes(min(CHUNK_BYTES, total - offset))).SerializeToString()
        for header, offset in zip(headers, offsets, strict=True)
    ]


_FRAMES: dict[str, Callable[[], list[bytes]]] = {
    "none": lambda: [],
    "empty": _empty_messages,
    "tensor": _compressed_tensor,
}
