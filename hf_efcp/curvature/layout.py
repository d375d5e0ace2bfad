"""One flat, block-aligned buffer for many parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_efcp import ops

_BLOCK_SIZES = (2048, 1024, 512, 256)  # large ones are read faster, small ones pad less
_PADDING = 0.05  # of a model's entries


def fitting_block_size(numels: Sequence[int]) -> int:
    """The largest of 2048, 1024, 512 entries that pads a model by 5 % at most, else 256.

    Args:
        numels: entries of each parameter, each of which starts a block.
    """
    return next((size for size in _BLOCK_SIZES if _padding(numels, size) <= _PADDING * sum(numels)), _BLOCK_SIZES[-1])


def _padding(numels: Sequence[int], block_size: int) -> int:
    return sum(-numel % block_size for numel in numels)


class Layout:
    """Where each parameter lies in a flat vector of whole blocks.

    Every parameter starts at a block boundary, so that blocks never cross parameters and one kernel serves
    all of them; the rest of its last block is padding and stays zero.

    Args:
        shapes: shape of each parameter, in order.
        block_size: entries per block, 1 for no padding.
        group: every parameter has a multiple of this number of blocks.
        in_units: whether views are cut into units of `group` blocks, padding included, and not into the parameters'
            shapes: so that they can be parts of one tensor over several devices.

    Attributes:
        numels: entries of each parameter.
        blocks: `range` of the blocks of each parameter.
        ranges: `range` of the entries of each parameter, without padding.
        n_blocks, size: blocks and entries in total, padding included.
        numel: entries in total, without padding.
    """

    def __init__(self, shapes: Sequence[torch.Size], block_size: int, group: int = 1, in_units: bool = False):
        self.shapes = tuple(shapes)
        self.block_size, self.group, self.in_units = block_size, group, in_units
        self.numels = tuple(math.prod(shape) for shape in self.shapes)
        self.blocks: list[range] = []
        start = 0
        for numel in self.numels:
            stop = start + group * -(-numel // (block_size * group))
            self.blocks.append(range(start, stop))
            start = stop
        firsts = [blocks.start * block_size for blocks in self.blocks]
        self.ranges = [range(first, first + n) for first, n in zip(firsts, self.numels, strict=True)]
        self.n_blocks = start
        self.size = start * block_size
        self.numel = sum(self.numels)
        self._pieces = [n for piece in self._spans() for n in piece]

    def _spans(self) -> Iterator[tuple[int, int]]:
        for numel, blocks in zip(self.numels, self.blocks, strict=True):
            yield numel, len(blocks) * self.block_size - numel

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of a (size,) vector, one per parameter, in the parameter's shape and without padding."""
        pieces = flat.split(self._pieces)[::2]
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def views(self, flat: Tensor) -> list[Tensor]:
        """Views of a (size,) vector, one per parameter: what stands in an optimizer's state."""
        if not self.in_units or self.block_size == 1:
            return self.split(flat)
        blocks = flat.view(self.n_blocks, self.block_size)
        return [self.of_blocks(blocks, number) for number in range(len(self.shapes))]

    def of_blocks(self, buffer: Tensor, number: int) -> Tensor:
        """The blocks of a parameter in a (n_blocks, …) buffer."""
        blocks = self.blocks[number]
        part = buffer[blocks.start : blocks.stop]
        if self.in_units and self.group > 1:
            return part.view(len(blocks) // self.group, self.group, *part.shape[1:])
        return part

    def zeros(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A (size,) vector of zeros."""
        return torch.zeros(self.size, dtype=dtype, device=device)

    def flatten(self, tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """A (size,) float32 copy of the tensors; `None` counts as zero. From a GPU it lies in pinned memory."""
        source = next((t.device for t in tensors if t is not None), None)
        flat = ops.empty(self.size, device, source)
        pieces = flat.split(self._pieces)
        targets = [piece.view(shape) for piece, shape in zip(pieces[::2], self.shapes, strict=True)]
        empty = [piece for piece in pieces[1::2] if len(piece)]
        empty += [target for target, t in zip(targets, tensors, strict=True) if t is None]
        present = [(target, t) for target, t in zip(targets, tensors, strict=True) if t is not None]
        if empty:
            torch._foreach_zero_(empty)
        if present:
            torch._foreach_copy_([target for target, _ in present], [t for _, t in present])
        return flat
