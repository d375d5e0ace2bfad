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

    A small d shortens the last rows first, then the diagonal is gone: d ≤ a is dense.
    """

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

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split([self.top, self.middle, self.bottom], 1)

    def _parts(self, values: Tensor) -> Parts:
        pieces = values.split(self._sizes)
        return Parts(*(piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)))
