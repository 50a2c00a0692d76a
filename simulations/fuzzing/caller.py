"""A client of a server's port that sends any frames."""

from collections.abc import Iterator
from typing import Any

import grpc

from fedsplit.transport.frames import FRAME_BYTES, SERVICE, Reader
from fedsplit.transport.status import TOKEN_KEY, from_rpc_error

DEADLINE_S = 10.0
"""The deadline of a call; in the attacked service no client waits for another."""

_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))


class Caller:
    """Calls a server with any frames."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel = grpc.insecure_channel(address, _OPTIONS)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def call(self, method: str, frames: list[bytes], token: str, leave_after: int) -> Iterator[Any]:
        """Yield the messages that come back; leave after some frames, or with -1 at the end."""
        exchange = self._channel.stream_stream(f"/{SERVICE}/{method}", bytes, bytes)
        metadata = ((TOKEN_KEY, token),)
        call: Any = exchange(iter(frames), metadata=metadata, timeout=DEADLINE_S)
        reader = Reader(FRAME_BYTES)
        try:
            for number, frame in enumerate(call):
                if (message := reader.feed(frame)) is not None:
                    yield message
                if number == leave_after:
                    break
        except grpc.RpcError as error:
            yield from_rpc_error(error, self._address, DEADLINE_S)
        finally:
            call.cancel()
