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
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from fedsplit.client.keys import kept_key, new_key, require_key
from fedsplit.client.ledger import Ledger
from fedsplit.errors import ConfigError
from fedsplit.spec.privacy import LEAST_NOISE

_GRID = 1024
"""The steps of the grid of released rows in one standard deviation of the noise."""


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

    The noise of a row is the same whenever the same row is sent again, so a server that provokes
    repeats, and one that sees two texts with the same beginning, gets no second sample of it. The
    bits are AES of a counter behind the digest of the row (counter mode, NIST SP 800-38A).

    Args:
        key: 32 secret bytes of the client. What decides the other random numbers of a run is not
            secret: the server knows it.

    Raises:
        ConfigError: The key has another size.
    """

    def __init__(self, key: bytes) -> None:
        self._key = require_key(key, "a noise key")

    @staticmethod
    def new() -> "NoiseKey":
        """Return a random key of the operating system."""
        return NoiseKey(new_key())

    @staticmethod
    def kept(file: Path) -> "NoiseKey":
        """Return the key in a file, which is made at the first time; only its owner may read it.

        Raises:
            StorageError: The file cannot be written.
            ConfigError: It has no key.
        """
        return NoiseKey(kept_key(file))

    def normals(self, rows_BTD: Tensor, purpose: str) -> Tensor:
        """Return standard normal noise of the shape of rows, on their device."""
        rows_ND = rows_BTD.detach().float().cpu().flatten(0, -2).contiguous().numpy()
        noise_ND = self._noise(rows_ND.view(np.uint32), purpose)
        return noise_ND.reshape(rows_BTD.shape).to(rows_BTD)

    def _noise(self, words_ND: Any, purpose: str) -> Tensor:
        N, D = words_ND.shape
        # A block of 16 bytes gives four numbers.
        num_blocks = math.ceil(D / 4)
        blocks = np.empty((N, num_blocks, 4), np.uint32)
        blocks[:, :, :3] = self._digests(words_ND, purpose)[:, None]
        blocks[:, :, 3] = np.arange(num_blocks)
        # No block comes twice, as each has its counter, so this is counter mode for all rows.
        cipher = Cipher(algorithms.AES(self._derived(purpose)), modes.ECB()).encryptor()  # noqa: S305
        random = cipher.update(blocks.data.cast("B"))
        words = np.frombuffer(random, np.uint32).reshape(N, 2, -1)
        # In (0, 1], of which a logarithm is finite.
        uniform = (words.astype(np.float32) + np.float32(1)) * np.float32(2.0**-32)
        # Box and Muller 1958.
        size = torch.from_numpy(uniform[:, 0]).log().mul_(-2).sqrt_()
        angle = torch.from_numpy(uniform[:, 1]).mul_(2 * math.pi)
        return torch.cat((size * angle.cos(), size * angle.sin()), dim=1)[:, :D]

    def _digests(self, words_ND: Any, purpose: str) -> Any:
        """Return the digest [N, 3] of each row: multilinear hashes under secret factors.

        Lemire and Kaser 2014, "Strongly Universal String Hashing is Fast", The Computer Journal,
        arXiv 1202.4961: the upper half of a sum modulo 2^64 of products with random factors.
        """
        D = words_ND.shape[1]
        cipher = Cipher(algorithms.AES(self._derived(f"{purpose}/digest")), modes.CTR(bytes(16)))
        random = cipher.encryptor().update(bytes(8 * 3 * (D + 1)))
        factors_FD = np.frombuffer(random, np.uint64).reshape(3, D + 1)
        sums_NF = np.einsum("nd,fd->nf", words_ND.astype(np.uint64), factors_FD[:, :D])
        return ((sums_NF + factors_FD[:, D]) >> np.uint64(32)).astype(np.uint32)

    def _derived(self, purpose: str) -> bytes:
        return hashlib.sha256(self._key + purpose.encode()).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What a shield knows of the text of a forward.

    Attributes:
        examples: What names the text of each sequence in the ledger; None if nobody said.
        factor: What the gradient of one token's loss is multiplied with.
        generation: The name of a text that grows; None for whole sequences.
        place: The number of its tokens before these.
    """

    examples: Sequence[bytes] | None = None
    factor: float = 1.0
    generation: bytes | None = None
    place: int = 0


class _Steps(threading.local):
    step = _Step()


class Shield:
    """A trunk that gets noisy rows; `connect(model, Shield(trunk, ...))` puts it in its place.

    Args:
        trunk: The trunk: a `RemoteTrunk`, or anything that `connect` takes.
        public: The statistics of public rows at the cut.
        key: Decides the noise.
        z: The standard deviation of the noise on each coordinate, in units of the public radius.
        gradient: What the trunk gets of the gradient of its output: `send`, `none`, or the
            standard deviation of noise, in units of the public radius of gradients, `grad_radius`.
        grad_radius: The norm that rows of the gradient are clipped to before they get noise, in
            units of `factor` in `of`.
        bypass: Whether only the trunk's own contribution is computed from noisy rows. Without it,
            and without `shrink`, the noise is that of other frameworks.
        shrink: Whether rows are shrunk.
        ledger: Counts what is released, and refuses what would exceed its budget. It needs the
            names of texts: run each forward in the context `of`. A generation is a text of its own.

    Raises:
        ConfigError: A size of noise is none, the public rows have no radius, or the gradient has
            noise and no radius.
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
        ledger: Ledger | None = None,
    ) -> None:
        if z and not LEAST_NOISE <= z < math.inf:
            raise ConfigError(f"z={z}: give a size of noise of {LEAST_NOISE:g} or more, or 0")
        if z and not 0 < public.radius < math.inf:
            raise ConfigError(
                f"the public rows have a radius of {public.radius}, so noise in units of it hides "
                "nothing; give other public text, and look whether the weights are those of a model"
            )
        if gradient not in ("send", "none"):
            if isinstance(gradient, str) or not LEAST_NOISE <= gradient < math.inf:
                raise ConfigError(
                    f"gradient={gradient!r}: give send, none or a size of noise of "
                    f"{LEAST_NOISE:g} or more"
                )
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
        self._ledger, self._z = ledger, z
        self._steps = _Steps()
        self._generations: WeakKeyDictionary[Any, bytes] = WeakKeyDictionary()
        if hasattr(trunk, "new_cache"):
            self.new_cache = trunk.new_cache

    @contextmanager
    def of(self, texts_BT: Tensor, factor: float = 1.0) -> Iterator[None]:
        """A context for the forwards of this thread on some text.

        Args:
            texts_BT: The token ids of each sequence; they name it in the ledger.
            factor: What the gradient of one token's loss will be multiplied with, as by the share
                of a token in a mean.
        """
        names = [hashlib.sha256(ids.numpy().tobytes()).digest() for ids in texts_BT.cpu()]
        self._steps.step = _Step(examples=names, factor=factor)
        try:
            yield
        finally:
            self._steps.step = _Step()

    def __call__(self, hidden_BTD: Tensor, *inputs: Any, **named: Any) -> Tensor:
        """Return the trunk's output for noisy rows, beside the rows themselves.

        Raises:
            PrivacyBudget: The ledger allows no further release of an example; nothing was sent.
        """
        step = self._step_of(named.get("cache"))
        sent_BTD = self._released(step, hidden_BTD) if self._z else hidden_BTD
        out_BTD = self._trunk(sent_BTD, *inputs, **named)
        if self._gradient not in ("send", "none") and out_BTD.requires_grad:
            # A backward may run in another thread.
            out_BTD.register_hook(partial(self._noisy_gradient, step))
        is_changed = self._z or self._gradient != "send"
        added_BTD = out_BTD - sent_BTD if self._bypass and is_changed else out_BTD
        if self._gradient == "none":
            # With the bypass, the bottom still learns through the residual stream.
            added_BTD = added_BTD.detach()
        return hidden_BTD + added_BTD if self._bypass and is_changed else added_BTD

    def _step_of(self, cache: Any) -> _Step:
        """Return what is known of the text of a forward with this cache."""
        if cache is None:
            return self._steps.step
        name = self._generations.setdefault(cache, secrets.token_bytes(16))
        return _Step(generation=name, place=getattr(cache, "num_tokens", 0))

    def _released(self, step: _Step, hidden_BTD: Tensor) -> Tensor:
        # On the CPU, where the noise and the statistics are.
        rows_BTD = self._public.clipped(hidden_BTD.float().cpu()) - self._public.mean_D
        noisy_BTD = self._noisy(rows_BTD, "rows", self._sigma)
        self._count(step, "rows", noisy_BTD, self._z)
        if self._map_DD is not None:
            noisy_BTD = noisy_BTD @ self._map_DD
        return (self._public.mean_D + noisy_BTD).to(hidden_BTD)

    def _noisy_gradient(self, step: _Step, grad_BTD: Tensor) -> Tensor:
        z, radius = float(self._gradient), self._grad_radius * step.factor
        noisy_BTD = self._noisy(clipped(grad_BTD.float().cpu(), radius), "labels", z * radius)
        self._count(step, "labels", noisy_BTD, z)
        return noisy_BTD.to(grad_BTD)

    def _noisy(self, rows_BTD: Tensor, kind: str, sigma: float) -> Tensor:
        # Two sizes of the same noise would cancel, and leave the row.
        noise_BTD = sigma * self._key.normals(rows_BTD, f"{kind} {sigma.hex()}")
        return _on_grid(rows_BTD + noise_BTD, sigma)

    def _count(self, step: _Step, kind: str, rows_BTD: Tensor, z: float) -> None:
        if not self._ledger:
            return
        rows = rows_BTD.detach().numpy()
        if step.generation:
            self._ledger.release_tokens(kind, step.generation, step.place, rows, z)
        elif step.examples is None:
            raise ConfigError(
                "the ledger does not know of which text these rows are, so nothing was sent; run "
                "the forward in `with shield.of(input_ids):`"
            )
        else:
            self._ledger.release(kind, step.examples, rows, z)


def _on_grid(rows_BTD: Tensor, sigma: float) -> Tensor:
    """Return rows rounded to a grid that is fine beside noise of this size.

    The last bits of a floating-point sum depend on the summand that the noise should hide (Mironov
    2012, "On Significance of the Least Significant Bits for Differential Privacy", CCS). As a
    gradient, it is that of the rows.
    """
    step = 2.0 ** math.floor(math.log2(sigma / _GRID))
    rounded_BTD: Tensor = (rows_BTD.detach() / step).round() * step
    return rows_BTD + (rounded_BTD - rows_BTD).detach()
