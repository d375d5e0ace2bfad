"""AdamW's direction and step, over gradients or over what a preconditioner makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

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


def can_fuse(parameter: Tensor, state: dict[str, Tensor]) -> bool:
    """Whether `fused_step_` takes a parameter."""
    is_plain = type(parameter) in (Tensor, nn.Parameter) and parameter.device.type == "cpu"
    tensors = (parameter, state["exp_avg"], state["exp_avg_sq"])
    return is_plain and parameter.is_contiguous() and all(tensor.dtype is torch.float32 for tensor in tensors)


def fused_step_(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[dict[str, Tensor]],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """`p ← p(1 − lr·weight_decay) − lr·m̂/(√v̂ + ε)` for all parameters in one call of torch's own kernel.

    With layers as small as a ViT's, calls one by one take longer than the arithmetic.

    Args:
        states: `exp_avg`, `exp_avg_sq` and `adam_step`, this step included.
    """
    counts = torch.stack([state["adam_step"] for state in states]).tolist()
    steps = {count: torch.tensor(float(count)) for count in set(counts)}
    torch._fused_adamw_(
        list(params),
        [gradient.to(torch.float32).contiguous() for gradient in gradients],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [steps[count] for count in counts],
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
