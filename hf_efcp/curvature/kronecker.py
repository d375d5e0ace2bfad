"""Structured natural gradient descent: the update of two Kronecker factors, without an inverse (arXiv 2312.05705)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from hf_efcp.curvature.structures import DenseMetric, Structure


class Moment(NamedTuple):
    """U or V: what a structure has summed, and by what that is to be multiplied."""

    sums: Tensor
    scale: Tensor | float = 1.0


class Factor(NamedTuple):
    """One side of `(KKᵀ) ⊗ (CCᵀ)`, the inverse of the curvature: K over inputs or C over outputs."""

    structure: Structure
    values: Tensor  # stored entries of K
    momentum: Tensor | None  # of its direction m; `None` without momentum
    metric: Tensor | None = None  # KKᵀ, where it is kept

    def mean_curvature(self, moment: Moment) -> Tensor:
        """() `τ(KᵀUK)`."""
        return self.structure.mean_curvature(self.values, moment.sums, self.metric) * moment.scale


def at_starting_scale(
    inputs: Factor, outputs: Factor, u: Moment, v: Moment, options: Mapping[str, Any]
) -> tuple[Factor, Factor]:
    """Both factors, of which each is I, times the number that makes their mean curvature the fixed point's.

    IKFAC: `κ²(τ(U) + λ) = 1` for each side; INGD, which fixes their product alone: `κ⁴(τ(U)τ(V) + λ) = 1`.
    Starting from I instead, the factors grow by `1 + lr_cov` an update for hundreds of steps, and the step with them.
    """
    traces = [side.mean_curvature(moment) for side, moment in ((inputs, u), (outputs, v))]
    scales = [(trace + options["damping"]).rsqrt() for trace in traces]
    if not options["kfac_like"]:
        scales = [(traces[0] * traces[1] + options["damping"]).pow(-0.25)] * 2
    return _scaled(inputs, scales[0]), _scaled(outputs, scales[1])


def _scaled(side: Factor, scale: Tensor) -> Factor:
    return side._replace(values=side.structure.scaled(side.values, scale))


def update_factors(
    inputs: Factor, outputs: Factor, u: Moment, v: Moment, options: Mapping[str, Any], lr_cov: float
) -> tuple[Factor, Factor]:
    """One Riemannian step of both factors, each from both old ones; their `metric` stays the old one.

    With `τ(M) = tr(M)/d`, `kk = Π(KᵀK)`, `cc = Π(CᵀC)`, `H_K = Π(KᵀUK)`, `H_C = Π(CᵀVC)`:

        INGD   N_K = ½(τ(H_C) H_K + λτ(cc) kk − I)      IKFAC  N_K = ½(H_K + λ kk − I)      and N_C likewise
        m ← α₁ m + N,   K ← K − β K m,   β = lr_cov (/ max(1, max|m|) with normalize_lr_cov, which also has N·(1 − α₁))

    `limit_lr_cov` divides by max(1, ρ(m)) instead: no direction of K shrinks by more than lr_cov or turns round. The
    largest entry says little of that: where a mean is spread over d inputs, ρ(m) is d times as large.

    Args:
        u, v: U and V.
        options: `damping`, `alpha1`, `kfac_like`, `normalize_lr_cov`, `limit_lr_cov`.
        lr_cov: β of this step.
    """
    sides, moments = (inputs, outputs), (u, v)
    weights = dampings = [1.0, 1.0]
    if not options["kfac_like"]:  # each by the other's
        weights = [side.mean_curvature(moment) for side, moment in zip(sides, moments, strict=True)][::-1]
        dampings = [side.structure.mean_square(side.values) for side in sides][::-1]
    updated = []
    for side, moment, weight, damping in zip(sides, moments, weights, dampings, strict=True):
        structure, damping = side.structure, options["damping"] * damping
        damped = side.values, moment.sums, weight * moment.scale, damping
        if isinstance(structure, DenseMetric):
            values = structure.moved(*damped, lr_cov=lr_cov, limits=options["limit_lr_cov"])
            updated.append(side._replace(values=values))
        else:
            updated.append(_moved(side, structure.damped(*damped), options, lr_cov))
    return updated[0], updated[1]


def _moved(side: Factor, curvature: Tensor, options: Mapping[str, Any], lr_cov: float) -> Factor:
    """A factor after a step along ½(`curvature` − I)."""
    structure, alpha1 = side.structure, 0.0 if options["kfac_like"] else options["alpha1"]
    half = 0.5 * (1 - alpha1 if options["normalize_lr_cov"] else 1)
    direction = half * (curvature - structure.identity(curvature.dtype, curvature.device))
    if side.momentum is not None:
        direction = direction + alpha1 * side.momentum
    beta: Tensor | float = lr_cov
    if options["normalize_lr_cov"]:
        beta = lr_cov / direction.abs().amax().clamp_min(1)
    if options["limit_lr_cov"]:
        beta = lr_cov / structure.radius(direction).clamp_min(1)
    values = side.values - beta * structure.product(side.values, direction)
    return side._replace(values=values, momentum=None if side.momentum is None else direction)


def bound_growth(inputs: Factor, outputs: Factor, limit: float) -> tuple[Factor, Factor]:
    """Both factors scaled down alike, to `τ(KKᵀ)·τ(CCᵀ) ≤ limit`: how much longer a mean step is than SGD's."""
    traces = [side.structure.mean_square(side.values) for side in (inputs, outputs)]
    scale = (limit / (traces[0] * traces[1])).clamp_max(1).pow(0.25)
    return _scaled(inputs, scale), _scaled(outputs, scale)


def precondition(gradient: Sequence[Tensor], inputs: Factor, outputs: Factor, targets: Sequence[Tensor]) -> None:
    """Write `CCᵀ G KKᵀ`; with KKᵀ and CCᵀ themselves where they are kept.

    Args:
        gradient, targets: column blocks of (d_o, d_i) matrices, those of the weight and of the bias.
    """
    rows = outputs.structure.metric_times_blocks(outputs.values, gradient, outputs.metric)
    inputs.structure.write_times_metric(inputs.values, rows, targets, inputs.metric)
