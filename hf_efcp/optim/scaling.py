"""Moments and lengths of the update: what carries AdamW's learning rates over to a preconditioned gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_efcp.optim.segment import Segment, Segments

_ADAM_EPS = 1e-8  # AdamW's default in torch and in transformers
_CHUNK = 1 << 18  # entries at a time: temporaries stay in cache


def rms_(updates: list[Tensor], segments: Segments, target: float) -> None:
    """Scale the updates, one flat vector a segment, to a root mean square of `target` over the whole model."""
    numel = sum(segment.layout.numel for segment in segments)
    device = updates[0].device
    squares = [torch.linalg.vector_norm(u, dtype=torch.float64).to(device).square() for u in updates]
    factor = _ratio(target, (torch.stack(squares).sum() / max(1, numel)).sqrt())
    for update in updates:
        update.mul_(factor.to(update.device, update.dtype))


def layer_rms_(updates: list[Tensor], segments: Segments, target: float) -> None:
    """Scale each parameter's part of the updates to a root mean square of `target`."""
    for update, segment in zip(updates, segments, strict=True):
        parts = segment.layout.split(update)
        norms = torch.stack(torch._foreach_norm(parts))
        roots = torch.tensor(segment.layout.numels, device=update.device).clamp_min(1).sqrt()
        torch._foreach_mul_(parts, list(_ratio(target, norms / roots).to(update.dtype).unbind()))


def heavy_ball_(updates: list[Tensor], segments: Segments, accept: Tensor, *, momentum: float) -> None:
    """`v ← momentum·v + u`, and the updates become `v`; zero, and `v` as it was, where not accepted."""
    for update, segment in zip(updates, segments, strict=True):
        keep = accept.to(segment.device)
        factor = torch.where(keep, momentum, 1.0).to(torch.float32)
        for u, stored in _chunks(segment, update, "momentum"):
            buffer = stored[0].float().mul_(factor).add_(u)
            stored[0].copy_(torch.where(keep, buffer, stored[0].float()))
            torch.where(keep, buffer, buffer.new_zeros(()), out=u)


def adam_(
    updates: list[Tensor], segments: Segments, step: Tensor, accept: Tensor, *, beta1: float, beta2: float
) -> None:
    """Replace the updates by Adam's direction over them (arXiv 1412.6980), moments in the segments.

    Moments in bfloat16 are rounded to the nearest (first) and stochastically (second): an average with β₂ = 0.999
    changes by less than half a step of bfloat16 and would stand still.

    Args:
        step: () number of steps taken, this one included.
        accept: () whether this step counts; where false, the moments stay as they are and the updates become zero.
    """
    for update, segment in zip(updates, segments, strict=True):
        keep, count = accept.to(segment.device), step.to(segment.device, torch.float64)
        correction1, correction2 = ((1 - beta**count).float() for beta in (beta1, beta2))
        for u, (first, second) in _chunks(segment, update, "exp_avg", "exp_avg_sq"):
            mean = first.float().lerp(u, 1 - beta1)
            square = second.float().lerp(u.square(), 1 - beta2)
            first.copy_(torch.where(keep, mean, first.float()))
            second.copy_(torch.where(keep, _rounded(square, second.dtype, step), second.float()))
            direction = mean.div_(correction1).div_(square.div_(correction2).sqrt_().add_(_ADAM_EPS))
            torch.where(keep, direction, direction.new_zeros(()), out=u)


def _chunks(segment: Segment, update: Tensor, *names: str) -> Iterator[tuple[Tensor, list[Tensor]]]:
    moments = [segment.moments[name].split(_CHUNK) for name in names]
    for u, *stored in zip(update.split(_CHUNK), *moments, strict=True):
        yield u, stored


def _rounded(x: Tensor, dtype: torch.dtype, step: Tensor) -> Tensor:
    """`x` rounded to bfloat16 stochastically, as float32; as it is for float32.

    The noise is a hash of the value's own bits and the step: no generator, so that resume and ranks agree.
    """
    if dtype is torch.float32:
        return x
    bits = x.view(torch.int32)
    noise = ((bits ^ step.to(bits.device, torch.int32) * 0x3C6EF35F) * -0x61C88647 >> 8) & 0xFFFF
    return (bits + noise & -0x10000).view(torch.float32)


def _ratio(target: float, value: Tensor) -> Tensor:
    return torch.where(value > 0, target / value, torch.zeros_like(value))
