"""Damage to files, and disks without room."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager


def with_flipped(content: bytes, bit: int) -> bytes:
    """A copy in which one bit has changed; a negative number counts from the end."""
    data = bytearray(content)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """A context in which no file can be larger than `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
