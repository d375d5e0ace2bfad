"""Triangular Toeplitz matrices, whose products are convolutions."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efcp.curvature.structures.base import Structure

_ODD_PARTS = (1, 3, 5, 9, 15)  # times a power of two: lengths for which the FFT is fast


def _fast_length(at_least: int) -> int:
    """The shortest fast length that is even and at least so long."""
    return min(2 * odd << max(0, (-(-at_least // (2 * odd)) - 1).bit_length()) for odd in _ODD_PARTS)


class TriangularToeplitz(Structure):
    """One coefficient a diagonal: `M[i, j] = c[i − j]` for i ≥ j (lower), or `M[i, j] = c[j − i]` for j ≥ i (upper).

    Every operation is a few FFTs of length 2d; no d×d matrix is ever formed. Products of two such matrices are
    computed in float64: a rounding error there would stay in the factor.
    """

    def __init__(self, dim: int, lower: bool):
        super().__init__(dim)
        self.numel, self.lower = dim, lower
        self._length = _fast_length(2 * dim - 1)  # no wrap-around

    def identity(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        values = torch.zeros(self.dim, dtype=dtype, device=device)
        values[:1] = 1
        return values

    def weight(self, like: Tensor) -> Tensor:
        weight = torch.full((self.dim,), 2.0, dtype=like.dtype, device=like.device)
        weight[:1] = 1
        return weight

    def apply(self, values: Tensor, rows: Tensor, transpose: bool = False) -> Tensor:
        return self._applied(self._fft(values), rows, transpose)[:, : self.dim]

    def extract(self, left: Tensor, right: Tensor) -> Tensor:
        """Means of the diagonals of `leftᵀ right`: all rows share one inverse transform."""
        below, above = (left, right) if self.lower else (right, left)
        return self._mean(self._ifft((self._fft(below) * self._fft(above).conj()).sum(0)))

    def project(self, rows: Tensor) -> Tensor:
        return self._projected(self._fft(rows))

    def moment(self, values: Tensor, rows: Tensor) -> Tensor:
        if not len(rows):  # which the FFT refuses: a batch without tokens of this layer
            return torch.zeros_like(values)
        return self._projected(torch.fft.rfft(self._cut(self._applied(self._fft(values), rows))))

    def times_metric(self, values: Tensor, rows: Tensor, metric: Tensor | None = None) -> Tensor:
        spectrum = self._fft(values)
        return self._applied(spectrum, self._cut(self._applied(spectrum, rows)), transpose=True)[:, : self.dim]

    def gram(self, values: Tensor) -> Tensor:
        """`Σᵢ (MᵀM)[i, i + j] = Σₛ c[s + j]·(d − s − j)·c[s]`, whether M is lower or upper."""
        c = values.double()
        left = torch.arange(self.dim, 0, -1, dtype=c.dtype, device=c.device)
        sums = self._ifft(self._fft(c * left) * self._fft(c).conj())
        return (self._mean(sums) * self.weight(c)).to(values.dtype)

    def product(self, values: Tensor, other: Tensor) -> Tensor:
        return self._ifft(self._fft(values.double()) * self._fft(other.double())).to(values.dtype)

    def mean_square(self, values: Tensor) -> Tensor:
        lengths = torch.arange(self.dim, 0, -1, dtype=values.dtype, device=values.device)
        return (values.square() * lengths).sum() / self.dim

    def _applied(self, spectrum: Tensor, rows: Tensor, transpose: bool = False) -> Tensor:
        """(n, length): `rows @ M` and, behind the first d columns, what wraps around; `spectrum` is M's."""
        if self.lower != transpose:  # x @ lower correlates, x @ upper convolves
            spectrum = spectrum.conj()
        return torch.fft.irfft(self._fft(rows).mul_(spectrum), n=self._length)

    def _cut(self, rows: Tensor) -> Tensor:
        """Rows of a whole length with zeros behind the first d columns: in place, where slicing would copy twice."""
        rows[:, self.dim :] = 0
        return rows

    def _projected(self, spectra: Tensor) -> Tensor:
        power = torch.view_as_real(spectra).square_().sum((0, 2))
        return self._mean(torch.fft.irfft(power, n=self._length)[: self.dim]) * self.weight(power)

    def _mean(self, sums: Tensor) -> Tensor:
        return sums / torch.arange(self.dim, 0, -1, dtype=sums.dtype, device=sums.device)

    def _fft(self, rows: Tensor) -> Tensor:
        return torch.fft.rfft(rows, n=self._length)

    def _ifft(self, spectra: Tensor) -> Tensor:
        return torch.fft.irfft(spectra, n=self._length)[..., : self.dim]
