"""Triangular Toeplitz matrices, whose products are convolutions."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efcp.curvature.structures.base import Structure

_ODD_PARTS = (1, 3, 5, 9, 15, 25)  # times a power of two: lengths for which the FFT is fast


_SMALL = 256  # up to this dimension a dense MMᵀ is at hand sooner, and multiplies faster, than FFTs
_CACHED = 1 << 17  # numbers that a transform, its product and its inverse may have to stay in the CPU's cache


def _fast_length(at_least: int) -> int:
    """The shortest fast length that is even and at least so long."""
    return min(2 * odd << max(0, (-(-at_least // (2 * odd)) - 1).bit_length()) for odd in _ODD_PARTS)


class TriangularToeplitz(Structure):
    """One coefficient a diagonal: `M[i, j] = c[i − j]` for i ≥ j (lower), or `M[i, j] = c[j − i]` for j ≥ i (upper).

    Every operation is a few FFTs of length 2d; no d×d matrix with d > 256 is ever formed. Products of two such
    matrices are computed in float64: a rounding error there would stay in the factor.
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
        return self._projected(sum(self._power(self._fft(part)) for part in self._in_cache(rows)))

    def moment(self, values: Tensor, rows: Tensor) -> Tensor:
        spectrum, power = self._fft(values), values.new_zeros(self._length // 2 + 1)
        for part in self._in_cache(rows):
            power += self._power(torch.fft.rfft(self._cut(self._applied(spectrum, part))))
        return self._projected(power)

    def times_metric(self, values: Tensor, rows: Tensor, metric: Tensor | None = None) -> Tensor:
        if self.dim <= _SMALL:
            return rows @ self._small_metric(values)
        spectrum, product = self._fft(values), torch.empty_like(rows, memory_format=torch.contiguous_format)
        for part, target in zip(self._in_cache(rows), self._in_cache(product), strict=True):
            moved = self._applied(spectrum, self._cut(self._applied(spectrum, part)), transpose=True)
            target.copy_(moved[:, : self.dim])
        return product

    def metric_times(self, values: Tensor, columns: Tensor, metric: Tensor | None = None) -> Tensor:
        if self.dim <= _SMALL:
            return self._small_metric(values) @ columns
        return super().metric_times(values, columns)

    def _small_metric(self, values: Tensor) -> Tensor:
        """(d, d) MMᵀ in O(d²): of a lower M by `R[i, j] = R[i − 1, j − 1] + c[i]·c[j]`, of an upper turned round."""
        d, width = self.dim, 2 * self.dim
        shifted = torch.cat([values, values.new_zeros(d)]).as_strided((d, d), (1, 1))  # c[i + l], zero from d on
        sums = values.new_zeros(d, width)
        torch.cumsum(values.unsqueeze(1) * shifted, 0, out=sums[:, :d])  # R[i, i + l]
        above = sums.as_strided((d, d), (width - 1, 1))  # R[i, j] for j ≥ i, and zeros that lie before it
        metric = above + above.T
        metric.diagonal().mul_(0.5)
        return metric if self.lower else metric.flip(0, 1)

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

    def _in_cache(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The rows in parts, none if there are none, which the FFT refuses; on a GPU one part."""
        n_rows = max(1, _CACHED // self._length) if rows.device.type == "cpu" else max(1, len(rows))
        return rows.split(n_rows) if len(rows) else ()

    def _power(self, spectra: Tensor) -> Tensor:
        """(length/2 + 1,) squared magnitudes, summed over rows; overwrites `spectra`."""
        return torch.view_as_real(spectra).square_().sum(0).sum(1)

    def _projected(self, power: Tensor) -> Tensor:
        return self._mean(torch.fft.irfft(power, n=self._length)[: self.dim]) * self.weight(power)

    def _mean(self, sums: Tensor) -> Tensor:
        return sums / torch.arange(self.dim, 0, -1, dtype=sums.dtype, device=sums.device)

    def _fft(self, rows: Tensor) -> Tensor:
        return torch.fft.rfft(rows, n=self._length)

    def _ifft(self, spectra: Tensor) -> Tensor:
        return torch.fft.irfft(spectra, n=self._length)[..., : self.dim]
