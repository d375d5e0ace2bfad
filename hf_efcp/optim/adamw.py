"""AdamW's direction, over gradients or over what a preconditioner makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efcp import ops


def adam_state(parameter: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Both moments."""
    return {
        name: torch.zeros(parameter.shape, dtype=dtype, device=parameter.device) for name in ("exp_avg", "exp_avg_sq")
    }


def adam_direction(
    state: dict[str, Tensor], gradient: Tensor, count: Tensor, accept: Tensor, betas: tuple[float, float], eps: float
) -> Tensor:
    """`m̂/(√v̂ + ε)` in float32 (arXiv 1412.6980), a new tensor; the moments take the gradient.

    Args:
        count: () steps taken with these moments, this one included.
        accept: () bool; where false, the moments stay as they are and the direction is zero.
    """
    update = gradient.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    moments = (state[name].view(-1) for name in ("exp_avg", "exp_avg_sq"))
    ops.adam_(update.view(-1), *moments, count, accept, beta1=betas[0], beta2=betas[1], eps=eps)
    return update
