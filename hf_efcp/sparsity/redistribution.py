"""Sparse momentum: layers whose weights move more get more of them (SNFS, arXiv 1907.04840)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from hf_efcp.sparsity.allocation import allocate

_ROOM = 0.99  # of a layer's free places that may be filled at once


def momentum_sizes(active: Mapping[str, Tensor], momentum: Mapping[str, Tensor]) -> dict[str, float]:
    """`v_l` by layer, not normalized: the mean size of the momentum over the weights that are active."""
    sizes = {}
    for name, mask in active.items():
        size = momentum[name].abs()[mask].mean().item() if name in momentum and mask.any() else 0.0
        sizes[name] = size if math.isfinite(size) else 0.0
    return sizes


def redistributed(kept: Mapping[str, Tensor], removed: Mapping[str, int], sizes: Mapping[str, float]) -> dict[str, int]:
    """How many weights grow in each layer: together as many as were removed.

    In proportion to `sizes`, those of `momentum_sizes` before the pruning, with at most 99 % of a layer's free places
    filled while others have room; what does not fit goes to those. Published with a running correction of the total,
    which is 0 here: exactly as many grow as were pruned.
    """
    total = sum(removed.values())
    names = list(kept)
    free = [int((~kept[name]).sum()) for name in names]
    room = [math.floor(_ROOM * places) for places in free]
    if sum(room) < total:
        room = free
    return dict(zip(names, allocate(total, [sizes[name] for name in names], room), strict=True))
