"""Rings of the `m` newest gradients, the rows of `G`: dense, block top-k, global top-k.

All of them, and `lowrank.LowRankWindow`, speak one language, in flat vectors of their layout:

    push     row j of G ← compress(residual + g);  residual ← residual + g − row;  the new row of GGᵀ
    dots     G x, the only thing that crosses devices
    combine  out ← out + Gᵀ coefficients

There is one system for the whole model, or one for each parameter: `(S, m)` below has S = 1 or a row a parameter.

`accept` is a 0-dim boolean on the device. Where it is false the gradient must be zero, and a push changes nothing;
no host ever waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hf_efcp import ops
from hf_efcp.curvature.layout import Layout


class Window(Protocol):
    """What the optimizers ask of a ring of gradients."""

    layout: Layout

    def push(self, gradient: Tensor, row: Tensor, accept: Tensor, scratch: Tensor) -> Tensor:  # pyright: ignore[reportReturnType]
        """Replace row `row` (() int64) and return its inner products with all rows, (S, m) float64.

        `gradient` and `scratch` are (size,) float32 and may be the same; what stands in `scratch` is lost.
        """

    def dots(self, x: Tensor) -> Tensor:  # pyright: ignore[reportReturnType]
        """`G x` for a (size,) float32 vector: (S, m) float64."""

    def combine(self, coefficients: Tensor, out: Tensor) -> None:
        """Add `Gᵀ coefficients` to `out`, (size,) float32, for (S, m) coefficients; summed in their dtype."""

    def views(self) -> list[dict[str, Tensor]]:  # pyright: ignore[reportReturnType]
        """What lives between steps: for each parameter its tensors, views of the buffers, by name."""

    def shared_buffers(self) -> dict[str, Tensor]:  # pyright: ignore[reportReturnType]
        """What lives between steps and belongs to no single parameter."""

    def residuals(self) -> list[Tensor]:  # pyright: ignore[reportReturnType]
        """What earlier pushes left out, as floating point numbers, for reports."""

    def steps(self, name: str) -> tuple[int, int] | None:
        """The axis of a view along which it follows its parameter's entries, and how many entries are a step of it.

        `None`: the view has a number for each entry.
        """


def _spans(starts: Sequence[range], per_parameter: bool) -> list[slice]:
    """The part of a buffer that each system covers, from the part of each parameter."""
    if per_parameter:
        return [slice(part.start, part.stop) for part in starts]
    return [slice(0, starts[-1].stop if starts else 0)]


class DenseWindow:
    """Whole gradients, as published: `values` (m, size), in the state of sharded parameters (size, m)."""

    def __init__(
        self,
        layout: Layout,
        window: int,
        *,
        value_dtype: torch.dtype,
        device: torch.device,
        per_parameter: bool = False,
    ):
        self.layout = layout
        # Distributed checkpoints take contiguous parts alone, so there a parameter's entries are the first axis.
        shape = (layout.size, window) if layout.in_units else (window, layout.size)
        buffer = torch.zeros(shape, dtype=value_dtype, device=device)
        self.values = buffer.T if layout.in_units else buffer
        self._spans = _spans(layout.ranges, per_parameter)
        self._piece = max(1, (1 << 19) // window)  # columns that stay in cache while they are cast

    def push(self, gradient: Tensor, row: Tensor, accept: Tensor, scratch: Tensor) -> Tensor:
        stored = gradient.to(self.values.dtype)
        self.values.index_copy_(0, row[None], torch.where(accept, stored, ops.take_row(self.values, 0, row))[None])
        return self.dots(scratch.copy_(stored))

    def dots(self, x: Tensor) -> Tensor:
        total = torch.zeros(len(self._spans), len(self.values), dtype=torch.float64, device=x.device)
        for products, span in zip(total, self._spans, strict=True):
            pieces = zip(self.values[:, span].split(self._piece, dim=1), x[span].split(self._piece), strict=True)
            for values, piece in pieces:
                products += values.double() @ piece.double()
        return total

    def combine(self, coefficients: Tensor, out: Tensor) -> None:
        for weights, span in zip(coefficients, self._spans, strict=True):
            pieces = zip(self.values[:, span].split(self._piece, dim=1), out[span].split(self._piece), strict=True)
            for values, piece in pieces:
                piece.add_(values.T.to(weights.dtype) @ weights)

    def views(self) -> list[dict[str, Tensor]]:
        parts = [self.values[:, r.start : r.stop] for r in self.layout.ranges]
        return [{"values": part.T if self.layout.in_units else part} for part in parts]

    def steps(self, name: str) -> tuple[int, int] | None:
        return (0, 1) if self.layout.in_units else (1, 1)

    def shared_buffers(self) -> dict[str, Tensor]:
        return {}

    def residuals(self) -> list[Tensor]:
        return []


class BlockTopKWindow:
    """The `ceil(density·block_size)` largest entries of every block, with error feedback.

    Holds `indices` (B, m, k), local to their block, uint8 for blocks up to 256 and int16 above; `values`
    (B, m, k), for int8 with `scales`; `residual`: what earlier pushes left out, rounding of the values included,
    in 4 bits with `residual_grid`. `hf_efcp.ops.torch_ops` describes the formats.

    Args:
        layout: for int8 values in groups of `scale_group(block_size)` blocks.
        density: share of entries kept, in (0, 1].
        residual_dtype: `None` for 4 bits.
    """

    def __init__(
        self,
        layout: Layout,
        window: int,
        *,
        density: float,
        value_dtype: torch.dtype,
        residual_dtype: torch.dtype | None,
        device: torch.device,
        per_parameter: bool = False,
    ):
        self.layout = layout
        self.k = max(1, math.ceil(density * layout.block_size))
        self.per_parameter = per_parameter
        index_dtype = torch.uint8 if layout.block_size <= 256 else torch.int16
        # An empty row is k distinct zeros: a repeated index would be harmless but is no valid row.
        shape = (layout.n_blocks, window, self.k)
        self.indices = torch.arange(self.k, device=device).to(index_dtype).repeat(*shape[:2], 1)
        self.values = torch.zeros(shape, dtype=value_dtype, device=device)
        self.scales = self.grid = None
        self.group = 1
        if value_dtype is torch.int8:
            self.group = scale_group(layout.block_size)
            self.scales = torch.zeros(layout.n_blocks // self.group, window, device=device)
        if residual_dtype is None:
            shape = (layout.n_blocks, layout.block_size // 2)
            self.residual = torch.zeros(shape, dtype=torch.uint8, device=device)
            self.grid = torch.zeros(layout.n_blocks, 2, device=device)
        else:
            self.residual = layout.zeros(residual_dtype, device)

    def _blocks(self, flat: Tensor) -> Tensor:
        return flat.view(self.layout.n_blocks, self.layout.block_size)

    def push(self, gradient: Tensor, row: Tensor, accept: Tensor, scratch: Tensor) -> Tensor:
        residual = self.residual if self.grid is not None else self._blocks(self.residual)
        ops.push_topk_(
            *(self.indices, self.values, row, residual, self._blocks(gradient), accept),
            scales=self.scales,
            grid=self.grid,
        )
        scratch = self._blocks(scratch)
        dots = [ops.row_dots(indices, values, row, scratch[s], scales) for s, indices, values, scales in self._parts()]
        return self._stacked(dots)

    def _stacked(self, parts: list[Tensor]) -> Tensor:
        none = self.values.new_zeros(0, self.values.shape[1], dtype=torch.float64)  # a rank may own no block
        return torch.stack(parts) if parts else none

    def _parts(self) -> list[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """Blocks, indices, values and scales of each system."""
        parts = []
        for span in _spans(self.layout.blocks, self.per_parameter):
            scales = self.scales
            if scales is not None:
                scales = scales[span.start // self.group : span.stop // self.group]
            parts.append((span, self.indices[span], self.values[span], scales))
        return parts

    def dots(self, x: Tensor) -> Tensor:
        x = self._blocks(x)
        parts = self._parts()
        return self._stacked([ops.window_dots(indices, values, x[s], scales) for s, indices, values, scales in parts])

    def combine(self, coefficients: Tensor, out: Tensor) -> None:
        sums = out.to(coefficients.dtype)
        for weights, (span, indices, values, scales) in zip(coefficients, self._parts(), strict=True):
            ops.window_combine_(self._blocks(sums)[span], indices, values, weights, scales)
        if sums is not out:
            out.copy_(sums)

    def residuals(self) -> list[Tensor]:
        """What earlier pushes left out: for each parameter float32 or bfloat16 in its shape."""
        flat = self.residual if self.grid is None else ops.unpack_int4(self.residual, self.grid).view(-1)
        return self.layout.split(flat)

    def views(self) -> list[dict[str, Tensor]]:
        by_block = {"indices": self.indices, "values": self.values}
        if self.grid is not None:
            by_block.update(residual=self.residual, residual_grid=self.grid)
        residuals = self.layout.views(self.residual) if self.grid is None else []
        views = []
        for number, blocks in enumerate(self.layout.blocks):
            state = {name: self.layout.of_blocks(buffer, number) for name, buffer in by_block.items()}
            if self.scales is not None:
                state["scales"] = self.scales[blocks.start // self.group : blocks.stop // self.group]
            if self.grid is None:
                state["residual"] = residuals[number]
            views.append(state)
        return views

    def steps(self, name: str) -> tuple[int, int] | None:
        if name == "residual" and self.grid is None:
            return None
        return 0, self.layout.block_size * (self.group if name == "scales" else 1)

    def shared_buffers(self) -> dict[str, Tensor]:
        return {}


def scale_group(block_size: int) -> int:
    """Blocks that share a scale of int8 values: 4096 entries, or one block where that is more."""
    return max(1, 4096 // block_size)


class GlobalTopKWindow:
    """The `int(density·d)` largest entries of the whole vector, with error feedback, as first published.

    Rows cross parameters, so `indices` (m, k) int32 and `values` (m, k) belong to no single one, and there is one
    system. For comparison: block-wise selection is as good and faster. The layout must have no padding.
    """

    def __init__(
        self,
        layout: Layout,
        window: int,
        *,
        density: float,
        value_dtype: torch.dtype,
        residual_dtype: torch.dtype,
        device: torch.device,
    ):
        self.layout = layout
        self.k = min(max(1, int(density * layout.numel)), layout.numel)
        self.indices = torch.zeros(window, self.k, dtype=torch.int32, device=device)
        self.values = torch.zeros(window, self.k, dtype=value_dtype, device=device)
        self.residual = layout.zeros(residual_dtype, device)

    def push(self, gradient: Tensor, row: Tensor, accept: Tensor, scratch: Tensor) -> Tensor:
        in_place = self.residual.dtype is torch.float32
        summed = (self.residual if in_place else self.residual.float()).add_(gradient)
        chosen = summed.abs().topk(self.k, sorted=False).indices
        stored = summed[chosen].to(self.values.dtype)
        summed.scatter_add_(0, chosen, torch.where(accept, -stored.float(), 0.0))
        if not in_place:
            self.residual.copy_(summed)
        indices = torch.where(accept, chosen.to(torch.int32), ops.take_row(self.indices, 0, row))
        values = torch.where(accept, stored, ops.take_row(self.values, 0, row))
        self.indices.index_copy_(0, row[None], indices[None])
        self.values.index_copy_(0, row[None], values[None])
        return self.dots(scratch.zero_().scatter_(0, chosen, stored.float()))

    def dots(self, x: Tensor) -> Tensor:
        x = x.double()
        dots = [values.double() @ x[indices] for indices, values in zip(self.indices, self.values, strict=True)]
        return torch.stack(dots)[None]

    def combine(self, coefficients: Tensor, out: Tensor) -> None:
        sums = out.to(coefficients.dtype)
        for indices, values, weight in zip(self.indices, self.values, coefficients[0], strict=True):
            sums.index_add_(0, indices, values.to(sums.dtype) * weight)
        out.copy_(sums)

    def views(self) -> list[dict[str, Tensor]]:
        return [{"residual": residual} for residual in self.layout.split(self.residual)]

    def steps(self, name: str) -> tuple[int, int] | None:
        return None

    def shared_buffers(self) -> dict[str, Tensor]:
        return {"indices": self.indices, "values": self.values}

    def residuals(self) -> list[Tensor]:
        return self.layout.split(self.residual)
