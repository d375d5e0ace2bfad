"""Inverse roots of sketched matrices, and a gradient multiplied by those of its axes.

With `t = ρ + ε`, `c = t^{-1/p}` and `e = (s² + ρ + ε)^{-1/p}`:

    (C + ρI + εI)^{-1/p} Y = c·Y + U diag(e − c) UᵀY

Sketchy, arXiv 2302.03764, section 4. Leading dimensions are batch dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_efcp.curvature.sketch import Sketch

_GROWTH = 100.0  # of a squared gradient over a full sketch, up to which the sketch alone counts


class Root(NamedTuple):
    """An inverse root: `outside`, (…,), times what is outside `basis` (…, d, k), `inside` (…, k) within."""

    basis: Tensor
    inside: Tensor
    outside: Tensor


def inverse_root(
    sketch: Sketch,
    projection: Tensor,
    total: Tensor,
    *,
    order: int,
    epsilon: float,
    relative: bool,
    trace: Tensor | None = None,
) -> Root:
    """`(C + ρI + εI)^{-1/p}`, for a sketch that is not full no eigenvalue below what the gradient `G` at hand shows.

    With an exact update in the same step `C + ρI ⪰ GGᵀ`, and nothing changes. An old sketch that is not yet full has
    not seen some directions: there `ρ = 0` would multiply them by `ε^{-1/p}`, thousands. Until `ρ > 0` or all d
    directions are there, kept directions count as at least `‖uᵢᵀG‖²`, the others as their mean square in `G` and as
    the mean kept one. So they do where `‖G‖²` is a hundred times all that the sketch holds.

    Args:
        sketch: of one axis.
        projection: `UᵀG`, (…, k, b).
        total: `‖G‖²`, (…,) float64.
        order: p, twice the number of preconditioned axes.
        epsilon: ε, in units of the largest eigenvalue where `relative`.
        trace: `tr M`, (…,) float64; the tail is then the mean eigenvalue that the sketch does not hold, instead of
            the bound ρ. Nearer to full Shampoo on decaying spectra, further from it on flat ones.
    """
    basis, s, rho = sketch
    d, k = basis.shape[-2:]
    squares = s.square()
    rank = (s > 0).sum(-1)
    is_old = ((rho == 0) & (rank < d)) | (total > _GROWTH * (squares.sum(-1) + d * rho))
    shown = torch.linalg.vector_norm(projection, dim=-1).double().square()
    values = (squares + rho[..., None]).maximum(torch.where(is_old[..., None], shown, 0))
    tail = rho
    if trace is not None and d > k:
        tail = (trace - squares.sum(-1) - k * rho).clamp_min(0) / (d - k)
    unseen = (total - shown.sum(-1)).clamp_min(0) / (d - rank).clamp_min(1)
    mean = squares.sum(-1) / rank.clamp_min(1)
    tail = torch.where(rho > 0, tail, mean).maximum(torch.where(is_old, unseen, 0))
    damping = epsilon * values.amax(-1).maximum(tail) if relative else torch.full_like(tail, epsilon)
    power = -1 / order
    shifted = tail + damping
    outside = torch.where(shifted > 0, shifted, 1) ** power
    inside = torch.where(values > 0, values + damping[..., None], 1) ** power
    return Root(basis, inside, outside)


def precondition(gradient: Tensor, roots: Sequence[tuple[int, Root]], projections: Sequence[Tensor]) -> Tensor:
    """The gradient multiplied along each given axis by its inverse root.

    Args:
        gradient: (n, d₁, …, d_q), a batch of equal shapes.
        roots: axis (counted without the batch) and root of each preconditioned axis.
        projections: `UᵀG` of each, (n, k, numel/d).

    Returns:
        a new tensor, or the gradient itself where no axis is preconditioned.
    """
    if gradient.ndim == 3 and len(roots) == 2:
        return _both_sides(gradient, roots[0][1], roots[1][1], *projections)
    if gradient.ndim == 3 and len(roots) == 1:
        return _one_side(gradient, *roots[0], projections[0])
    result = gradient
    for i, (axis, root) in enumerate(roots):
        matrix = unfold(result, axis)
        inner = projections[0] if i == 0 else root.basis.mT @ matrix
        weights = _of(root.inside - root.outside[..., None], gradient)[..., None]
        matrix = torch.baddbmm(matrix * _of(root.outside, gradient)[..., None, None], root.basis, weights * inner)
        result = fold(matrix, axis, gradient.shape)
    return result


def _one_side(gradient: Tensor, axis: int, root: Root, projection: Tensor) -> Tensor:
    """`L G` or `G R`, in the gradient's own order of entries: a transposed update is slow to add to the weights."""
    weighted = _of(root.inside - root.outside[..., None], gradient)[..., None] * projection
    product = root.basis @ weighted if axis == 0 else weighted.mT @ root.basis.mT
    return product.addcmul_(gradient, _of(root.outside, gradient)[..., None, None])


def _both_sides(gradient: Tensor, left: Root, right: Root, left_projection: Tensor, right_projection: Tensor) -> Tensor:
    """`L G R` in two products with k inner columns beside the two projections.

    With `A = UᵀG`, `Q = GV`, `S = UᵀQ`, `a = e_L/c_L − 1`, `b = e_R/c_R − 1`:
    `L G R = c_L c_R [G + U(aA) + (Q + U(aS)) b Vᵀ]`.
    """
    u, v, q = left.basis, right.basis, right_projection.mT
    a = _of(left.inside / left.outside[..., None] - 1, gradient)[..., None]
    b = _of(right.inside / right.outside[..., None] - 1, gradient)[..., None, :]
    scale = _of(left.outside * right.outside, gradient)[..., None, None]
    outer = torch.baddbmm(q, u, a * (u.mT @ q)) * (scale * b)
    return (gradient * scale).baddbmm_(scale * u, a * left_projection).baddbmm_(outer, v.mT)


def _of(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype)


def unfold(tensor: Tensor, axis: int) -> Tensor:
    """(n, d₁, …) as (n, d_axis, rest); a view where it can be."""
    moved = tensor.movedim(axis + 1, 1)
    return moved.reshape(*moved.shape[:2], -1)


def fold(matrix: Tensor, axis: int, shape: torch.Size) -> Tensor:
    """The inverse of `unfold`."""
    moved = torch.Size([shape[0], shape[axis + 1], *shape[1 : axis + 1], *shape[axis + 2 :]])
    return matrix.reshape(moved).movedim(1, axis + 1)
