"""Into which blocks a tensor is cut, and which of a block's axes get a sketch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Block:
    """A part of a tensor with sketches of its own.

    Attributes:
        slices: its place in the tensor without axes of length 1.
        shape: of the part.
        axes: those with a sketch; p is twice their number.
    """

    slices: tuple[slice, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...]


def partition(shape: tuple[int, ...], block_size: int | None, max_dim: int, one_sided: bool) -> list[Block]:
    """The blocks of a tensor of `shape`, none where it is empty.

    Axes of length 1 are no axes: (1, 1, d) is a vector and a scalar is a vector of one. Axes longer than `max_dim`
    get no sketch, nor, if `one_sided`, any but the shortest.
    """
    squeezed = squeeze(shape)
    if 0 in squeezed:
        return []
    sides = [_cuts(d, block_size or d) for d in squeezed]
    blocks = []
    for slices in itertools.product(*sides):
        part = tuple(s.stop - s.start for s in slices)
        axes = tuple(axis for axis, d in enumerate(part) if d <= max_dim)
        if one_sided and axes:
            axes = (min(axes, key=part.__getitem__),)
        blocks.append(Block(slices, part, axes))
    return blocks


def long_axes(shape: tuple[int, ...], block_size: int | None, max_dim: int) -> tuple[int, ...]:
    """The axes that get no sketch because they, or their blocks, are longer than `max_dim`."""
    return tuple(axis for axis, d in enumerate(shape) if min(d, block_size or d) > max_dim)


def squeeze(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without axes of length 1, at least one axis."""
    return tuple(d for d in shape if d != 1) or (1,)


def block_of(tensor: Tensor, block: Block) -> Tensor:
    """The view of a block in a tensor of any memory format."""
    return tensor.reshape(squeeze(tuple(tensor.shape)))[block.slices]


def _cuts(d: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, d)) for start in range(0, d, size)]
