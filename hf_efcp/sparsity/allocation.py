"""A total shared out exactly: in proportion to weights, in whole numbers, within capacities."""

from __future__ import annotations

import math
from collections.abc import Sequence


def allocate(total: int, weights: Sequence[float], capacities: Sequence[int], minimum: int = 0) -> list[int]:
    """Whole numbers `x` with `Σx = total`, `minimum ≤ xₗ ≤ capacityₗ`, as near to `ε·weightₗ` as that allows.

    Where `ε·weightₗ` exceeds the capacity the share is the capacity, and `ε` is solved anew for the others, as
    Erdős–Rényi densities are (RigL, arXiv 1911.11134, appendix A). What rounding leaves goes to the largest
    fractions, the first of equals.

    Args:
        total: what is shared out.
        weights: non-negative, one for each share; all zero counts as all equal.
        capacities: largest shares.
        minimum: smallest share, where the capacity allows it.

    Raises:
        ValueError: the total does not fit between the minima and the capacities.
    """
    lows = [min(minimum, capacity) for capacity in capacities]
    if not sum(lows) <= total <= sum(capacities):
        raise ValueError(f"{total} cannot be shared out: between {sum(lows)} and {sum(capacities)} are possible.")
    ideal = _bounded(total, list(weights), list(map(float, capacities)))
    shares = [min(capacity, max(low, math.floor(x))) for x, low, capacity in zip(ideal, lows, capacities, strict=True)]
    _settle(shares, ideal, total, lows, capacities)
    return shares


def _bounded(total: float, weights: list[float], capacities: list[float]) -> list[float]:
    """`min(ε·weight, capacity)` with the `ε` that makes the sum `total`."""
    ideal, free = [0.0] * len(weights), set(range(len(weights)))
    while free:
        rest = max(0.0, total - sum(ideal[i] for i in range(len(ideal)) if i not in free))
        mass = sum(weights[i] for i in free)
        if mass <= 0:  # nothing tells them apart: by size
            weights, mass = capacities, sum(capacities[i] for i in free) or 1.0
        for i in free:
            ideal[i] = rest * (weights[i] / mass)
        full = {i for i in free if ideal[i] > capacities[i]}
        if not full:
            break
        for i in full:
            ideal[i] = capacities[i]
        free -= full
    return ideal


def _settle(shares: list[int], ideal: list[float], total: int, lows: list[int], capacities: Sequence[int]) -> None:
    """Move `shares` by ones until they sum to `total`, where the ideal is farthest first."""
    while (missing := total - sum(shares)) != 0:
        step = 1 if missing > 0 else -1
        bound = capacities if step > 0 else lows
        movable = [i for i in range(len(shares)) if shares[i] != bound[i]]
        movable.sort(key=lambda i: step * (shares[i] - ideal[i]))
        for i in movable[: abs(missing)]:
            shares[i] += step
