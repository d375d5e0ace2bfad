"""Where updates meet weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_efcp.optim.segment import Segments


def apply_(groups: list[dict[str, Any]], updates: list[Tensor], segments: Segments, accept: Tensor) -> None:
    """`p ← p(1 − lr·weight_decay) − lr·update` with each group's own rates; nothing where the step is not accepted.

    A parameter without a gradient stays as it is: it may be frozen, and decay or momentum must not move it.

    Args:
        groups: an optimizer's `param_groups`.
        updates: flat vectors, one a segment, zero where the step is not accepted.
        accept: () bool.
    """
    update_of: dict[Tensor, Tensor] = {}
    for segment, update in zip(segments, updates, strict=True):
        update_of.update(zip(segment.params, segment.layout.split(update), strict=True))
    for group in groups:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            continue
        lr, decay = group["lr"], group["weight_decay"]
        if lr and decay:
            factor = 1 - lr * decay * accept.double()
            for device, there in _by_device(params).items():
                torch._foreach_mul_(there, factor.to(device))
        torch._foreach_add_(params, [update_of[p].to(p.device) for p in params], alpha=-lr)


def _by_device(params: list[Tensor]) -> dict[torch.device, list[Tensor]]:
    found: dict[torch.device, list[Tensor]] = {}
    for parameter in params:
        found.setdefault(parameter.device, []).append(parameter)
    return found
