"""Odd values for each type that a peer can send, drawn from a seeded generator.

Shapes: B sequences, T tokens, D hidden width.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedsplit.wire.codec import DTYPES

INTEGERS = (
    *(0, 1, 2, 3, 7, 15, 16, 17, 255, 256, 1023, 65537, 10**6),
    *(2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1),
)
"""Numbers of an unsigned field of 64 bits."""

FLOATS = (
    *(0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e-300, 1e38, -1e38, 1e300, 65504.0, 2.0**24),
    *(math.nan, math.inf, -math.inf),
)

TEXTS = (
    *("", "-", "none", "a", "client-0", "../../x", "/etc/passwd", "${oc.env:HOME}", "a.b", "a=b"),
    *("int8", "int8:stochastic", "topk:0.1", "topk:nan", "huffman:1e-9", "bf16", "bfloat16"),
    *("\x00", "\x1b[2J", "\n", "\u202e", "\U0001f9ff", "%s%n", "{0}", "x" * 65, "y" * 5000),
)

_NUMBERS = (0.0, 1.0, -1.0, 1e-45, 1e30, -3e38, math.nan, math.inf)
_INTEGERS = (0, 1, -1, 5, 127, 2**31 - 1, -(2**31))
_SIZES = (1, 1, 2, 3, 4, 8, 15, 16, 17, 33)


def integer(rng: random.Random) -> int:
    """Return an odd number of at least 0."""
    return rng.choice(INTEGERS) if rng.random() < 0.8 else rng.getrandbits(rng.randint(1, 64))


def signed(rng: random.Random) -> int:
    """Return an odd number of 64 bits with a sign."""
    return max(-(2**63), min(2**63 - 1, rng.choice((-1, 1)) * integer(rng)))


def number(rng: random.Random) -> float:
    """Return an odd float."""
    return rng.choice(FLOATS) if rng.random() < 0.8 else rng.uniform(-100, 100)


def text(rng: random.Random) -> str:
    """Return an odd text that protobuf can carry."""
    if rng.random() < 0.8:
        return rng.choice(TEXTS)
    return "".join(chr(rng.choice((rng.randint(1, 126), rng.randint(160, 5000)))) for _ in "seven")


def flag(rng: random.Random) -> bool:
    """Return true or false."""
    return rng.random() < 0.5


def some(rng: random.Random, value: Callable[[random.Random], Any]) -> list[Any]:
    """Return up to three odd values."""
    return [value(rng) for _ in range(rng.randint(0, 3))]


def mapping(rng: random.Random, value: Callable[[random.Random], Any]) -> dict[str, Any]:
    """Return up to three odd keys with odd values."""
    return {text(rng): value(rng) for _ in range(rng.randint(0, 3))}


def tensor(rng: random.Random, like: Tensor | None) -> Tensor:
    """Return a tensor that differs from another in shape, dtype or values."""
    old = torch.ones(2, 3) if like is None else like
    match rng.randrange(4):
        case 0:
            return _filled(rng, old.shape, old.dtype)
        case 1:
            return _filled(rng, old.shape, rng.choice(list(DTYPES.values())))
        case 2:
            shape = list(old.shape)
            shape[rng.randrange(len(shape))] = rng.choice(_SIZES)
            return _filled(rng, shape, old.dtype)
        case _:
            shape = [rng.choice(_SIZES) for _ in range(rng.randint(1, 4))]
            while math.prod(shape) > 20_000:
                shape.pop()
            return _filled(rng, shape, rng.choice(list(DTYPES.values())))


def _filled(rng: random.Random, shape: Any, dtype: torch.dtype) -> Tensor:
    """Return a tensor of one number, in which some entries are odd."""
    if dtype == torch.bool:
        return torch.full(tuple(shape), rng.random() < 0.5)
    values: Any = _NUMBERS if dtype.is_floating_point else _INTEGERS
    flat = torch.full((math.prod(shape),), rng.choice(values[:3]), dtype=dtype)
    for _ in range(rng.choice((0, 0, 1, 3))):
        # Beyond float16, a number of torch would raise.
        flat[rng.randrange(len(flat))] = torch.tensor(rng.choice(values)).to(dtype)
    return flat.view(tuple(shape))


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Return bytes with some of them flipped, left out, inserted or repeated."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(6):
            case 0 | 1 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                del out[at:]
            case 3:
                out[at:at] = rng.randbytes(rng.choice((1, 2, 8)))
            case 4:
                out[at:at] = out[at : at + rng.choice((1, 4, 64))] * rng.choice((1, 2, 100))
            case _:
                del out[at : at + rng.choice((1, 2, 4, 16))]
    return bytes(out)


DRAWS: Mapping[Any, Callable[[random.Random], Any]] = {
    bool: flag,
    int: signed,
    float: number,
    str: text,
    bytes: lambda rng: rng.randbytes(rng.choice((0, 1, 30))),
    list[float]: lambda rng: some(rng, number),
    list[str]: lambda rng: some(rng, text),
    dict[str, float]: lambda rng: mapping(rng, number),
    dict[str, str]: lambda rng: mapping(rng, text),
    dict[str, Any]: lambda rng: mapping(rng, text),
}
"""Draws an odd value of a type."""


def changed(rng: random.Random, values: Mapping[str, Any], kinds: Sequence[Any]) -> dict[str, Any]:
    """Return a mapping in which one key is missing, added or has an odd value.

    Args:
        rng: The source of choices.
        values: The mapping.
        kinds: The types of odd values.
    """
    out = dict(values)
    name = rng.choice(list(out))
    match rng.randrange(4):
        case 0:
            del out[name]
        case 1:
            out[text(rng)] = DRAWS[rng.choice(kinds)](rng)
        case _:
            out[name] = DRAWS[rng.choice(kinds)](rng)
    return out
