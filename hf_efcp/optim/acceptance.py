"""Whether a step counts: what is not finite must not enter the state, and no host waits to find out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_efcp.parallel import Group


def acceptable(
    seen: Sequence[Tensor], ours: Sequence[Tensor], shared: dict[str, Tensor], group: Group, moves: bool
) -> Tensor:
    """() bool: the gradients are finite, and are not the zeros by which checkpointing materialises state.

    Args:
        seen: all gradients of this rank.
        ours: those of what it owns.
        shared: what the whole model shares; a step that is not finite is counted there.
        moves: whether any learning rate is not 0, so that zeros count.
    """
    device = shared["step"].device
    sums = [gradient.sum(dtype=torch.promote_types(gradient.dtype, torch.float32)) for gradient in seen]
    # What is not finite in one sum is not in their sum.
    finite = group.all_(torch.stack([total.to(device, torch.float64) for total in sums]).sum().isfinite())
    shared["skipped"] += ~finite
    if moves:
        return finite
    nonzero = [gradient.any().to(device) for gradient in ours] or [torch.zeros_like(finite)]
    return finite & group.any_(torch.stack(nonzero).any())


def finite(updates: Sequence[Tensor], accept: Tensor, shared: dict[str, Tensor], group: Group) -> Tensor:
    """`accept`, less the case of an update that overflowed."""
    found = group.all_(torch.stack([update.sum().isfinite().to(accept.device) for update in updates]).all())
    shared["skipped"] += accept & ~found
    return accept & found
