"""The codec `lowrank`: a batch of rows as a few components that they share.

Shapes: N rows, D values in a row, R components, M bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit.errors import BadTensor
from fedsplit.wire.huffman import Huffman, encoded, fewest_bytes, most_bytes
from fedsplit.wire.lossy import Codec, rows_at_once
from fedsplit.wire.packing import largest, rms

MAX_RANK = 32
"""The most components of one tensor."""

_ITERATIONS = 2
_LENGTH_BYTES = 4
_HEADER_BYTES = 1 + 2 * _LENGTH_BYTES
_SECTION = Huffman()


@dataclass(frozen=True, slots=True)
class LowRank(Codec):
    """The principal components of all rows, and the rest if it is large; all Huffman-coded.

    Hidden states of many tokens lie near a subspace of few dimensions. So the tensor is sent as a
    product of coefficients [N, R] and a basis [R, D]. R is the smallest number of components whose
    rest has no more energy than the rounding errors of `huffman` at the same step; this rest is
    dropped. If `MAX_RANK` components leave more, the step is doubled. If they still do, the rest is
    sent in this step, and R is the number for which an estimate of the bits is smallest.

    The step is a fraction of the median of the rows' root mean squares, one for the whole tensor,
    so a few rows of large values do not make it longer. The subspace is found by subspace
    iteration: Halko et al. 2011, "Finding Structure with Randomness", SIAM Review 53(2), arXiv
    0909.4061. It starts from rows of the tensor, so the same tensor has the same bytes.

    The bytes are R, the lengths of basis and coefficients, and then basis, coefficients and the
    rest (none if it is dropped), each as `huffman` encodes it.

    Args:
        step: The step in root mean squares of the median row; decoding does not use it.
    """

    step: float = 1.0

    def check(self, nbytes: int, num_rows: int, width: int) -> None:
        """See `Codec`."""
        what = f"the components of {num_rows} rows of {width} values"
        if nbytes < _HEADER_BYTES + fewest_bytes(1, width) + fewest_bytes(num_rows, 1):
            raise BadTensor(f"{nbytes} bytes are too few for {what}")
        rank = _max_rank(num_rows, width)
        sections = ((rank, width), (num_rows, rank), (num_rows, width))
        if nbytes > _HEADER_BYTES + sum(most_bytes(*shape) for shape in sections):
            raise BadTensor(f"{nbytes} bytes are too many for {what}")

    def encode(self, rows_ND: Tensor, whole_ND: Tensor | None = None) -> Tensor:
        """See `Codec`."""
        rows_ND = rows_ND.cpu()
        step = self.step * _median_rms(rows_ND if whole_ND is None else whole_ND.cpu())
        basis_RD, stds_R, step, has_rest = _components(rows_ND, step)
        # A component's error in the basis is multiplied by its coefficients, which are as large as
        # its deviation. So its step is shorter, and both errors are of one size.
        lengths_R = (step / stds_R).nan_to_num_(nan=1.0).clamp_(max=1.0)
        basis = encoded(basis_RD, lengths_R.unsqueeze(1) / (2 * rows_ND.shape[1]) ** 0.5)
        basis_RD = _SECTION.decode(basis, *basis_RD.shape)
        # The decoded basis is not quite orthonormal, so its pseudoinverse gives the coefficients.
        coefficients_NR = rows_ND @ _pseudoinverse(basis_RD)
        steps_N1 = step.expand(len(rows_ND), 1)
        sections = [basis, encoded(coefficients_NR, steps_N1)]
        if has_rest:
            decoded_NR = _SECTION.decode(sections[1], *coefficients_NR.shape)
            sections.append(encoded(rows_ND - _product(decoded_NR, basis_RD), steps_N1))
        lengths = (len(each).to_bytes(_LENGTH_BYTES, "little") for each in sections[:2])
        header = bytearray([len(basis_RD)]) + b"".join(lengths)
        return torch.cat([torch.frombuffer(header, dtype=torch.uint8), *sections])

    def pieces(self, bytes_M: Tensor, num_rows: int, width: int) -> Iterator[Tensor]:
        """See `Codec`."""
        rank, basis, coefficients, rest = _sections(bytes_M, num_rows, width)
        basis_RD = _SECTION.decode(basis, rank, width)
        coefficients_NR = _SECTION.decode(coefficients, num_rows, rank)
        rest_pieces = _SECTION.pieces(rest, num_rows, width) if len(rest) else None
        for piece_NR in coefficients_NR.split(rows_at_once(width)):
            piece_ND = _product(piece_NR, basis_RD)
            yield piece_ND if rest_pieces is None else piece_ND.add_(next(rest_pieces))


def _median_rms(rows_ND: Tensor) -> Tensor:
    """The median of the root mean squares of all rows that are not 0, or 0 if there is none."""
    rms_N1 = rms(rows_ND, largest(rows_ND))
    positive = rms_N1[rms_N1 > 0]
    return positive.median() if len(positive) else torch.zeros(())


def _components(rows_ND: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Basis [R, D], deviations of its coefficients [R], step, and whether the rest is sent."""
    num_rows, width = rows_ND.shape
    # Divided by the largest value, so that squares neither overflow nor vanish.
    unit = rows_ND.abs().amax()
    if not unit.isfinite():  # the trunk's guard refuses the decoded NaN
        return torch.full((1, width), torch.nan), torch.ones(1), step, False
    if not unit:
        return torch.zeros(1, width), torch.ones(1), step, False
    scaled_ND = rows_ND / unit
    basis_DR = _subspace(scaled_ND, _max_rank(num_rows, width))
    # The eigenvectors turn the basis to the principal components in it, the largest first.
    small_NR = scaled_ND @ basis_DR
    energies_R, turn_RR = torch.linalg.eigh(small_NR.T @ small_NR)
    energies_R, turn_RR = energies_R.flip(0).clamp_(min=0.0), turn_RR.flip(1)
    left_R = (scaled_ND.square().sum() - energies_R.cumsum(0)).clamp_(min=0.0)
    # Energies per value, over the mean square of the rounding error.
    error = (step / unit).square() / 12
    shares_R, left_R = energies_R / num_rows / error, left_R / scaled_ND.numel() / error
    if not left_R.le(1.0).any():
        step, shares_R, left_R = 2 * step, shares_R / 4, left_R / 4
    has_rest = not left_R.le(1.0).any()
    # Gaussian values of such energies take so many bits after dithered rounding.
    bits_R = shares_R.log1p().cumsum(0) + width * left_R.log1p()
    best = bits_R.argmin() if has_rest else left_R.le(1.0).int().argmax()
    rank = int(best) + 1
    basis_RD = (basis_DR @ turn_RR[:, :rank]).T.contiguous()
    stds_R = (energies_R[:rank] / num_rows).sqrt() * unit
    return basis_RD, stds_R, step, has_rest


def _subspace(rows_ND: Tensor, rank: int) -> Tensor:
    """An orthonormal basis [D, R] of the subspace with most of the rows' energy, nearly."""
    chosen_R = torch.linspace(0, len(rows_ND) - 1, rank).long()
    basis_DR = rows_ND[chosen_R].T
    for _ in range(_ITERATIONS):
        basis_DR = torch.linalg.qr(rows_ND.T @ (rows_ND @ torch.linalg.qr(basis_DR).Q)).Q
    return basis_DR


def _pseudoinverse(basis_RD: Tensor) -> Tensor:
    gram_RR = basis_RD @ basis_RD.T
    if gram_RR.isfinite().all():
        gram_RR = torch.linalg.pinv(gram_RR, hermitian=True)
    return basis_RD.T @ gram_RR


def _product(coefficients_NR: Tensor, basis_RD: Tensor) -> Tensor:
    """The rows that the components give, in float32."""
    # In float64, since the sums of float32 differ from one matrix library to another, and with
    # references (`fedsplit.wire.delta`) both sides must decode the same values.
    return (coefficients_NR.double() @ basis_RD.double()).float()


def _max_rank(num_rows: int, width: int) -> int:
    return min(MAX_RANK, num_rows, width)


def _sections(bytes_M: Tensor, num_rows: int, width: int) -> tuple[int, Tensor, Tensor, Tensor]:
    """The rank, and the bytes of basis, coefficients and the rest, which may be empty.

    Raises:
        BadTensor: The header or the length of a section is not possible.
    """
    header = bytes(bytes_M[:_HEADER_BYTES].numpy())
    rank, lengths = header[0], header[1:]
    basis, coefficients = (
        int.from_bytes(lengths[begin : begin + _LENGTH_BYTES], "little")
        for begin in (0, _LENGTH_BYTES)
    )
    most = _max_rank(num_rows, width)
    if not 1 <= rank <= most:
        raise BadTensor(f"{rank} components were sent; 1 to {most} are possible here")
    rest = len(bytes_M) - _HEADER_BYTES - basis - coefficients
    if rest < 0:
        raise BadTensor(
            f"{len(bytes_M)} bytes are too few for sections of {basis} and {coefficients} bytes"
        )
    _SECTION.check(basis, rank, width)
    _SECTION.check(coefficients, num_rows, rank)
    if rest:
        _SECTION.check(rest, num_rows, width)
    sections = bytes_M[_HEADER_BYTES:].split([basis, coefficients, rest])
    return rank, *sections
