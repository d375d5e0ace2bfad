"""Structured natural gradient descent: the update of two Kronecker factors, without an inverse (arXiv 2312.05705)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_efcp.curvature.structures import Structure


class Factor(NamedTuple):
    """One side of `(KKᵀ) ⊗ (CCᵀ)`, the inverse of the curvature: K over inputs or C over outputs."""

    structure: Structure
    values: Tensor  # stored entries of K
    momentum: Tensor | None  # of its direction m; `None` without momentum


def starting_scale(inputs: Structure, u: Tensor, outputs: Structure, v: Tensor, options: Mapping[str, Any]) -> Tensor:
    """(2,) the multiples of I, for K and C, whose mean curvature is already the fixed point's.

    IKFAC: `κ²(τ(U) + λ) = 1` for each side; INGD, which fixes their product alone: `κ⁴(τ(U)τ(V) + λ) = 1`.
    Starting from I instead, the factors grow by `1 + lr_cov` an update for hundreds of steps, and the step with them.

    Args:
        u, v: U and V as the factor I leaves them.
    """
    traces = torch.stack([inputs.mean_trace(u), outputs.mean_trace(v)])
    if options["kfac_like"]:
        return (traces + options["damping"]).rsqrt()
    return (traces.prod() + options["damping"]).pow(-0.25).expand(2)


def update_factors(
    inputs: Factor, outputs: Factor, h_k: Tensor, h_c: Tensor, options: Mapping[str, Any], lr_cov: float
) -> tuple[Factor, Factor]:
    """One Riemannian step of both factors, each from both old ones. Nothing is written in place.

    With `τ(M) = tr(M)/d`, `kk = Π(KᵀK)`, `cc = Π(CᵀC)`, `H_K = Π(KᵀUK)`, `H_C = Π(CᵀVC)`:

        INGD   N_K = ½(τ(H_C) H_K + λτ(cc) kk − I)      IKFAC  N_K = ½(H_K + λ kk − I)      and N_C likewise
        m ← α₁ m + N,   K ← K − β K m,   β = lr_cov (/ max(1, max|m|) with normalize_lr_cov, which also has N·(1 − α₁))

    Args:
        h_k, h_c: H_K and H_C in stored entries.
        options: `damping`, `alpha1`, `kfac_like`, `normalize_lr_cov`.
        lr_cov: β of this step.
    """
    damping, is_kfac = options["damping"], options["kfac_like"]
    alpha1 = 0.0 if is_kfac else options["alpha1"]
    half = 0.5 * (1 - alpha1 if options["normalize_lr_cov"] else 1)
    sides = (inputs, outputs)
    moments = (h_k, h_c)
    grams = [side.structure.gram(side.values) for side in sides]
    updated = []
    for number, side in enumerate(sides):
        structure, other = side.structure, sides[1 - number].structure
        moment, damped = moments[number], damping * grams[number]
        if not is_kfac:
            moment = moment * other.mean_trace(moments[1 - number])
            damped = damped * other.mean_trace(grams[1 - number])
        direction = half * (moment + damped - structure.identity(moment.dtype, moment.device))
        if side.momentum is not None:
            direction = direction + alpha1 * side.momentum
        beta: Tensor | float = lr_cov
        if options["normalize_lr_cov"]:
            beta = lr_cov / direction.abs().amax().clamp_min(1)
        values = side.values - beta * structure.product(side.values, direction)
        updated.append(Factor(structure, values, None if side.momentum is None else direction))
    return updated[0], updated[1]


def bound_growth(inputs: Factor, outputs: Factor, limit: float) -> tuple[Factor, Factor]:
    """Both factors scaled down alike, to `τ(KKᵀ)·τ(CCᵀ) ≤ limit`: how much longer a mean step is than SGD's."""
    traces = [side.structure.mean_trace(side.structure.gram(side.values)) for side in (inputs, outputs)]
    scale = (limit / (traces[0] * traces[1])).clamp_max(1).pow(0.25)
    return inputs._replace(values=inputs.values * scale), outputs._replace(values=outputs.values * scale)


def precondition(
    gradient: Tensor, inputs: Factor, outputs: Factor, metrics: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    """`CCᵀ G KKᵀ` of a (d_o, d_i) gradient; with `metrics` KKᵀ and CCᵀ themselves where they are kept."""
    result = _times_metric(gradient, inputs, metrics[0])
    return _times_metric(result.T, outputs, metrics[1]).T


def _times_metric(rows: Tensor, side: Factor, metric: Tensor | None) -> Tensor:
    if metric is not None:
        return rows @ metric.view(side.structure.dim, side.structure.dim)
    structure = side.structure
    return structure.apply(side.values, structure.apply(side.values, rows), transpose=True)
