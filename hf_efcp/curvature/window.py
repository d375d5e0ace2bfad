"""Rings of the `m` newest gradients, the rows of `G`: dense, block top-k, global top-k.

All of them, and `lowrank.LowRankWindow`, speak one language, in flat vectors of their layout:

    push     row j of G ← compress(residual + g);  residual ← residual + g − row;  the new row of GGᵀ
    dots     G x, the only thing that crosses devices
    combine  Gᵀ coefficients

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

_MAX_BLOCK = 1 << 15  # indices are signed 16-bit numbers


class Window(Protocol):
    """What the optimizers ask of a ring of gradients."""

    layout: Layout

    def push(self, gradient: Tensor, row: Tensor, accept: Tensor, scratch: Tensor) -> Tensor:
        """Replace row `row` (() int64) and return its inner products with all rows, (S, m) float64.

        `gradient` and `scratch` are (size,) float32 and may be the same; what stands in `scratch` is lost.
        """

    def dots(self, x: Tensor) -> Tensor:
        """`G x` for a (size,) float32 vector: (S, m) float64."""

    def combine(self, coefficients: Tensor, out: Tensor) -> None:
        """Write `Gᵀ coefficients` to `out`, (size,) float32, for (S, m) coefficients."""

    def views(self) -> list[dict[str, Tensor]]:
        """What lives between steps: for each parameter its tensors, views of the buffers, by name."""

    def shared_buffers(self) -> dict[str, Tensor]:
        """What lives between steps and belongs to no single parameter."""


def _spans(starts: Sequence[range], per_parameter: bool) -> list[slice]:
    """The part of a buffer that each system covers, from the part of each parameter."""
    if per_parameter:
        return [slice(part.start, part.stop) for part in starts]
    return [slice(0, starts[-1].stop if starts else 0)]


class DenseWindow:
    """Whole gradients: `values` (m, size). The published M-FAC; m·4 bytes per parameter in float32."""

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
        self.values = torch.zeros(window, layout.size, dtype=value_dtype, device=device)
        self._spans = _spans(layout.ranges, per_parameter)
        self._piece = max(1, (1 << 19) // window)  # columns that stay in cache while they are cast

    def push(self, gradient: Tensor, row: Tensor, accept: Tensor, scratch: Tensor) -> Tensor:
        stored = gradient.to(self.values.dtype)
        self.values.index_copy_(0, row[None], torch.where(accept, stored, self.values[row])[None])
        return self.dots(scratch.copy_(stored))

    def dots(self, x: Tensor) -> Tensor:
        total = torch.zeros(len(self._spans), len(self.values), dtype=torch.float64, device=x.device)
        for products, span in zip(total, self._spans, strict=True):
            pieces = zip(self.values[:, span].split(self._piece, dim=1), x[span].split(self._piece), strict=True)
            for values, piece in pieces:
                products += values.double() @ piece.double()
        return total

    def combine(self, coefficients: Tensor, out: Tensor) -> None:
        for weights, span in zip(coefficients.float(), self._spans, strict=True):
            pieces = zip(self.values[:, span].split(self._piece, dim=1), out[span].split(self._piece), strict=True)
            for values, piece in pieces:
                torch.mv(values.T.float(), weights, out=piece)

    def views(self) -> list[dict[str, Tensor]]:
        return [{"values": self.values[:, r.start : r.stop]} for r in self.layout.ranges]

    def shared_buffers(self) -> dict[str, Tensor]:
        return {}


class BlockTopKWindow:
    """The `ceil(density·block_size)` largest entries of every block, with error feedback.

    Holds `indices` (B, m, k), local to their block, uint8 for blocks up to 256 and int16 above; `values`
    (B, m, k); `residual` (B·block_size,): what earlier pushes left out, rounding of the values included.

    Args:
        density: share of entries kept, in (0, 1].
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
        per_parameter: bool = False,
    ):
        if layout.block_size > _MAX_BLOCK:
            raise ValueError(f"`block_size` must be at most {_MAX_BLOCK}, got {layout.block_size}.")
        self.layout = layout
        self.k = max(1, math.ceil(density * layout.block_size))
        self._spans = _spans(layout.blocks, per_parameter)
        index_dtype = torch.uint8 if layout.block_size <= 256 else torch.int16
        # An empty row is k distinct zeros: a repeated index would be harmless but is no valid row.
        shape = (layout.n_blocks, window, self.k)
        self.indices = torch.arange(self.k, device=device).to(index_dtype).repeat(*shape[:2], 1)
        self.values = torch.zeros(shape, dtype=value_dtype, device=device)
        self.residual = layout.zeros(residual_dtype, device)

    def _blocks(self, flat: Tensor) -> Tensor:
        return flat.view(self.layout.n_blocks, self.layout.block_size)

    def push(self, gradient: Tensor, row: Tensor, accept: Tensor, scratch: Tensor) -> Tensor:
        residual, gradient = self._blocks(self.residual), self._blocks(gradient)
        chosen, stored = ops.accumulate_topk_(residual, gradient, self.k, self.values.dtype, accept)
        self._blocks(scratch.zero_()).scatter_(1, chosen, stored.float())
        old_indices, old_values = self.indices[:, row], self.values[:, row]
        indices = torch.where(accept, chosen.to(old_indices.dtype), old_indices)
        self.indices.index_copy_(1, row[None], indices[:, None])
        self.values.index_copy_(1, row[None], torch.where(accept, stored, old_values)[:, None])
        return self.dots(scratch)

    def dots(self, x: Tensor) -> Tensor:
        blocks = self._blocks(x)
        parts = [ops.window_dots(self.indices[span], self.values[span], blocks[span]) for span in self._spans]
        return torch.stack(parts)

    def combine(self, coefficients: Tensor, out: Tensor) -> None:
        blocks = self._blocks(out.zero_())
        for weights, span in zip(coefficients, self._spans, strict=True):
            ops.window_combine_(blocks[span], self.indices[span], self.values[span], weights)

    def views(self) -> list[dict[str, Tensor]]:
        residuals = self.layout.split(self.residual)
        return [
            {"residual": residual, "indices": self.indices[r.start : r.stop], "values": self.values[r.start : r.stop]}
            for residual, r in zip(residuals, self.layout.blocks, strict=True)
        ]

    def shared_buffers(self) -> dict[str, Tensor]:
        return {}


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
        indices = torch.where(accept, chosen.to(torch.int32), self.indices[row])
        values = torch.where(accept, stored, self.values[row])
        self.indices.index_copy_(0, row[None], indices[None])
        self.values.index_copy_(0, row[None], values[None])
        return self.dots(scratch.zero_().scatter_(0, chosen, stored.float()))

    def dots(self, x: Tensor) -> Tensor:
        x = x.double()
        dots = [values.double() @ x[indices] for indices, values in zip(self.indices, self.values, strict=True)]
        return torch.stack(dots)[None]

    def combine(self, coefficients: Tensor, out: Tensor) -> None:
        out.zero_()
        for indices, values, weight in zip(self.indices, self.values, coefficients[0].float(), strict=True):
            out.index_add_(0, indices, values.float() * weight)

    def views(self) -> list[dict[str, Tensor]]:
        return [{"residual": residual} for residual in self.layout.split(self.residual)]

    def shared_buffers(self) -> dict[str, Tensor]:
        return {"indices": self.indices, "values": self.values}
