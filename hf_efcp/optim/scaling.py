"""Moments and lengths of the update: what carries AdamW's learning rates over to a preconditioned gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_efcp import ops
from hf_efcp.optim.segment import Segment, Segments

_CHUNK = 1 << 18  # entries at a time: temporaries stay in cache


def scale_(
    updates: list[Tensor],
    segments: Segments,
    options: Mapping[str, Any],
    momentum: float,
    step: Tensor,
    accept: Tensor,
) -> None:
    """Momentum, scaling and caution: the updates, one flat vector a segment, become what is applied.

    Args:
        options: an optimizer's, which name the scaling, and whether momentum came before.
        step: () number of steps taken, this one included.
        accept: () whether this step counts; where false, the updates are zero and moments stay as they are.
    """
    scaling, averaged = options["scaling"], options["precondition"] == "momentum"
    if scaling == "adam" and averaged:
        by_root_(updates, segments, step, accept, beta2=options["adam_beta2"])
    elif scaling == "adam":
        adam_(updates, segments, step, accept, beta1=momentum, beta2=options["adam_beta2"])
    elif all("momentum" in segment.moments for segment in segments):
        heavy_ball_(updates, segments, accept, momentum=momentum)
    if scaling == "rms":
        rms_(updates, segments, options["update_rms"])
    elif scaling == "layer_rms":
        layer_rms_(updates, segments, options["update_rms"])
    if options["cautious"]:
        cautious_(updates, segments)


def rms_(updates: list[Tensor], segments: Segments, target: float) -> None:
    """Scale the updates, one flat vector a segment, to a root mean square of `target` over the whole model."""
    squares = [torch.linalg.vector_norm(u, dtype=torch.float64).square() for u in updates]
    factor = model_factor(squares, segments, target)
    for update in updates:
        update.mul_(factor.to(update.device, update.dtype))


def model_factor(squares: list[Tensor], segments: Segments, target: float) -> Tensor:
    """() float64, what an update is multiplied by in `rms_`, from the sum of squares of each segment."""
    total = segments.group.sum_(torch.stack([s.to(squares[0].device) for s in squares]).sum())
    return _ratio(target, (total / max(1, segments.numel)).sqrt())


def layer_rms_(updates: list[Tensor], segments: Segments, target: float) -> None:
    """Scale each parameter's part of the updates to a root mean square of `target`."""
    parts = [segment.layout.split(update) for update, segment in zip(updates, segments, strict=True)]
    squares = [_squares(part, update) for part, update in zip(parts, updates, strict=True)]
    for part, factors in zip(parts, parameter_factors(squares, segments, target), strict=True):
        if part:
            torch._foreach_mul_(part, list(factors.to(part[0].dtype).unbind()))


def parameter_factors(squares: list[Tensor], segments: Segments, target: float) -> list[Tensor]:
    """For each segment (pieces,) float64, what they are multiplied by in `layer_rms_`, from their sums of squares."""
    roots = segments.means(segments.by_parameter(squares, squares[0].device)).sqrt()
    return segments.by_piece(_ratio(target, roots))


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
        moments = segment.moments["exp_avg"], segment.moments["exp_avg_sq"]
        on_device = step.to(segment.device), accept.to(segment.device)
        ops.adam_(update, *moments, *on_device, beta1=beta1, beta2=beta2)


def average_(
    gradients: list[Tensor], segments: Segments, step: Tensor, accept: Tensor, *, beta1: float, beta2: float
) -> None:
    """Take gradients into the moments that the segments have, and replace them by their mean, Adam's bias corrected.

    Arguments as of `adam_`; where a step is not accepted, the moments stay as they are.
    """
    for gradient, segment in zip(gradients, segments, strict=True):
        moments = segment.moments["exp_avg"], segment.moments.get("exp_avg_sq")
        on_device = step.to(segment.device), accept.to(segment.device)
        ops.adam_mean_(gradient, *moments, *on_device, beta1=beta1, beta2=beta2)


def by_root_(updates: list[Tensor], segments: Segments, step: Tensor, accept: Tensor, *, beta2: float) -> None:
    """Divide the updates by the root of Adam's second moment, as `average_` has left it; zero unless accepted."""
    for update, segment in zip(updates, segments, strict=True):
        on_device = step.to(segment.device), accept.to(segment.device)
        ops.adam_direction_(update, segment.moments["exp_avg_sq"], *on_device, beta2=beta2)


def cautious_(updates: list[Tensor], segments: Segments) -> None:
    """Leave out of the updates, one flat vector a segment, what goes up the gradient: `ops.cautious`."""
    for update, segment in zip(updates, segments, strict=True):
        for part, gradient in zip(segment.layout.split(update), segment.owned.gradients(), strict=True):
            if gradient is not None:
                part.copy_(ops.cautious(part, gradient.to(part.device)))


def _squares(parts: list[Tensor], like: Tensor) -> Tensor:
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
    return torch.stack(norms).square() if norms else like.new_empty(0, dtype=torch.float64)


def _chunks(segment: Segment, update: Tensor, *names: str) -> Iterator[tuple[Tensor, list[Tensor]]]:
    size = ops.entries_per_pass(update.device, _CHUNK)
    moments = [segment.moments[name].split(size) for name in names]
    for u, *stored in zip(update.split(size), *moments, strict=True):
        yield u, stored


def _ratio(target: float, value: Tensor) -> Tensor:
    return torch.where(value > 0, target / value, torch.zeros_like(value))
