"""The nearest point of an l2 ball in the norm of a sketched matrix."""

from __future__ import annotations

import torch
from torch import Tensor

_HALVINGS = 100  # of the interval of μ: past float64's resolution


def ball_shrinkage(
    inside: Tensor, outside: Tensor, dots: Tensor, total: Tensor, radius: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors by which the components of `y` shrink in `argmin_{‖x‖ ≤ radius} (x − y)ᵀH(x − y)`.

    The minimum is `(H + μI)⁻¹Hy` with the least μ ≥ 0 that brings it into the ball, found by bisection on the k
    components within the sketch and the norm of the rest: O(k) a halving, and no wait for the device.

    Args:
        inside: 1/h of the kept directions, (k,) float64, 0 where h counts as infinitely small.
        outside: 1/h of all other directions, (), likewise.
        dots: components of `y` in the kept directions, (k,) float64.
        total: `‖y‖²`, () float64.

    Returns:
        factors (k,) and (), and whether `y` lies outside of the ball.
    """
    inverse = torch.cat([inside, outside[None]])
    largest = torch.where(inverse > 0, 1 / inverse, 0).max()
    # A direction without curvature would be given up first, and whole; it counts as the least that float32 resolves.
    h = torch.where(inverse > 0, 1 / inverse, 0).clamp_min(1e-7 * largest)
    h = torch.where(largest > 0, h, torch.ones_like(h))
    squares = torch.cat([dots.square(), (total - dots.square().sum()).clamp_min(0)[None]])
    is_outside = total > radius**2
    low = torch.zeros_like(total)
    high = h.max() * total.sqrt() / radius
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        too_long = (squares * (h / (h + middle)).square()).sum() > radius**2
        low, high = torch.where(too_long, middle, low), torch.where(too_long, high, middle)
    factors = h / (h + high)
    return factors[:-1], factors[-1], is_outside
