"""The ranks of a trunk: starts or joins them, connects them, and ends all of them if one fails.

torchrun starts the ranks of several machines. On one machine, rank 0 starts the others itself, and
they listen to this machine only.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore

from fedsplit.console import print_error
from fedsplit.errors import ConfigError, FedsplitError, Internal, error_text
from fedsplit.model.stage import TrunkPart
from fedsplit.ranks.messages import read, tensors_of, written
from fedsplit.trunk.shards import group_of
from fedsplit.trunk.turns import Message

_BEAT_S = 0.5
_SILENCE_S = 5.0
"""The time after which a rank that does not answer is taken for dead."""

_SKEW_S = 8.0
"""The longest wait of a rank for another within a computation; longer, the other one hangs."""

_GRACE_S = 1.0
"""The time in which clients and probes learn that this server is not serving."""

_START_S = 120.0
_FOREVER = timedelta(days=365)
_PACKET = 32 << 10
"""The bytes of the first broadcast of a message; a longer message has a second one."""

_LOST = "lost"
_PARENT = "FEDSPLIT_RANK_0"
"""The variable with the process id of rank 0, in the environment of the ranks that it starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where this process is among the ranks; `torchrun` says so in the environment."""

    rank: int
    size: int

    @staticmethod
    def of(environment: Mapping[str, str]) -> "Place | None":
        """Return the place that torchrun or rank 0 gave this process; None if neither did."""
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
            return None
        return Place(rank=int(environment["RANK"]), size=int(environment["WORLD_SIZE"]))


class Ranks:
    """The connected ranks; implements `fedsplit.trunk.turns.Channel`.

    Args:
        place: The place of this process.
        children: The processes that this rank has started.

    Attributes:
        rank: The number of this process, from 0.
        size: The number of ranks.
        is_child: Whether rank 0 has started this process; if not, torchrun has.
        on_lost: Called once with the reason, before all ranks end because of it.
    """

    def __init__(self, place: Place, children: Sequence["subprocess.Popen[bytes]"]) -> None:
        self.rank, self.size = place.rank, place.size
        self.is_child = place.rank > 0 and "TORCHELASTIC_RUN_ID" not in os.environ
        self.on_lost: Callable[[FedsplitError], None] = lambda reason: None
        self._store = dist.distributed_c10d._get_default_store()
        self._children = children
        self._parent = os.getppid()
        self._control = dist.new_group(backend="gloo", timeout=_FOREVER)
        self._beats = dist.new_group(backend="gloo", timeout=timedelta(seconds=_SILENCE_S))
        self._ended = threading.Event()
        self._losing = threading.Lock()
        self._watching = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._watching.start()

    # --- Channel ------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Send a message to all other ranks."""
        header, frames = written(message)
        sizes = len(header).to_bytes(8, "little") + len(frames).to_bytes(8, "little")
        data = bytearray(b"".join((sizes, header, frames)))
        rest = data[_PACKET:]
        self._broadcast(_as_tensor(data[:_PACKET].ljust(_PACKET, b"\0")))
        if rest:
            self._broadcast(_as_tensor(rest))
        for tensor in tensors_of(message):
            self._broadcast(tensor.contiguous())

    def receive(self) -> Message:
        """Return the next message of rank 0."""
        first = bytearray(_PACKET)
        self._broadcast(_as_tensor(first))
        header_size, frames_size = (int.from_bytes(first[i : i + 8], "little") for i in (0, 8))
        end = 16 + header_size + frames_size
        data = first[:end]
        if end > _PACKET:
            rest = bytearray(end - _PACKET)
            self._broadcast(_as_tensor(rest))
            data += rest
        begin = 16 + header_size
        message = read(bytes(data[16:begin]), bytes(data[begin:]))
        for tensor in tensors_of(message):
            self._broadcast(tensor)
        return message

    def fail(self, reason: str) -> NoReturn:
        """End all ranks with one line on stderr; at the end of a server, wait for that end."""
        if self._ended.is_set() or not self._losing.acquire(blocking=False):
            while True:  # another thread ends this process
                time.sleep(_START_S)
        if self.rank == 0:
            reason = self._first_reason() or reason
        error = Internal(f"{reason}; this trunk runs on {self.size} ranks, and all of them end")
        self.on_lost(error)
        if self.rank == 0 or not self._told_rank_0(reason):
            if self.rank < 2:
                print_error(error, debug=False)
        for child in self._children:
            child.kill()
        time.sleep(_GRACE_S)
        os._exit(1)

    # --- the life of the ranks ----------------------------------------------------------------

    def lead(self, trunk: TrunkPart, on_lost: Callable[[FedsplitError], None]) -> None:
        """Have the other ranks run what the engine of a trunk runs; `on_lost` is the attribute."""
        self.on_lost = on_lost
        self.begin(group_of(trunk))

    def begin(self, group: "dist.ProcessGroup") -> None:
        """Wait for all ranks, which have read their shards, and bound later waits for each other.

        Args:
            group: The group in which the ranks compute.
        """
        dist.barrier(group=self._control)
        if dist.get_backend(group) == "gloo":
            timeout = timedelta(seconds=_SKEW_S)
            dist.distributed_c10d._set_pg_timeout(timeout, group)

    def end(self) -> None:
        """Have the other ranks end, and wait until they do."""
        if self.rank == 0 and not self._ended.is_set():
            self.send(None)
        self._ended.set()
        with suppress(RuntimeError):
            dist.barrier(group=self._control)
        for child in self._children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(_SILENCE_S)
        self._disconnect()

    def give_up(self, error: Exception) -> None:
        """End the other ranks because of an error of this one, which rank 0 raises itself."""
        if self.rank:
            self.fail(error_text(error))
        self._ended.set()
        self._disconnect()

    def _disconnect(self) -> None:
        for child in self._children:
            child.kill()
            child.wait()
        self._watching.join(_SILENCE_S + _BEAT_S)
        dist.destroy_process_group()

    def wait_if_lost(self) -> None:
        """Wait for the end of this process if a rank is lost; it comes in a moment."""
        if self._losing.locked():
            time.sleep(_START_S)

    @property
    def device(self) -> str:
        """The torch device of this rank."""
        local = int(os.environ.get("LOCAL_RANK", "0"))
        return f"cuda:{local}" if torch.cuda.is_available() else "cpu"

    def _broadcast(self, tensor: Tensor) -> None:
        try:
            dist.broadcast(tensor, 0, group=self._control)
        except RuntimeError as exc:
            self.fail(self._cause(exc))

    def _watch(self) -> None:
        beat = torch.zeros(1)
        while not self._ended.wait(_BEAT_S):
            try:
                dist.all_reduce(beat, group=self._beats)
            except RuntimeError as exc:
                if not self._ended.is_set():
                    self.fail(self._cause(exc))

    def _cause(self, exc: Exception) -> str:
        for rank, child in enumerate(self._children, start=1):
            with suppress(subprocess.TimeoutExpired):
                status = child.wait(_BEAT_S)
                return f"rank {rank} has ended with status {status}"
        if "imed out" in str(exc):
            return f"a rank has not answered for {_SILENCE_S:g} s"
        return "a rank has ended"

    def _first_reason(self) -> str:
        """Return the reason that another rank has given, if one has."""
        with suppress(RuntimeError):
            if self._store.check([_LOST]):
                return str(self._store.get(_LOST), "utf-8")
        return ""

    def _told_rank_0(self, reason: str) -> bool:
        """Tell rank 0 why this rank ends; return False if rank 0 is gone, and end it if it stands.

        Rank 0 prints the reason.
        """
        heard = threading.Event()

        def tell() -> None:
            with suppress(RuntimeError):
                self._store.set(_LOST, reason)
                self._store.add(_LOST + "/told", 1)  # which waits for an answer, unlike `set`
                heard.set()

        # In a thread, because a stopped process accepts what it never answers.
        threading.Thread(target=tell, daemon=True).start()
        if heard.wait(_GRACE_S):
            return True
        # A stopped process does not end by itself; torchrun ends its own.
        if self.is_child and os.getppid() == self._parent:
            os.kill(self._parent, signal.SIGKILL)
        return False


@contextmanager
def ranks_of(size: int, command: Sequence[str]) -> Iterator[Ranks | None]:
    """A context with the ranks of a trunk; None for a trunk in one process.

    Args:
        size: The number of ranks.
        command: What starts another rank on this machine, if torchrun did not start this one.

    Raises:
        ConfigError: torchrun has started another number of ranks.
    """
    if size == 1:
        yield None
        return
    place = Place.of(os.environ)
    if place and place.size != size:
        raise ConfigError(
            f"tp={size}, but torchrun has started {place.size} ranks; let --tp be the number of "
            "ranks, nnodes times nproc-per-node"
        )
    children: list[subprocess.Popen[bytes]] = []
    connected = threading.Event()
    if place:
        # Rank 0 may have ended before this line.
        _end_with_parent(int(os.environ.get(_PARENT, os.getppid())))
        dist.init_process_group(_backend())
    else:
        place, store = Place(rank=0, size=size), _store(size)
        children = [_started(command, rank, size, store.port) for rank in range(1, size)]
        _end_with_a_child(children, connected)
        # The others meet in this part of the store, as after torchrun.
        meeting = PrefixStore("default_pg", store)
        dist.init_process_group(_backend(), store=meeting, rank=0, world_size=size)
    ranks = Ranks(place, children)
    connected.set()
    try:
        yield ranks
    except Exception as exc:
        ranks.give_up(exc)
        raise
    ranks.end()


def _end_with_parent(parent: int) -> None:
    """End this process with the one that started it, from before the ranks are connected."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_BEAT_S)
        # Connected ranks notice it themselves, and one of them says so.
        time.sleep(_SILENCE_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _end_with_a_child(
    children: Sequence["subprocess.Popen[bytes]"], connected: threading.Event
) -> None:
    """End this process if one that it has started ends before the ranks are connected."""

    def watch() -> None:
        while not connected.wait(_BEAT_S):
            for rank, child in enumerate(children, start=1):
                if child.poll() is not None:
                    status = f"rank {rank} has ended with status {child.returncode}"
                    print_error(Internal(f"{status} before it was connected"), debug=False)
                    for each in children:
                        each.kill()
                    os._exit(1)

    threading.Thread(target=watch, name="children", daemon=True).start()


def _store(size: int) -> TCPStore:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)
    # A socket that the store makes itself listens to all machines, whatever its host is.
    listener = socket.create_server(("127.0.0.1", 0))
    host, port = listener.getsockname()
    return TCPStore(
        host,
        port,
        size,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=_START_S),
        master_listen_fd=listener.detach(),
    )


_LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


def _started(command: Sequence[str], rank: int, size: int, port: int) -> "subprocess.Popen[bytes]":
    place = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        _PARENT: str(os.getpid()),
    }
    # Ctrl-C is for rank 0 alone, which ends the others in order.
    return subprocess.Popen(
        list(command),
        env={"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ, **place},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _as_tensor(data: bytearray) -> Any:
    return torch.frombuffer(data, dtype=torch.uint8)
