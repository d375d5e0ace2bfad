"""Blocks along the diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efcp.curvature.structures.base import Structure


class BlockDiagonal(Structure):
    """⌊d/k⌋ blocks k×k along the diagonal and a last, smaller one. Dense where d ≤ k."""

    sums_raw = True
    keeps_metric = True

    def __init__(self, dim: int, block: int):
        super().__init__(dim)
        self.block = min(block, dim)
        self.n_blocks, self.rest = divmod(dim, self.block)
        self.numel = self.n_blocks * self.block**2 + self.rest**2

    def identity(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        values = torch.zeros(self.numel, dtype=dtype, device=device)
        blocks, last = self._parts(values)
        blocks.diagonal(dim1=1, dim2=2).fill_(1)
        last.diagonal().fill_(1)
        return values

    def apply(self, values: Tensor, rows: Tensor, transpose: bool = False) -> Tensor:
        blocks, last = self._parts(values)
        if transpose:
            blocks, last = blocks.mT, last.T
        source, tail = self._split(rows)
        return torch.cat([(source @ blocks).transpose(0, 1).flatten(1), tail @ last], 1)

    def extract(self, left: Tensor, right: Tensor) -> Tensor:
        (left, left_tail), (right, right_tail) = self._split(left), self._split(right)
        return self._join(left.mT @ right, left_tail.T @ right_tail)

    def gram(self, values: Tensor) -> Tensor:
        blocks, last = self._parts(values)
        return self._join(blocks.mT @ blocks, last.T @ last)

    def product(self, values: Tensor, other: Tensor) -> Tensor:
        (blocks, last), (other_blocks, other_last) = self._parts(values), self._parts(other)
        return self._join(blocks @ other_blocks, last @ other_last)

    def moment(self, values: Tensor, rows: Tensor) -> Tensor:
        return self.extract(rows, rows)

    def finish(self, values: Tensor, moment: Tensor) -> Tensor:
        (blocks, last), (sums, last_sum) = self._parts(values), self._parts(moment)
        return self._join(blocks.mT @ sums @ blocks, last.T @ last_sum @ last)

    def metric(self, values: Tensor) -> Tensor:
        blocks, last = self._parts(values)
        return self._join(blocks @ blocks.mT, last @ last.T)

    def times_metric(self, values: Tensor, rows: Tensor, metric: Tensor | None = None) -> Tensor:
        blocks, last = self._parts(self.metric(values) if metric is None else metric)
        product = torch.empty_like(rows, memory_format=torch.contiguous_format)
        (source, tail), (target, end) = self._split(rows), self._split(product)
        torch.bmm(source, blocks, out=target)
        torch.mm(tail, last, out=end)
        return product

    def metric_times(self, values: Tensor, columns: Tensor, metric: Tensor | None = None) -> Tensor:
        blocks, last = self._parts(self.metric(values) if metric is None else metric)
        product = torch.empty_like(columns, memory_format=torch.contiguous_format)
        (source, tail), (target, end) = (
            (x[: len(x) - self.rest].unflatten(0, (self.n_blocks, self.block)), x[len(x) - self.rest :])
            for x in (columns, product)
        )
        torch.bmm(blocks, source, out=target)
        torch.mm(last, tail, out=end)
        return product

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows cut as the blocks are: (n_blocks, n, k) and (n, rest)."""
        inside = self.n_blocks * self.block
        return rows[:, :inside].unflatten(1, (self.n_blocks, self.block)).transpose(0, 1), rows[:, inside:]

    def _parts(self, values: Tensor) -> tuple[Tensor, Tensor]:
        inside = self.n_blocks * self.block**2
        return values[:inside].view(-1, self.block, self.block), values[inside:].view(self.rest, self.rest)

    def _join(self, blocks: Tensor, last: Tensor) -> Tensor:
        return torch.cat([blocks.flatten(), last.flatten()])
