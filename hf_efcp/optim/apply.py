"""Where updates meet weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_efcp.optim.rounding import step_rounded_
from hf_efcp.optim.segment import Segments


def apply_(
    groups: list[dict[str, Any]], updates: list[Tensor], segments: Segments, accept: Tensor, step: Tensor
) -> None:
    """`p ← p(1 − lr·weight_decay) − lr·update` with each group's own rates; nothing where the step is not accepted.

    A parameter without a gradient stays as it is: it may be frozen, and decay or momentum must not move it. Each rank
    updates what it owns, and all have the new weights afterwards.

    Args:
        groups: an optimizer's `param_groups`.
        updates: flat vectors, one a segment, zero where the step is not accepted.
        accept: () bool.
        step: () int64, what the rounding of 16-bit weights is drawn by.
    """
    targets = [s.owned.targets(s.layout.split(update)) for s, update in zip(segments, updates, strict=True)]
    target_of = {p: (weights, update) for part in targets for p, weights, update in part}
    for group in groups:
        params = [p for p in group["params"] if p.grad is not None and p in target_of]
        if not params:
            continue
        weights, steps = zip(*(target_of[p] for p in params), strict=True)
        move_(list(weights), list(steps), group, accept, step)
    for segment, part in zip(segments, targets, strict=True):
        segment.owned.share([weights for _, weights, _ in part])


def move_(
    weights: list[Tensor],
    updates: list[Tensor],
    group: dict[str, Any],
    accept: Tensor,
    step: Tensor | int,
    *,
    lr: float | None = None,
) -> None:
    """`p ← p(1 − lr·weight_decay) − lr·update`, all tensors of a device and dtype at once; no decay unless accepted.

    Weights of 16 bits are rounded as the group's `weight_rounding` says, stochastically by `step`.

    Args:
        lr: the group's, if not given.
    """
    lr, decay = group["lr"] if lr is None else lr, group["weight_decay"]
    plain: list[tuple[Tensor, Tensor]] = []
    for weight, update in zip(weights, updates, strict=True):
        if lr and group["weight_rounding"] == "stochastic" and weight.dtype in (torch.bfloat16, torch.float16):
            by = (1 - lr * decay * accept.double()).to(weight.device) if decay else 1.0
            step_rounded_(weight, update, factor=by, lr=lr, step=step)
        else:
            plain.append((weight, update))
    if lr and decay:
        factor = 1 - lr * decay * accept.double()
        for (device, dtype), there in _by_kind([weight for weight, _ in plain]).items():
            # A factor of another dtype would be a launch for each tensor; bfloat16 cannot hold 1 − 1e-5.
            torch._foreach_mul_(there, factor.to(device, dtype if dtype is torch.float32 else factor.dtype))
    if plain:
        torch._foreach_add_([weight for weight, _ in plain], [update for _, update in plain], alpha=-lr)


def _by_kind(weights: list[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for weight in weights:
        found.setdefault((weight.device, weight.dtype), []).append(weight)
    return found
