"""Full and diagonal matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efcp.curvature.structures.base import Structure


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
        return (matrix.T @ matrix).flatten()

    def product(self, values: Tensor, other: Tensor) -> Tensor:
        return (self._square(values) @ self._square(other)).flatten()

    def moment(self, values: Tensor, rows: Tensor) -> Tensor:
        return self.extract(rows, rows)

    def finish(self, values: Tensor, moment: Tensor) -> Tensor:
        matrix = self._square(values)
        return (matrix.T @ self._square(moment) @ matrix).flatten()

    def mean_trace(self, values: Tensor) -> Tensor:
        return self._square(values).diagonal().mean()

    def _square(self, values: Tensor) -> Tensor:
        return values.view(self.dim, self.dim)


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
