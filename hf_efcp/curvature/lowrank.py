"""A ring of gradients whose matrices are kept in `rank` dimensions (LR-M-FAC, EFCP, arXiv 2306.06098)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_efcp.curvature.layout import Layout
from hf_efcp.ops import take_row


class LowRankWindow:
    """Each matrix (first dim × rest) as `P Qᵀ` by one warm-started power step, with error feedback.

        M = residual + g,  P = orth(M Q_previous),  Q = Mᵀ P,  row = P Qᵀ,  residual ← M − P Qᵀ

    Inner products, sums and the Gram matrix come from the factors; no row is ever formed. What is no matrix, or
    would need as many numbers as factors, is stored exactly and has no residual.

    Args:
        layout: of block size 1.
        rank: columns of `P` and `Q`, cut to what a matrix has.
        per_parameter: one system for each parameter instead of one for the model.
    """

    def __init__(
        self,
        layout: Layout,
        window: int,
        *,
        rank: int,
        value_dtype: torch.dtype,
        residual_dtype: torch.dtype,
        device: torch.device,
        per_parameter: bool = False,
    ):
        self.layout = layout
        self.per_parameter = per_parameter
        self._window, self._device = window, device
        self._rings: list[_FactoredRing | _ExactRing] = []
        for shape in layout.shapes:
            if _wants_factors(shape, rank):
                ring = _FactoredRing(shape, window, rank, value_dtype, residual_dtype, device)
            else:
                ring = _ExactRing(math.prod(shape), window, value_dtype, device)
            self._rings.append(ring)

    def push(self, gradient: Tensor, row: Tensor, accept: Tensor, scratch: Tensor) -> Tensor:
        pieces = self._pieces(gradient)
        return self._systems([ring.push(x, row, accept) for ring, x in zip(self._rings, pieces, strict=True)])

    def dots(self, x: Tensor) -> Tensor:
        return self._systems([ring.dots(piece) for ring, piece in zip(self._rings, self._pieces(x), strict=True)])

    def combine(self, coefficients: Tensor, out: Tensor) -> None:
        weights = coefficients.expand(len(self._rings), -1)
        for ring, weight, piece in zip(self._rings, weights, self._pieces(out), strict=True):
            ring.combine(weight, piece)

    def views(self) -> list[dict[str, Tensor]]:
        return [ring.tensors() for ring in self._rings]

    def steps(self, name: str) -> tuple[int, int] | None:
        return None  # a parameter has one owner, and its views are never parts

    def shared_buffers(self) -> dict[str, Tensor]:
        return {}

    def residuals(self) -> list[Tensor]:
        return [ring.residual for ring in self._rings if isinstance(ring, _FactoredRing)]

    def _pieces(self, flat: Tensor) -> list[Tensor]:
        return [flat[r.start : r.stop] for r in self.layout.ranges]

    def _systems(self, parts: list[Tensor]) -> Tensor:
        if not parts:  # a rank may own no parameter
            return torch.zeros(0 if self.per_parameter else 1, self._window, dtype=torch.float64, device=self._device)
        stacked = torch.stack(parts)
        return stacked if self.per_parameter else stacked.sum(0, keepdim=True)


def _wants_factors(shape: torch.Size, rank: int) -> bool:
    if len(shape) < 2:
        return False
    rows, columns = shape[0], math.prod(shape[1:])
    return (rows + columns) * min(rank, rows, columns) < rows * columns


class _ExactRing:
    """Rows of a small or one-dimensional parameter: `values` (m, n)."""

    def __init__(self, numel: int, window: int, value_dtype: torch.dtype, device: torch.device):
        self.values = torch.zeros(window, numel, dtype=value_dtype, device=device)

    def push(self, gradient: Tensor, row: Tensor, accept: Tensor) -> Tensor:
        stored = torch.where(accept, gradient.to(self.values.dtype), take_row(self.values, 0, row))
        self.values.index_copy_(0, row[None], stored[None])
        return self.dots(stored)

    def dots(self, x: Tensor) -> Tensor:
        return self.values.double() @ x.double()

    def combine(self, weights: Tensor, out: Tensor) -> None:
        out.add_(self.values.T.to(weights.dtype) @ weights)

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}


class _FactoredRing:
    """Rows of one matrix: `left` (rows, m, rank), `right` (columns, m, rank), `residual` in the parameter's shape.

    In this order each pass is one matrix product over all m·rank columns.
    """

    def __init__(
        self,
        shape: torch.Size,
        window: int,
        rank: int,
        value_dtype: torch.dtype,
        residual_dtype: torch.dtype,
        device: torch.device,
    ):
        rows, columns = shape[0], math.prod(shape[1:])
        rank = min(rank, rows, columns)
        self.left = torch.zeros(rows, window, rank, dtype=value_dtype, device=device)
        self.right = torch.zeros(columns, window, rank, dtype=value_dtype, device=device)
        self.residual = torch.zeros(shape, dtype=residual_dtype, device=device)
        # The row before the first is zero by its left factor; its right factor starts the power iteration. The
        # seed is the shape's, so that neither order nor placement of the parameters changes a run.
        generator = torch.Generator().manual_seed(columns)
        self.right[:, -1] = torch.randn(columns, rank, generator=generator).to(device, value_dtype)

    def push(self, gradient: Tensor, row: Tensor, accept: Tensor) -> Tensor:
        rows, window, _ = self.left.shape
        matrix = self.residual.float().view(rows, -1) + gradient.view(rows, -1)
        previous = take_row(self.right, 1, (row - 1) % window).float()
        left = torch.linalg.qr(matrix @ previous).Q
        right = matrix.T @ left
        left = torch.where(accept, left.to(self.left.dtype), take_row(self.left, 1, row))
        right = torch.where(accept, right.to(self.right.dtype), take_row(self.right, 1, row))
        self.left.index_copy_(1, row[None], left[:, None])
        self.right.index_copy_(1, row[None], right[:, None])
        left, right = left.float(), right.float()
        self.residual.copy_(matrix.addmm_(left * accept, right.T, alpha=-1).view_as(self.residual))
        return self._products(left.double(), right.double())

    def _products(self, left: Tensor, right: Tensor) -> Tensor:
        """`⟨P_i Q_iᵀ, P Qᵀ⟩ = Σ (P_iᵀP) ∘ (Q_iᵀQ)` for all rows i."""
        lefts = torch.einsum("nmr,ns->mrs", self.left.double(), left)
        rights = torch.einsum("nmr,ns->mrs", self.right.double(), right)
        return (lefts * rights).sum((1, 2))

    def dots(self, x: Tensor) -> Tensor:
        rows, window, rank = self.left.shape
        projected = x.view(rows, -1) @ self.right.float().view(-1, window * rank)
        return (projected.view(rows, window, rank).double() * self.left).sum((0, 2))

    def combine(self, weights: Tensor, out: Tensor) -> None:
        rows, window, rank = self.left.shape
        scaled = (self.left.to(weights.dtype) * weights[:, None]).view(rows, window * rank)
        out.view(rows, -1).add_(scaled @ self.right.to(weights.dtype).view(-1, window * rank).T)

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right, "residual": self.residual}
