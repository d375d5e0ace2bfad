"""Slow float64 references, written from the papers and not from the package.

M-FAC is arXiv 2107.03356, EFCP 2306.06098, GGT 1806.02958. Vectors are flat float64; `rows` is `G`, (m, d), with
zero rows for the part of the window that is still empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Compress = Callable[[list[Tensor]], list[Tensor]]


def dense_inverse(rows: Tensor, x: Tensor, damping: float) -> Tensor:
    """`(λI + GᵀG/m)⁻¹ x` with the d×d matrix written out (M-FAC, section 3)."""
    fisher = damping * torch.eye(len(x), dtype=torch.float64) + rows.T @ rows / len(rows)
    return torch.linalg.solve(fisher, x)


def sequential_inverse(rows: Tensor, x: Tensor, damping: float) -> Tensor:
    """The same by M-FAC's recursion: one Sherman–Morrison step for each row.

    `F₀ = λI`, `Fᵢ⁻¹x = Fᵢ₋₁⁻¹x − vᵢ (gᵢ·Fᵢ₋₁⁻¹x)/(m + gᵢ·vᵢ)` with `vᵢ = Fᵢ₋₁⁻¹gᵢ`.
    """
    m = len(rows)
    solved = torch.cat([rows, x[None]]) / damping  # Fᵢ⁻¹ of all rows and of x
    for i, row in enumerate(rows):
        v = solved[i].clone()
        solved = solved - torch.outer(solved @ row, v) / (m + row @ v)
    return solved[-1]


def matrix_square_root(matrix: Tensor) -> Tensor:
    """Of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def ggt(rows: Tensor, x: Tensor, eps: float) -> Tensor:
    """`((GᵀG)^½ + εI)⁻¹ x` with the d×d matrix written out (GGT, section 2)."""
    root = matrix_square_root(rows.T @ rows)
    return torch.linalg.solve(root + eps * torch.eye(len(x), dtype=torch.float64), x)


def keep_largest(x: Tensor, k: int) -> Tensor:
    """`x` with all but its `k` largest magnitudes set to zero."""
    kept = torch.zeros_like(x)
    chosen = x.abs().argsort(descending=True)[:k]
    kept[chosen] = x[chosen]
    return kept


def block_topk(density: float, block_size: int) -> Compress:
    """`ceil(density·block_size)` entries of every block; each parameter is padded to whole blocks with zeros."""

    def compress(parts: list[Tensor]) -> list[Tensor]:
        k = math.ceil(density * block_size)
        return [torch.cat([keep_largest(block, k) for block in part.split(block_size)]) for part in parts]

    return compress


def global_topk(density: float) -> Compress:
    """`int(density·d)` entries of the concatenation."""

    def compress(parts: list[Tensor]) -> list[Tensor]:
        whole = torch.cat(parts)
        return list(keep_largest(whole, int(density * len(whole))).split([len(part) for part in parts]))

    return compress


def power_iteration(shapes: Sequence[torch.Size], starts: Sequence[Tensor | None]) -> Compress:
    """One step of subspace iteration on every matrix `M` (first dim × rest), warm-started by the last (EFCP, LR-M-FAC).

    `P` is a basis of the range of `M Q`, `Q ← MᵀP`, and what is kept `P Qᵀ`, the projection of `M` on that range.

    Args:
        shapes: of the parameters.
        starts: the first `Q`, (columns, rank), of each; `None` for one that is kept whole.
    """
    factors = [None if start is None else start.double() for start in starts]

    def compress(parts: list[Tensor]) -> list[Tensor]:
        kept = []
        for i, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
            if factors[i] is None:
                kept.append(part)
                continue
            matrix = part.view(shape[0], -1)
            basis = torch.linalg.svd(matrix @ factors[i], full_matrices=False).U
            factors[i] = matrix.T @ basis
            kept.append((basis @ factors[i].T).flatten())
        return kept

    return compress


def keep_all(parts: list[Tensor]) -> list[Tensor]:
    """No compression."""
    return parts


class Ring:
    """Window of compressed gradients with error feedback (EFCP, algorithm 1).

    `c = compress(residual + g)`, `residual ← residual + g − c`, row `t mod m` of `G` becomes `c`.

    Args:
        numels: entries of each parameter.
        window: rows m.
        compress: takes and returns one flat vector for each parameter.
    """

    def __init__(self, numels: Sequence[int], window: int, compress: Compress):
        self.numels = list(numels)
        self.compress = compress
        self.rows = torch.zeros(window, sum(numels), dtype=torch.float64)
        self.residual = torch.zeros(sum(numels), dtype=torch.float64)
        self.step = 0

    def push(self, gradients: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the newest row and the dense gradient, both flat."""
        gradient = torch.cat([g.double().flatten() for g in gradients])
        summed = self.residual + gradient
        row = torch.cat(self.compress(list(summed.split(self.numels))))
        self.residual = summed - row
        self.rows[self.step % len(self.rows)] = row
        self.step += 1
        return row, gradient


def mfac(
    steps: Iterable[Sequence[Tensor]],
    *,
    window: int,
    damping: float,
    compress: Compress,
    relative: bool = False,
    precondition: str = "compressed",
    inverse: Callable[[Tensor, Tensor, float], Tensor] = dense_inverse,
) -> list[Tensor]:
    """The preconditioned gradient of every step, flat.

    Relative damping is `λ = damping · trace(GGᵀ/m)/m`, the mean eigenvalue of the m×m matrix `GGᵀ/m`.
    """
    ring, updates = None, []
    for gradients in steps:
        ring = ring or Ring([g.numel() for g in gradients], window, compress)
        row, gradient = ring.push(gradients)
        mean = torch.linalg.eigvalsh(ring.rows @ ring.rows.T / window).mean().item() if relative else 1.0
        updates.append(inverse(ring.rows, row if precondition == "compressed" else gradient, damping * mean))
    return updates


def heavy_ball(updates: Iterable[Tensor], momentum: float) -> list[Tensor]:
    """`v ← momentum·v + u`."""
    velocity, velocities = 0.0, []
    for update in updates:
        velocity = momentum * velocity + update
        velocities.append(velocity)
    return velocities


def descend(start: Tensor, updates: Iterable[Tensor], lr: float, weight_decay: float) -> Tensor:
    """Decoupled decay: `p ← p(1 − lr·weight_decay) − lr·u` (AdamW, arXiv 1711.05101)."""
    weight = start.double()
    for update in updates:
        weight = weight * (1 - lr * weight_decay) - lr * update
    return weight


def root_mean_square(x: Tensor) -> Tensor:
    """√(mean of squares)."""
    return x.double().square().mean().sqrt()
