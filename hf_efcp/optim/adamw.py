"""AdamW's direction, for the parameters that another rule leaves aside."""

from __future__ import annotations

import torch
from torch import Tensor


def adam_state(parameter: Tensor) -> dict[str, Tensor]:
    """Both moments, float32."""
    return {name: torch.zeros(parameter.shape, device=parameter.device) for name in ("exp_avg", "exp_avg_sq")}


def adam_direction(
    state: dict[str, Tensor], gradient: Tensor, count: int, *, beta1: float, beta2: float, eps: float
) -> Tensor:
    """`m̂/(√v̂ + ε)` in float32 (arXiv 1412.6980); the moments take the gradient, which must be finite.

    Args:
        count: steps taken with these moments, this one included.
    """
    gradient = gradient.float()
    first, second = state["exp_avg"], state["exp_avg_sq"]
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = (second / (1 - beta2**count)).sqrt_().add_(eps)
    return first / (1 - beta1**count) / root
