"""Full and diagonal matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_efcp.curvature.structures.base import Structure

_ROWS_IN_CACHE = 256  # of a few hundred entries
_STRIP = 64  # rows of a symmetric product that are computed from the diagonal on


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """`leftᵀ @ right`, (d, d), where that is known to be symmetric: on the CPU one half is copied from the other."""
    return symmetric_sum(None, 0.0, left, right, 1.0)


def symmetric_sum(
    base: Tensor | None, beta: Tensor | float, left: Tensor, right: Tensor, alpha: Tensor | float
) -> Tensor:
    """`beta·base + alpha·leftᵀ @ right`, (d, d), where base and product are symmetric; no base counts as zero."""
    if not _may_read(left):
        return general_sum(base, beta, left.T, right, alpha)
    d = left.shape[1]
    total, beta, alpha = left.new_empty(d, d), float(beta), float(alpha)
    end = 0
    while end < d:
        start, end = end, end + _STRIP if end + 1.5 * _STRIP < d else d
        rows, strip = left[:, start:end].T, total[start:end, start:]
        if base is None and alpha == 1:
            torch.mm(rows, right[:, start:], out=strip)
        else:
            old = strip.zero_() if base is None else base[start:end, start:]
            torch.addmm(old, rows, right[:, start:], beta=beta, alpha=alpha, out=strip)
        total[end:, start:end] = strip[:, end - start :].T
    return total


def general_sum(
    base: Tensor | None, beta: Tensor | float, left: Tensor, right: Tensor, alpha: Tensor | float
) -> Tensor:
    """`beta·base + alpha·left @ right`: in one call where the host may read the factors, else in place."""
    if base is not None and _may_read(left):
        return torch.addmm(base, left, right, beta=float(beta), alpha=float(alpha))
    total = torch.mm(left, right)
    if base is None:
        return total if isinstance(alpha, float) and alpha == 1 else total.mul_(alpha)
    return total.mul_(alpha).add_(base * beta)  # `addcmul_` has no batching rule


def _may_read(tensor: Tensor) -> bool:
    """Whether the host may read numbers: on the CPU, unless `vmap` runs a batch of matrices at once."""
    return tensor.device.type == "cpu" and not torch._C._functorch.is_batchedtensor(tensor)


class Dense(Structure):
    """All d² entries. Sums of rows' products are kept raw, so that a batch costs one product and not two."""

    sums_raw = True
    keeps_metric = True

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

    def times_metric(self, values: Tensor, rows: Tensor, metric: Tensor | None = None) -> Tensor:
        return super().times_metric(values, rows) if metric is None else rows @ self._square(metric)

    def metric_times(self, values: Tensor, columns: Tensor, metric: Tensor | None = None) -> Tensor:
        if metric is None:
            matrix = self._square(values)
            return matrix @ (matrix.T @ columns)
        return self._square(metric) @ columns

    def metric_times_blocks(self, values: Tensor, blocks: Sequence[Tensor], metric: Tensor | None = None) -> Tensor:
        # Each block's product lies where it belongs: joining a gradient first would copy it.
        rows = blocks[0].new_empty(self.dim, sum(block.shape[1] for block in blocks))
        matrix = self._square(values if metric is None else metric)
        for block, target in zip(blocks, rows.split([block.shape[1] for block in blocks], 1), strict=True):
            torch.mm(matrix, block if self._is_metric(metric) else matrix.T @ block, out=target)
        return rows

    def write_times_metric(
        self, values: Tensor, rows: Tensor, targets: Sequence[Tensor], metric: Tensor | None = None
    ) -> None:
        matrix = self._square(values if metric is None else metric)
        if not self._is_metric(metric):
            rows, matrix = rows @ matrix, matrix.T
        for target, columns in zip(targets, matrix.split([t.shape[1] for t in targets], 1), strict=True):
            torch.mm(rows, columns, out=target)

    def _is_metric(self, metric: Tensor | None) -> bool:
        """Whether what is multiplied by is MMᵀ itself."""
        return metric is not None

    def shifted(self, moment: Tensor, weight: Tensor | float, damping: Tensor | float) -> Tensor:
        shifted = moment * weight
        self._square(shifted).diagonal().add_(damping)
        return shifted

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

    keeps_metric = False

    def mean_square(self, values: Tensor) -> Tensor:
        return self.mean_trace(values)

    def mean_curvature(self, values: Tensor, moment: Tensor, metric: Tensor | None = None) -> Tensor:
        return torch.dot(moment, values) / self.dim

    def times_metric(self, values: Tensor, rows: Tensor, metric: Tensor | None = None) -> Tensor:
        return rows @ self._square(values)

    def metric_times(self, values: Tensor, columns: Tensor, metric: Tensor | None = None) -> Tensor:
        return self._square(values) @ columns

    def _is_metric(self, metric: Tensor | None) -> bool:
        return True

    def scaled(self, values: Tensor, factor: Tensor) -> Tensor:
        return values * factor.square()

    def moved(
        self,
        values: Tensor,
        moment: Tensor,
        weight: Tensor | float,
        damping: Tensor | float,
        *,
        lr_cov: float,
        limits: bool,
    ) -> Tensor:
        """P after `M ← M(I − βm)` with `m = ½(MᵀWM − I)`, in closed form.

        `P ← APAᵀ` with `A = (1 + b)I − b·PW`, `b = β/2`; `PW` has the eigenvalues of `MᵀWM`, and AP is symmetric.

        Args:
            moment, weight, damping: `W = weight·U + damping·I`.
            lr_cov: β.
            limits: whether β is divided by max(1, ρ(m)).
        """
        p, b = self._square(values), torch.full((), lr_cov / 2, dtype=values.dtype, device=values.device)
        pw = general_sum(p, damping, p, self._square(moment), weight)
        if limits:
            b = b / (self._radius(lambda row: torch.addmm(row, row, pw, beta=-1), pw) / 2).clamp_min(1)
        for _ in range(2):
            p = symmetric_sum(p, 1 + b, pw.T, p, -b)
        return p.flatten()


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
        if rows.device.type != "cpu":
            return self.extract(rows, rows)
        return sum(self.extract(part, part) for part in rows.split(_ROWS_IN_CACHE))

    def finish(self, values: Tensor, moment: Tensor) -> Tensor:
        return values.square() * moment

    def times_metric(self, values: Tensor, rows: Tensor, metric: Tensor | None = None) -> Tensor:
        return rows * values.square()

    def metric_times(self, values: Tensor, columns: Tensor, metric: Tensor | None = None) -> Tensor:
        return columns * values.square().unsqueeze(1)

    def metric_times_blocks(self, values: Tensor, blocks: Sequence[Tensor], metric: Tensor | None = None) -> Tensor:
        rows = blocks[0].new_empty(self.dim, sum(block.shape[1] for block in blocks))
        scale = values.square().unsqueeze(1)
        for block, target in zip(blocks, rows.split([block.shape[1] for block in blocks], 1), strict=True):
            torch.mul(block, scale, out=target)
        return rows

    def write_times_metric(
        self, values: Tensor, rows: Tensor, targets: Sequence[Tensor], metric: Tensor | None = None
    ) -> None:
        widths, scale = [target.shape[1] for target in targets], values.square()
        for target, block, part in zip(targets, rows.split(widths, 1), scale.split(widths), strict=True):
            torch.mul(block, part, out=target)

    def radius(self, values: Tensor) -> Tensor:
        return values.abs().amax()
