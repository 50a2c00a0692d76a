"""Damage to the bytes of files."""


def with_flipped(content: bytes, bit: int) -> bytes:
    """A copy in which one bit has changed; a negative number counts from the end."""
    data = bytearray(content)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)
