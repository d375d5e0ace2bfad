"""Sparse momentum: layers whose weights move more get more of them (SNFS, arXiv 1907.04840)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from hf_efcp.sparsity.allocation import allocate

_ROOM = 0.99  # of a layer's free places that may be filled at once


def redistributed(
    kept: Mapping[str, Tensor], removed: Mapping[str, int], momentum: Mapping[str, Tensor]
) -> dict[str, int]:
    """How many weights grow in each layer: together as many as were removed.

    In proportion to `v_l`, the mean size of the momentum over the weights that stayed, with at most 99 % of a layer's
    free places filled while others have room; what does not fit goes to those. Published with a running correction of
    the total, which is 0 here: exactly as many grow as were pruned.
    """
    total = sum(removed.values())
    names = list(kept)
    free = [int((~kept[name]).sum()) for name in names]
    weights = []
    for name in names:
        size = momentum[name].abs()[kept[name]].mean().item() if name in momentum and kept[name].any() else 0.0
        weights.append(size if math.isfinite(size) else 0.0)
    room = [math.floor(_ROOM * places) for places in free]
    if sum(room) < total:
        room = free
    return dict(zip(names, allocate(total, weights, room), strict=True))
