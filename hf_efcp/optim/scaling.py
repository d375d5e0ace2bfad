"""How long a preconditioned gradient's step is: what carries AdamW's learning rates over."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efcp.optim.segment import Segment

_ADAM_EPS = 1e-8  # AdamW's default in torch and in transformers


def rms_(updates: list[Tensor], segments: list[Segment], target: float) -> None:
    """Scale the updates, one flat vector a segment, to a root mean square of `target` over the whole model."""
    numel = sum(segment.layout.numel for segment in segments)
    device = updates[0].device
    squares = [torch.linalg.vector_norm(u, dtype=torch.float64).to(device).square() for u in updates]
    factor = _ratio(target, (torch.stack(squares).sum() / max(1, numel)).sqrt())
    for update in updates:
        update.mul_(factor.to(update.device, update.dtype))


def layer_rms_(updates: list[Tensor], segments: list[Segment], target: float) -> None:
    """Scale each parameter's part of the updates to a root mean square of `target`."""
    for update, segment in zip(updates, segments, strict=True):
        parts = segment.layout.split(update)
        norms = torch.stack(torch._foreach_norm(parts))
        roots = torch.tensor(segment.layout.numels, device=update.device).clamp_min(1).sqrt()
        torch._foreach_mul_(parts, list(_ratio(target, norms / roots).to(update.dtype).unbind()))


def adam_(
    updates: list[Tensor], segments: list[Segment], step: Tensor, accept: Tensor, *, beta1: float, beta2: float
) -> None:
    """Replace the updates by Adam's direction over them (arXiv 1412.6980), moments in the segments.

    Args:
        step: () number of steps taken, this one included.
        accept: () whether this step counts; where false, the moments stay as they are and the updates become zero.
    """
    for update, segment in zip(updates, segments, strict=True):
        first, second = segment.moments["exp_avg"], segment.moments["exp_avg_sq"]
        keep = accept.to(update.device)
        weight1, weight2 = (torch.where(keep, 1 - beta, 0.0).to(update.dtype) for beta in (beta1, beta2))
        first.lerp_(update, weight1)
        second.lerp_(update.square(), weight2)
        count = step.to(update.device, torch.float64)
        corrected = (second / (1 - beta2**count).to(update.dtype)).sqrt_()
        direction = first / (1 - beta1**count).to(update.dtype) / corrected.add_(_ADAM_EPS)
        torch.where(keep, direction, direction.new_zeros(()), out=update)


def _ratio(target: float, value: Tensor) -> Tensor:
    return torch.where(value > 0, target / value, torch.zeros_like(value))
