"""A TCP proxy that disturbs what passes through it: resets, delays, or holds back all bytes."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_PIECE_BYTES = 1 << 16


class Proxy:
    """Stands between clients and the server at `target` (host:port).

    Args:
        target: The address of the server. It may start later than the proxy.
        reset_every: Every so manieth piece of bytes, of all connections and both directions, is
            thrown away and its connection reset; 0 stands for never.

    Attributes:
        address: The address that clients call.
        resets: The number of connections that were reset.
        delay_s: Seconds by which each piece of bytes is delayed.
    """

    def __init__(self, target: str, reset_every: int) -> None:
        self.address = ""
        self.resets = 0
        self.delay_s = 0.0
        self._target = target.rpartition(":")
        self._reset_every = reset_every
        self._pieces = 0
        self._flows = asyncio.Event()
        self._flows.set()
        self._open: set[asyncio.StreamWriter] = set()

    async def run(self, ready: threading.Event) -> None:
        """Carry connections until cancelled."""
        server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self.loop = asyncio.get_running_loop()
        ready.set()
        async with server:
            await server.serve_forever()

    def hold(self) -> None:
        """Let no byte through any more, in either direction, and no connection break."""
        self._soon(self._flows.clear)

    def heal(self) -> None:
        """Let through what was held back, and all that follows."""
        self._soon(self._flows.set)

    def reset(self) -> None:
        """Reset all connections."""
        self._soon(self._reset)

    def stop(self) -> None:
        """End the proxy and all connections."""
        self._soon(lambda: [task.cancel() for task in asyncio.all_tasks(self.loop)])

    def _soon(self, action: Callable[[], object]) -> None:
        self.loop.call_soon_threadsafe(action)

    def _reset(self) -> None:
        for end in self._open:
            end.transport.abort()
        self.resets += len(self._open) // 2

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(self._target[0], self._target[2])
        except OSError:
            writer.transport.abort()
            return
        ends = writer, far_writer
        self._open.update(ends)
        try:
            await asyncio.gather(
                self._pump(reader, far_writer, ends), self._pump(far_reader, writer, ends)
            )
        except asyncio.CancelledError:
            for end in ends:
                end.transport.abort()
        finally:
            self._open.difference_update(ends)

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        ends: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> None:
        with suppress(OSError):
            while piece := await source.read(_PIECE_BYTES):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                await self._flows.wait()
                self._pieces += 1
                if self._reset_every and self._pieces % self._reset_every == 0:
                    self.resets += 1
                    break
                sink.write(piece)
                await sink.drain()
        for end in ends:
            end.transport.abort()


@contextmanager
def proxied(target: str, reset_every: int = 0) -> Iterator[Proxy]:
    """A proxy before `target`, in a thread of its own, gone at the end."""
    proxy, ready = Proxy(target, reset_every), threading.Event()

    def serve() -> None:
        with suppress(asyncio.CancelledError):
            asyncio.run(proxy.run(ready))

    thread = threading.Thread(target=serve, name="proxy")
    thread.start()
    ready.wait()
    try:
        yield proxy
    finally:
        proxy.stop()
        thread.join()
