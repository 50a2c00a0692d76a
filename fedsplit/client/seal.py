"""Client weights under a seal: a server adds them without reading one client's, or the mean.

A client turns its weights, times its share, into whole numbers and adds a pad of AES in counter
mode (NIST SP 800-38A) to each, modulo 2^32. The key of a pad is made of the key that the clients
share and a nonce that the client draws for each set of weights, so no pad is used twice. A client
subtracts the pads of all whose weights are in a sum. A client that is gone is in no sum, so nothing
has to be repaired for it (Bonawitz et al. 2017, "Practical Secure Aggregation", CCS, need further
messages, because their clients share no key). Whoever has the key can read everything.
"""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from fedsplit.client.keys import kept_key, read_key, require_key
from fedsplit.errors import ConfigError, NonFinite

NONCE_BYTES = 16

_SCALE = 2.0**23
"""Steps of a whole number in 1, so that sums of shares of weights below 256 fit 32 bits."""
_LARGEST = 2.0**31 / _SCALE
_SHARES, NONCES = "sealed/share", "sealed/nonces"
"""The names of share and nonces among the names of weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedWeights:
    """The sealed weights of a client, or the sum of those of several.

    Attributes:
        values: uint32 arrays by the names of weights.
        share: The sealed share [2], uint32, twice, which shows whether a key opens it.
        nonces: The nonce of each client [clients, 16], uint8; zeros for a client that is not in
            the sum.
    """

    values: Mapping[str, Any]
    share: Any
    nonces: Any

    @staticmethod
    def none(shapes: Mapping[str, tuple[int, ...]], clients: int) -> "SealedWeights":
        """Return the sum of no client's weights, which stands for the initial ones."""
        return SealedWeights(
            values={name: np.zeros(shape, np.uint32) for name, shape in shapes.items()},
            share=np.zeros(2, np.uint32),
            nonces=np.zeros((clients, NONCE_BYTES), np.uint8),
        )

    @staticmethod
    def of(arrays: Mapping[str, Any]) -> "SealedWeights":
        """Return the weights of which these are the `arrays`."""
        values = dict(arrays)
        share, nonces = values.pop(_SHARES), values.pop(NONCES)
        return SealedWeights(values=values, share=share, nonces=nonces)

    @staticmethod
    def of_tensors(tensors: Mapping[str, Tensor]) -> "SealedWeights":
        """Return the weights of which these are the `tensors`."""
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        wide = {name: a.view(np.uint32) for name, a in arrays.items() if a.dtype == np.int32}
        return SealedWeights.of({**arrays, **wide})

    @property
    def arrays(self) -> dict[str, Any]:
        """All arrays by name."""
        return {**self.values, _SHARES: self.share, NONCES: self.nonces}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All arrays by name as tensors, for a file; the bits of uint32 are in int32."""
        return {
            name: torch.from_numpy(values.view(np.int32) if values.dtype == np.uint32 else values)
            for name, values in self.arrays.items()
        }

    @property
    def clients(self) -> list[int]:
        """The numbers of the clients whose weights are in the sum."""
        return [int(number) for number in np.flatnonzero(self.nonces.any(axis=1))]

    def plus(self, other: "SealedWeights") -> "SealedWeights":
        """Return the sum, modulo 2^32, with weights of other clients."""
        return SealedWeights(
            values={name: _plus(each, other.values[name]) for name, each in self.values.items()},
            share=_plus(self.share, other.share),
            nonces=self.nonces | other.nonces,
        )


def added(weights: Sequence[SealedWeights]) -> SealedWeights:
    """Return the sum of sealed weights, at least one, of different clients."""
    return reduce(SealedWeights.plus, weights)


class Seal:
    """Seals the weights of clients that share a key, and opens sums of them.

    Args:
        key: The 32 bytes of all clients, which the server does not have.

    Raises:
        ConfigError: The key has another size.
    """

    def __init__(self, key: bytes) -> None:
        self._key = require_key(key, "the key of a seal")

    @staticmethod
    def of(file: Path) -> "Seal":
        """Return the seal of a key file.

        Raises:
            ConfigError: There is no such file, or no key in it.
        """
        return Seal(read_key(file))

    @staticmethod
    def kept(file: Path) -> "Seal":
        """Return the seal of a key file, which is made at the first time.

        Raises:
            StorageError: The file cannot be written.
        """
        return Seal(kept_key(file))

    @property
    def initial(self) -> int:
        """What decides the initial weights of a model from scratch, in place of the run's."""
        return int.from_bytes(hashlib.sha256(self._key + b"/initial").digest()[:8], "big") >> 1

    def sealed(
        self, weights: Mapping[str, Tensor], weight: int, most: int, *, client: int, clients: int
    ) -> SealedWeights:
        """Return sealed weights of a client.

        Args:
            weights: The weights by name.
            weight: The client's weight in the mean.
            most: The most that the weights of all clients can be together.
            client: The client's number.
            clients: The number of clients of the run.

        Raises:
            NonFinite: A weight is NaN or Inf.
            ConfigError: A weight is too large for a sum of 32 bits.
        """
        nonce = secrets.token_bytes(NONCE_BYTES)
        unit = int(_SCALE) // most
        # Whole multiples, so that the mean has exactly these weights, unless they are too many.
        counted = weight * unit if unit else round(weight / most * _SCALE)
        nonces = np.zeros((clients, NONCE_BYTES), np.uint8)
        nonces[client] = np.frombuffer(nonce, np.uint8)
        values = {}
        for name, tensor in weights.items():
            exact = tensor.detach().cpu().double().numpy()
            _require_sealable(name, exact)
            whole = np.rint(exact * counted).astype(np.int64).astype(np.uint32)
            values[name] = _plus(whole, self._pad(nonce, name, whole.shape))
        total = _plus(np.full(2, counted, np.uint32), self._pad(nonce, _SHARES, (2,)))
        return SealedWeights(values=values, share=total, nonces=nonces)

    def opened(self, weights: SealedWeights) -> dict[str, Tensor]:
        """Return the mean of the weights in a sum, in float32; empty for that of no client.

        Raises:
            ConfigError: The weights were sealed with another key.
        """
        found = weights.clients
        if not found:
            return {}
        nonces = [weights.nonces[number].tobytes() for number in found]
        total, again = self._without_pads(weights.share, _SHARES, nonces)
        # With another key, they are any two numbers.
        if total != again or total <= 0:
            raise ConfigError(
                f"the sealed weights of {len(found)} clients do not open with this key; give all "
                "clients the same key file"
            )
        means = {
            name: self._without_pads(values, name, nonces) / total
            for name, values in weights.values.items()
        }
        return {
            name: torch.from_numpy(np.asarray(mean, np.float32)) for name, mean in means.items()
        }

    def _without_pads(self, values: Any, name: str, nonces: Sequence[bytes]) -> Any:
        for nonce in nonces:
            values = np.subtract(
                values, self._pad(nonce, name, values.shape), out=np.empty(values.shape, np.uint32)
            )
        return values.view(np.int32).astype(np.float64)

    def _pad(self, nonce: bytes, name: str, shape: tuple[int, ...]) -> Any:
        key = hashlib.sha256(self._key + nonce + name.encode()).digest()
        cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        size = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(cipher.update(bytes(4 * size)), "<u4").reshape(shape)


def _plus(one: Any, other: Any) -> Any:
    # Into an array, since NumPy warns of scalars that wrap.
    return np.add(one, other, out=np.empty(one.shape, np.uint32))


def _require_sealable(name: str, weight: Any) -> None:
    largest = float(np.abs(weight).max(initial=0.0))
    if not np.isfinite(largest):
        raise NonFinite(f"{name} has NaN or Inf, so it is not sealed")
    if largest >= _LARGEST - 1:
        raise ConfigError(
            f"{name} has a weight of {largest:.4g}, and sealed ones are below {_LARGEST - 1:g}; "
            "train without client_weights.sealed"
        )
