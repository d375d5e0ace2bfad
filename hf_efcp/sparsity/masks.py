"""Masks of weights: which survive a pruning, which grow, and how masks are stored."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BITS = torch.arange(8, dtype=torch.uint8)


def largest(scores: Tensor, eligible: Tensor, count: int) -> Tensor:
    """The `count` eligible entries with the largest scores, as a mask; of equal ones the first.

    Ranking is stable and the ineligible stand behind everything, so zeros that tie never take more or other entries
    than asked for, and every process chooses the same. A score that is not a number counts as 0.

    Raises:
        ValueError: fewer are eligible.
    """
    available = int(eligible.sum())
    if not 0 <= count <= available:
        raise ValueError(f"{count} entries cannot be chosen from {available}.")
    wide = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    ranked = torch.nan_to_num(wide).masked_fill(~eligible, -torch.inf)
    order = ranked.flatten().sort(descending=True, stable=True).indices[:count]
    chosen = torch.zeros_like(eligible).flatten()
    chosen[order] = True
    return chosen.view_as(eligible)


def pruned(weight: Tensor, mask: Tensor, count: int) -> Tensor:
    """The mask without its `count` smallest weights in size."""
    return largest(weight.abs(), mask, int(mask.sum()) - count)


def grown(scores: Tensor, mask: Tensor, count: int) -> Tensor:
    """The mask with the `count` largest-scored entries that it lacks."""
    return mask | largest(scores, ~mask, count)


def random_scores(shape: torch.Size, seed: int, step: int, layer: int) -> Tensor:
    """Uniform numbers that depend on seed, step and layer alone: the same on every process and device."""
    generator = torch.Generator()
    generator.manual_seed(((seed * 1_000_003 + step) * 1_000_003 + layer) % (2**63))
    return torch.rand(shape, generator=generator)


def pack(mask: Tensor) -> Tensor:
    """A mask as uint8, eight entries a byte."""
    flat = mask.detach().cpu().flatten().to(torch.uint8)
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % 8)])
    return (flat.view(-1, 8) << _BITS).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The mask of this shape that `pack` stored."""
    flat = (bits.cpu()[:, None] >> _BITS).bitwise_and(1).bool().flatten()
    return flat[: math.prod(shape)].view(shape)
