"""Few dense rows above, few below, a diagonal between."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_efcp.curvature.structures.base import Structure


class Parts(NamedTuple):
    """Views of the stored entries of `[[A, B], [0, [[C, 0], [D, E]]]]`."""

    top: Tensor  # A (a, a)
    right: Tensor  # B (a, d − a)
    middle: Tensor  # C (d − a − b,), a diagonal
    bottom: Tensor  # D (b, d − a − b)
    corner: Tensor  # E (b, b)


class Hierarchical(Structure):
    """The first a rows dense, the last b dense but for the first a columns, a diagonal between: O((a + b)·d) entries.

    A small d shortens the last rows first, then the diagonal is gone: d ≤ a is dense. With M_e the first and the last
    rows, `Π(MᵀUM)` and products with MMᵀ need no more of the symmetric U and MMᵀ than an arrow: those rows, (e, d), and
    the diagonal between. So a moment and a metric are stored.
    """

    sums_raw = True
    keeps_metric = True

    def __init__(self, dim: int, top: int, bottom: int):
        super().__init__(dim)
        self.top = min(top, dim)
        self.bottom = min(bottom, dim - self.top)
        self.middle = dim - self.top - self.bottom
        self._shapes = [
            (self.top, self.top),
            (self.top, dim - self.top),
            (self.middle,),
            (self.bottom, self.middle),
            (self.bottom, self.bottom),
        ]
        self._sizes = [torch.Size(shape).numel() for shape in self._shapes]
        self.numel = sum(self._sizes)

    def identity(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        values = torch.zeros(self.numel, dtype=dtype, device=device)
        parts = self._parts(values)
        parts.middle.fill_(1)
        for square in (parts.top, parts.corner):
            square.diagonal().fill_(1)
        return values

    def weight(self, like: Tensor) -> Tensor:
        values = torch.ones(self.numel, dtype=like.dtype, device=like.device)
        parts = self._parts(values)
        for one_sided in (parts.right, parts.bottom):
            one_sided.fill_(2)
        return values

    def apply(self, values: Tensor, rows: Tensor, transpose: bool = False) -> Tensor:
        m = self._parts(values)
        first, between, last = self._split(rows)
        if transpose:
            return torch.cat(
                [
                    first @ m.top.T + rows[:, self.top :] @ m.right.T,
                    between * m.middle,
                    between @ m.bottom.T + last @ m.corner.T,
                ],
                1,
            )
        below = torch.cat([between * m.middle + last @ m.bottom, last @ m.corner], 1)
        return torch.cat([first @ m.top, first @ m.right + below], 1)

    def extract(self, left: Tensor, right: Tensor) -> Tensor:
        first, between, last = self._split(left)
        right_first, right_between, right_last = self._split(right)
        parts = Parts(
            first.T @ right_first,
            first.T @ right[:, self.top :],
            (between * right_between).sum(0),
            last.T @ right_between,
            last.T @ right_last,
        )
        return torch.cat([part.flatten() for part in parts])

    def moment(self, values: Tensor, rows: Tensor) -> Tensor:
        between = self._split(rows)[1]
        return torch.cat([(self._ends(rows).T @ rows).flatten(), torch.linalg.vecdot(between, between, dim=0)])

    def moment_trace(self, moment: Tensor) -> Tensor:
        ends, between = self._arrow(moment)
        return (self._ends(ends).trace() + between.sum()) / self.dim

    def shifted(self, moment: Tensor, weight: Tensor | float, damping: Tensor | float) -> Tensor:
        shifted = moment * weight
        ends, between = self._arrow(shifted)
        ends[: self.top, : self.top].diagonal().add_(damping)
        ends[self.top :, self.dim - self.bottom :].diagonal().add_(damping)
        between.add_(damping)
        return shifted

    def finish(self, values: Tensor, moment: Tensor) -> Tensor:
        m = self._parts(values)
        u_ends, u_between = self._arrow(moment)
        last = m.right[:, self.middle :].T @ u_ends[: self.top] + m.corner.T @ u_ends[self.top :]
        first = self.apply(values, m.top.T @ u_ends[: self.top])  # rows of MᵀUM
        last = self.apply(values, last)
        column = torch.cat([m.right[:, : self.middle], m.bottom])  # of M_e
        inner = self._ends(u_ends) @ column + 2 * m.middle * self._split(u_ends)[1]
        between = (column * inner).sum(0) + m.middle.square() * u_between
        parts = (first[:, : self.top], 2 * first[:, self.top :], between)
        parts += (2 * self._split(last)[1], self._split(last)[2])
        return torch.cat([part.flatten() for part in parts])

    def product(self, values: Tensor, other: Tensor) -> Tensor:
        first, last = self.apply(other, self._end_rows(values)).split([self.top, self.bottom])
        middle = self._parts(values).middle * self._parts(other).middle
        parts = (first[:, : self.top], first[:, self.top :], middle, *self._split(last)[1:])
        return torch.cat([part.flatten() for part in parts])

    def metric(self, values: Tensor) -> Tensor:
        rows = self.apply(values, self._end_rows(values), transpose=True)
        return torch.cat([rows.flatten(), self._parts(values).middle.square()])

    def times_metric(self, values: Tensor, rows: Tensor, metric: Tensor | None = None) -> Tensor:
        ends, between = self._arrow(self.metric(values) if metric is None else metric)
        product = self._ends(rows) @ ends
        first, inside, last = self._split(product)
        row = self._split(rows)[1]
        others = row @ self._split(ends)[1].T
        inside.addcmul_(row, between)
        first += others[:, : self.top]
        last += others[:, self.top :]
        return product

    def metric_times(self, values: Tensor, columns: Tensor, metric: Tensor | None = None) -> Tensor:
        ends, between = self._arrow(self.metric(values) if metric is None else metric)
        first, inside, last = columns.split([self.top, self.middle, self.bottom])
        product = ends.T @ torch.cat([first, last])
        others = self._split(ends)[1] @ inside
        product[: self.top] += others[: self.top]
        product[self.top : self.dim - self.bottom].addcmul_(inside, between.unsqueeze(1))
        product[self.dim - self.bottom :] += others[self.top :]
        return product

    def _end_rows(self, values: Tensor) -> Tensor:
        """M_e."""
        m = self._parts(values)
        zero = m.bottom.new_zeros(self.bottom, self.top)
        return torch.cat([torch.cat([m.top, m.right], 1), torch.cat([zero, m.bottom, m.corner], 1)])

    def _arrow(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """First and last rows of a symmetric matrix, (e, d), and its diagonal between, of a moment or metric."""
        n_ends = self.top + self.bottom
        return stored[: n_ends * self.dim].view(n_ends, self.dim), stored[n_ends * self.dim :]

    def _ends(self, rows: Tensor) -> Tensor:
        """The first and the last columns of rows."""
        first, _, last = self._split(rows)
        return torch.cat([first, last], 1)

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split([self.top, self.middle, self.bottom], 1)

    def _parts(self, values: Tensor) -> Parts:
        pieces = values.split(self._sizes)
        return Parts(*(piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)))
