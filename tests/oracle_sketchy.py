"""Slow float64 references for Sketchy, written from arXiv 2302.03764 with every d×d matrix spelled out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unfolded(gradient: Tensor, axis: int) -> Tensor:
    """(d_axis, rest) float64."""
    return gradient.double().movedim(axis, 0).flatten(1) if gradient.ndim > 1 else gradient.double()[:, None]


def frequent_directions(gradients: Sequence[Tensor], k: int, beta2: float) -> tuple[Tensor, Tensor, Tensor]:
    """`C`, ρ and `M` after (d, b) gradients: section 4, with singular values of the whole matrix (Obs. 6 for ρ)."""
    d = len(gradients[0])
    sketch, exact = torch.zeros(2, d, d, dtype=torch.float64)
    rho = torch.zeros((), dtype=torch.float64)
    for gradient in gradients:
        product = gradient.double() @ gradient.double().T
        exact = beta2 * exact + product
        values, vectors = torch.linalg.eigh(beta2 * sketch + product)
        cut = values.flip(0)[k].clamp_min(0) if k < d else torch.zeros_like(rho)
        sketch = (vectors * (values - cut).clamp_min(0)) @ vectors.T
        rho = beta2 * rho + cut
    return sketch, rho, exact


def inverse_root(matrix: Tensor, p: int, epsilon: float) -> Tensor:
    """`(matrix + ε λ_max I)^{-1/p}`."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * (values.clamp_min(0) + epsilon * values[-1]) ** (-1 / p)) @ vectors.T


def multiplied(gradient: Tensor, roots: Sequence[Tensor]) -> Tensor:
    """The gradient multiplied along axis i by matrix i."""
    result = gradient.double()
    for axis, root in enumerate(roots):
        result = torch.tensordot(root, result, dims=([1], [axis])).movedim(0, axis)
    return result


def s_shampoo(
    gradients: Sequence[Tensor], k: int, beta2: float, epsilon: float = 1e-7, update_freq: int = 1
) -> list[Tensor]:
    """Algorithm 3: the preconditioned gradient of every step; rank k ≥ d gives Shampoo. β₂ counts steps."""
    outputs = []
    for t, gradient in enumerate(gradients):
        roots = []
        for axis, d in enumerate(gradient.shape or (1,)):  # a scalar is a vector of one
            seen = [unfolded(g.view(g.shape or (1,)), axis) for g in gradients[: t + 1 : update_freq]]
            sketch, rho, exact = frequent_directions(seen, k, beta2**update_freq)
            matrix = exact if k >= d else sketch + rho * torch.eye(d, dtype=torch.float64)
            roots.append(inverse_root(matrix, 2 * max(gradient.ndim, 1), epsilon))
        outputs.append(multiplied(gradient.view(gradient.shape or (1,)), roots).view(gradient.shape))
    return outputs


def s_adagrad(gradients: Sequence[Tensor], k: int, delta: float) -> list[Tensor]:
    """Algorithm 2: `G̃^{-1/2} g` of every step, `G̃ = C + (ρ + δ)I`."""
    outputs = []
    for t in range(len(gradients)):
        seen = [g[:, None] for g in gradients[: t + 1]]
        sketch, rho, _ = frequent_directions(seen, k, 1.0)
        matrix = sketch + (rho + delta) * torch.eye(len(sketch), dtype=torch.float64)
        outputs.append(inverse_root(matrix, 2, 0.0) @ gradients[t].double())
    return outputs
