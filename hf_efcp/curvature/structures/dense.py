"""Full and diagonal matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efcp.curvature.structures.base import Structure

_STRIPES = 8  # of a symmetric product: 9/16 of its multiplications are made


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """`leftᵀ @ right`, (d, d), where that is known to be symmetric: on the CPU one half is copied from the other."""
    d = left.shape[1]
    if left.device.type != "cpu" or d < 32 * _STRIPES:
        return left.T @ right
    product = left.new_empty(d, d)
    for start in range(0, d, -(-d // _STRIPES)):
        end = min(d, start + -(-d // _STRIPES))
        torch.mm(left[:, start:end].T, right[:, start:], out=product[start:end, start:])
        product[end:, start:end] = product[start:end, end:].T
    return product


class Dense(Structure):
    """All d² entries. Sums of rows' products are kept raw, so that a batch costs one product and not two."""

    sums_raw = True

    def __init__(self, dim: int):
        super().__init__(dim)
        self.numel = dim * dim

    def identity(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.eye(self.dim, dtype=dtype, device=device).flatten()

    def apply(self, values: Tensor, rows: Tensor, transpose: bool = False) -> Tensor:
        matrix = self._square(values)
        return rows @ (matrix.T if transpose else matrix)

    def extract(self, left: Tensor, right: Tensor) -> Tensor:
        return (left.T @ right).flatten()

    def gram(self, values: Tensor) -> Tensor:
        matrix = self._square(values)
        return symmetric_product(matrix, matrix).flatten()

    def product(self, values: Tensor, other: Tensor) -> Tensor:
        return (self._square(values) @ self._square(other)).flatten()

    def project(self, rows: Tensor) -> Tensor:
        return symmetric_product(rows, rows).flatten()

    def moment(self, values: Tensor, rows: Tensor) -> Tensor:
        return self.project(rows)

    def metric(self, values: Tensor) -> Tensor:
        """MMᵀ."""
        matrix = self._square(values).T
        return symmetric_product(matrix, matrix).flatten()

    def finish(self, values: Tensor, moment: Tensor) -> Tensor:
        matrix = self._square(values)
        return symmetric_product(self._square(moment) @ matrix, matrix).flatten()

    def mean_curvature(self, values: Tensor, moment: Tensor, metric: Tensor | None = None) -> Tensor:
        metric = self.metric(values) if metric is None else metric
        return torch.dot(moment, metric) / self.dim

    def mean_trace(self, values: Tensor) -> Tensor:
        return self._square(values).diagonal().mean()

    def _square(self, values: Tensor) -> Tensor:
        return values.view(self.dim, self.dim)


class DenseMetric(Dense):
    """A dense M of which only P = MMᵀ is stored: without momentum of directions, P's own update needs no M.

    That halves memory, and an update takes three products, two of them symmetric, instead of five.
    """

    def mean_square(self, values: Tensor) -> Tensor:
        return self.mean_trace(values)

    def mean_curvature(self, values: Tensor, moment: Tensor, metric: Tensor | None = None) -> Tensor:
        return torch.dot(moment, values) / self.dim

    def times_metric(self, values: Tensor, rows: Tensor) -> Tensor:
        return rows @ self._square(values)

    def scaled(self, values: Tensor, factor: Tensor) -> Tensor:
        return values * factor.square()

    def moved(self, values: Tensor, curvature: Tensor, lr_cov: float, limits: bool) -> Tensor:
        """P after `M ← M(I − βm)` with `m = ½(MᵀWM − I)`, in closed form.

        `P ← (1 + b)²P − 2b(1 + b) PWP + b² PWPWP`, `b = β/2`; `PW` has the eigenvalues of `MᵀWM`.

        Args:
            curvature: W, damped.
            lr_cov: β.
            limits: whether β is divided by max(1, ρ(m)).
        """
        p, w = self._square(values), self._square(curvature)
        pw = p @ w
        b: Tensor | float = lr_cov / 2
        if limits:
            direction = pw.flatten() - self.identity(pw.dtype, pw.device)
            b = b / (self.radius(direction) / 2).clamp_min(1)
        pwp = symmetric_product(pw.T, p)
        pwpwp = symmetric_product(pw.T, pwp)
        return ((1 + b) ** 2 * p - 2 * b * (1 + b) * pwp + b**2 * pwpwp).flatten()


class Diagonal(Structure):
    """The d diagonal entries."""

    sums_raw = True

    def __init__(self, dim: int):
        super().__init__(dim)
        self.numel = dim

    def identity(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.ones(self.dim, dtype=dtype, device=device)

    def apply(self, values: Tensor, rows: Tensor, transpose: bool = False) -> Tensor:
        return rows * values

    def extract(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.linalg.vecdot(left, right, dim=0)

    def gram(self, values: Tensor) -> Tensor:
        return values.square()

    def product(self, values: Tensor, other: Tensor) -> Tensor:
        return values * other

    def moment(self, values: Tensor, rows: Tensor) -> Tensor:
        return self.extract(rows, rows)

    def finish(self, values: Tensor, moment: Tensor) -> Tensor:
        return values.square() * moment
