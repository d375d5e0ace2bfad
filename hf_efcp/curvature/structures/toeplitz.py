"""Triangular Toeplitz matrices, whose products are convolutions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from hf_efcp.curvature.structures.base import Structure
from hf_efcp.curvature.structures.dense import symmetric_product

_ODD_PARTS = (1, 3, 5, 9, 15, 25)  # times a power of two: lengths for which the FFT is fast
_SMALL = 256  # up to this dimension dense matrices are at hand sooner, and multiply faster, than FFTs
_BLOCK = 48  # columns at a time of such an MMᵀ
_CACHED = 1 << 17  # numbers that a transform, its product and its inverse may have to stay in the CPU's cache


def _fast_length(at_least: int) -> int:
    """The shortest fast length that is even and at least so long."""
    return min(2 * odd << max(0, (-(-at_least // (2 * odd)) - 1).bit_length()) for odd in _ODD_PARTS)


class TriangularToeplitz(Structure):
    """One coefficient a diagonal: `M[i, j] = c[i − j]` for i ≥ j (lower), or `M[i, j] = c[j − i]` for j ≥ i (upper).

    Every operation is a few FFTs of length 2d; no d×d matrix with d > 256 is ever formed. Up to there a moment is
    `Σ aaᵀ`, which layers with the same rows share. Products of two such matrices are computed in float64: a rounding
    error there would stay in the factor.
    """

    def __init__(self, dim: int, lower: bool):
        super().__init__(dim)
        self.numel, self.lower = dim, lower
        self.sums_raw = dim <= _SMALL
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
        if self.sums_raw:
            return symmetric_product(rows, rows).flatten()
        spectrum, power = self._fft(values), values.new_zeros(self._length // 2 + 1)
        for part in self._in_cache(rows):
            power += self._power(torch.fft.rfft(self._cut(self._applied(spectrum, part))))
        return self._projected(power)

    def moment_trace(self, moment: Tensor) -> Tensor:
        return moment.view(self.dim, self.dim).diagonal().mean()

    def shifted(self, moment: Tensor, weight: Tensor | float, damping: Tensor | float) -> Tensor:
        shifted = moment * weight
        shifted.view(self.dim, self.dim).diagonal().add_(damping)
        return shifted

    def finish(self, values: Tensor, moment: Tensor) -> Tensor:
        if not self.sums_raw:
            return moment
        matrix = self._small_matrix(values)
        moved = symmetric_product(moment.view(self.dim, self.dim) @ matrix, matrix)
        # Row i moved left by i: all of a diagonal lies in one column, and zeros from below it. `vmap` has no `triu_`.
        diagonals = functional.pad(moved.triu(), (0, self.dim)).as_strided(moved.shape, (2 * self.dim + 1, 1))
        return self._mean(diagonals.sum(0)) * self.weight(values)

    def times_metric(self, values: Tensor, rows: Tensor, metric: Tensor | None = None) -> Tensor:
        if self.sums_raw:
            return rows @ self._small_metric(values)
        spectrum, product = self._fft(values), torch.empty_like(rows, memory_format=torch.contiguous_format)
        for part, target in zip(self._in_cache(rows), self._in_cache(product), strict=True):
            moved = self._applied(spectrum, self._cut(self._applied(spectrum, part)), transpose=True)
            target.copy_(moved[:, : self.dim])
        return product

    def metric_times(self, values: Tensor, columns: Tensor, metric: Tensor | None = None) -> Tensor:
        if self.sums_raw:
            return self._small_metric(values) @ columns
        return super().metric_times(values, columns)

    def _small_matrix(self, values: Tensor) -> Tensor:
        """(d, d) M."""
        upper = functional.pad(values, (self.dim - 1, 0)).unfold(0, self.dim, 1).flip(0)
        return upper.T if self.lower else upper

    def _small_metric(self, values: Tensor) -> Tensor:
        """(d, d) MMᵀ of k-column products alone.

        With F the first k columns of a lower M, `MMᵀ[i, j] = FFᵀ[i, j] + MMᵀ[i − k, j − k]`; an upper one is turned
        round.
        """
        matrix = self._small_matrix(values)
        columns = (matrix if self.lower else matrix.flip(0, 1))[:, :_BLOCK]
        metric = columns @ columns.T
        for start in range(_BLOCK, self.dim, _BLOCK):
            rows = metric[start : start + _BLOCK, _BLOCK:]
            rows += metric[start - _BLOCK : start - _BLOCK + len(rows), : self.dim - _BLOCK]
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
