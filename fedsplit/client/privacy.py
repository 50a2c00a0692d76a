"""A shield around a trunk: the rows that leave the client have noise, and the server cannot tell.

Each row of hidden states is centered and clipped with the statistics of public text, and gets
Gaussian noise. Then it is shrunk towards the public mean, as a Wiener filter does, so that the
trunk gets the best linear estimate of the row. The client knows the row itself, so the residual
stream beside the trunk stays as it was: only what the trunk adds is computed from the noisy row.

Shapes: B sequences, T tokens, D hidden width, N rows.
"""

import hashlib
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from fedsplit.errors import ConfigError

KEY_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicRows:
    """The statistics of the rows of public text at the cut.

    Attributes:
        mean_D: Their mean.
        radius: The median of their distances from the mean; longer rows are clipped to it.
        covariance_DD: Their covariance after clipping.
    """

    mean_D: Tensor
    radius: float
    covariance_DD: Tensor

    @staticmethod
    def of(rows_ND: Tensor) -> "PublicRows":
        """Return the statistics of rows; there should be several times as many as D."""
        rows_ND = rows_ND.detach().float()
        mean_D = rows_ND.mean(0)
        radius = float((rows_ND - mean_D).norm(dim=-1).median())
        rest_ND = clipped(rows_ND - mean_D, radius)
        return PublicRows(
            mean_D=mean_D, radius=radius, covariance_DD=rest_ND.T @ rest_ND / len(rows_ND)
        )

    def clipped(self, rows_BTD: Tensor) -> Tensor:
        """Return rows no further than `radius` from the mean."""
        clipped_BTD: Tensor = self.mean_D + clipped(rows_BTD - self.mean_D, self.radius)
        return clipped_BTD

    def shrinking(self, sigma: float) -> Tensor:
        """Return the map [D, D] of the Wiener filter for noise of this size; one without noise."""
        noise_DD = sigma**2 * torch.eye(len(self.mean_D))
        map_DD: Tensor = torch.linalg.solve(self.covariance_DD + noise_DD, self.covariance_DD)
        return map_DD


def clipped(rows_BTD: Tensor, radius: float) -> Tensor:
    """Return rows with a norm of at most `radius`."""
    norms_BT1: Tensor = rows_BTD.norm(dim=-1, keepdim=True)
    clipped_BTD: Tensor = rows_BTD * (radius / norms_BT1.clamp_min(1e-30)).clamp_max(1.0)
    return clipped_BTD


class NoiseKey:
    """Gaussian noise that a secret key and the data decide.

    The noise of a sequence is the same whenever the same rows are sent again, so a server that
    provokes repeats learns nothing more. AES in counter mode (NIST SP 800-38A) gives the bits.

    Args:
        key: 32 secret bytes of the client; never the run's seed, which the server knows.

    Raises:
        ConfigError: The key has another size.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ConfigError(f"a noise key has {KEY_BYTES} bytes, but this one {len(key)}")
        self._key = key

    @staticmethod
    def new() -> "NoiseKey":
        """Return a random key of the operating system."""
        return NoiseKey(secrets.token_bytes(KEY_BYTES))

    def normals(self, rows_BTD: Tensor, purpose: str) -> Tensor:
        """Return standard normal noise of the shape of rows, one stream for each sequence."""
        noise = [self._stream(each.detach().cpu().numpy(), purpose) for each in rows_BTD.float()]
        return torch.from_numpy(np.stack(noise)).to(rows_BTD)

    def _stream(self, rows_TD: np.ndarray[Any, np.dtype[np.float32]], purpose: str) -> Any:
        name = hashlib.sha256(purpose.encode() + np.ascontiguousarray(rows_TD).tobytes()).digest()
        half = math.ceil(rows_TD.size / 2)
        # The first half of the digest makes the key of the stream, and the second one its counter.
        key = hashlib.sha256(self._key + name[:16]).digest()
        cipher = Cipher(algorithms.AES(key), modes.CTR(name[16:])).encryptor()
        words = np.frombuffer(cipher.update(bytes(16 * half)), np.uint64).reshape(2, half)
        # 53 bits, in (0, 1], of which a logarithm is finite.
        radius, angle = ((words >> np.uint64(11)) + 1) * 2.0**-53
        # Box and Muller 1958.
        size = np.sqrt(-2.0 * np.log(radius))
        both = np.concatenate((size * np.cos(2 * np.pi * angle), size * np.sin(2 * np.pi * angle)))
        return both[: rows_TD.size].reshape(rows_TD.shape).astype(np.float32)


class Shield:
    """A trunk that gets noisy rows; `connect(model, Shield(trunk, ...))` puts it in its place.

    Args:
        trunk: The trunk: a `RemoteTrunk`, or anything that `connect` takes.
        public: The statistics of public rows at the cut.
        key: Decides the noise.
        z: The standard deviation of the noise on each coordinate, in units of the public radius.
        gradient: What the trunk gets of the gradient of its output: `send`, `none`, or the
            standard deviation of noise, in units of the public radius of gradients, `grad_radius`.
        grad_radius: The norm that rows of the gradient are clipped to before they get noise.
        bypass: Whether only the trunk's own contribution is computed from noisy rows. Without it,
            and without `shrink`, the noise is that of other frameworks.
        shrink: Whether rows are shrunk.

    Raises:
        ConfigError: A size of noise is none, or the gradient has noise and no radius.
    """

    def __init__(
        self,
        trunk: Callable[..., Tensor],
        public: PublicRows,
        key: NoiseKey,
        *,
        z: float,
        gradient: str | float = "send",
        grad_radius: float = math.inf,
        bypass: bool = True,
        shrink: bool = True,
    ) -> None:
        if not 0 <= z < math.inf:
            raise ConfigError(f"z={z}: give a size of noise from 0 on")
        if gradient not in ("send", "none"):
            if isinstance(gradient, str) or not 0 <= gradient < math.inf:
                raise ConfigError(f"gradient={gradient!r}: give send, none or a size of noise")
            if not 0 < grad_radius < math.inf:
                raise ConfigError(
                    f"gradient={gradient} is in units of grad_radius={grad_radius}; give the "
                    "median norm of the gradient's rows for public text"
                )
        self._trunk = trunk
        self._public = public
        self._key = key
        self._sigma = z * public.radius
        self._gradient = gradient
        self._grad_radius = grad_radius
        self._bypass = bypass
        self._map_DD = public.shrinking(self._sigma) if shrink and z else None
        if hasattr(trunk, "new_cache"):
            self.new_cache = trunk.new_cache

    def __call__(self, hidden_BTD: Tensor, *inputs: Any, **named: Any) -> Tensor:
        """Return the trunk's output for noisy rows, beside the rows themselves."""
        sent_BTD = self._released(hidden_BTD) if self._sigma else hidden_BTD
        out_BTD = self._trunk(sent_BTD, *inputs, **named)
        if self._gradient not in ("send", "none") and out_BTD.requires_grad:
            out_BTD.register_hook(self._noisy_gradient)
        is_changed = self._sigma or self._gradient != "send"
        added_BTD = out_BTD - sent_BTD if self._bypass and is_changed else out_BTD
        if self._gradient == "none":
            # With the bypass, the bottom still learns through the residual stream.
            added_BTD = added_BTD.detach()
        return hidden_BTD + added_BTD if self._bypass and is_changed else added_BTD

    def _released(self, hidden_BTD: Tensor) -> Tensor:
        # On the CPU, where the noise and the statistics are.
        rows_BTD = self._public.clipped(hidden_BTD.float().cpu()) - self._public.mean_D
        noisy_BTD = rows_BTD + self._sigma * self._key.normals(rows_BTD, "rows")
        if self._map_DD is not None:
            noisy_BTD = noisy_BTD @ self._map_DD
        return (self._public.mean_D + noisy_BTD).to(hidden_BTD)

    def _noisy_gradient(self, grad_BTD: Tensor) -> Tensor:
        rows_BTD = clipped(grad_BTD.float(), self._grad_radius)
        sigma = float(self._gradient) * self._grad_radius
        noise_BTD = sigma * self._key.normals(rows_BTD, "gradient")
        return (rows_BTD + noise_BTD).to(grad_BTD.dtype)
