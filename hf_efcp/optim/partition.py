"""Into which blocks a tensor is cut, and which of a block's axes get a sketch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

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


class Slices(NamedTuple):
    """What is not zero of an axis: a batch of sentences has few of a vocabulary's words.

    Attributes:
        axis: of the tensor, counted without a batch's.
        index: (count,) int64, ascending.
        length: of the whole axis.
    """

    axis: int
    index: Tensor
    length: int

    def spread(self, kept: Tensor) -> Tensor:
        """A batch (n, …) with the zeros that were left out."""
        axis = self.axis + 1
        whole = kept.new_zeros(*kept.shape[:axis], self.length, *kept.shape[axis + 1 :])
        return whole.index_copy_(axis, self.index, kept)


def without_zeros(batch: Tensor, slices: Slices | None) -> Tensor:
    """A batch (n, …) without the slices that are zero."""
    return batch if slices is None else batch.index_select(slices.axis + 1, slices.index)


def find_slices(gradient: Tensor, axis: int) -> Slices | None:
    """The slices that are not zero, where they are at most half of the axis and at least one. Waits for the device."""
    others = tuple(other for other in range(gradient.ndim) if other != axis)
    if not others:
        return None
    is_zero = (gradient.amax(others) == 0) & (gradient.amin(others) == 0)
    index = (~is_zero).nonzero().squeeze(1)
    return Slices(axis, index, len(is_zero)) if 0 < 2 * len(index) <= len(is_zero) else None


def _cuts(d: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, d)) for start in range(0, d, size)]
