"""A preconditioned gradient before it is summed: `Gᵀc + s·x`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_efcp import ops
from hf_efcp.optim.segment import Segment


class Pushed(NamedTuple):
    """What a step knows of its segments once their newest rows are written.

    Attributes:
        newest: for each segment the products of all rows with the newest, (S, m) float64.
        products: of all rows with x, and x with itself, (S, m + 1) float64; `None` where x is the newest row.
        outs: (size,) float32, x, in memory that may be written over; of any content where x is the newest row.
            `None` where no memory is taken for it: then it lies
        sources: there; `None` for nothing.
    """

    newest: list[Tensor]
    products: list[Tensor] | None
    outs: list[Tensor | None]
    sources: list[ops.Vector | None]


@dataclass
class Combination:
    """`Gᵀc + s·x` for what one segment has of the model.

    Attributes:
        coefficients: c, (S, m), for each of the segment's systems.
        own: s, (S,) float64; 1.0 for x as it is, `None` for none of it.
        out, source: one of `Pushed.outs` and `Pushed.sources`.
        length: () float64, at least |x|; `None` for 0.
    """

    segment: Segment
    coefficients: Tensor
    own: Tensor | float | None
    out: Tensor | None
    source: ops.Vector | None = None
    length: Tensor | None = None

    def sum_(self) -> Tensor:
        """The vector itself, in `out`."""
        out = self.out = self._vector()
        if self.own is None:
            out.zero_()
        elif isinstance(self.own, Tensor):
            _scale_(out, self.own, self.segment)
        self.segment.window.combine(self.coefficients, out)
        return out

    def _vector(self) -> Tensor:
        """x in memory that may be written over."""
        if self.out is not None:
            return self.out
        if self.source is None:
            return ops.empty(self.segment.layout.size, self.segment.device)
        if self.source.flat is None:
            return self.segment.flat_gradient()
        x = self.source.flat.float()
        return x.mul_(self.source.factor) if x is not self.source.flat else x * self.source.factor

    def rows(self) -> ops.Rows:
        """What a kernel needs to sum it; for block-wise top-k rows and float32 coefficients."""
        window, own = self.segment.window, self.own
        own = own.float() if isinstance(own, Tensor) else own
        return ops.Rows(window.indices, window.values, window.scales, self.coefficients.contiguous(), own)

    def largest(self) -> Tensor:
        """() what s·x adds at most to any entry, in float64."""
        if self.own is None or self.length is None:
            return self.coefficients.new_zeros((), dtype=torch.float64)
        length = self.length.to(self.coefficients.device)
        if isinstance(self.own, Tensor):
            return length * self.own.abs().max() if len(self.own) else torch.zeros_like(length)
        return length


def _scale_(update: Tensor, weights: Tensor, segment: Segment) -> None:
    """`update *= weight`, with one weight or one for each parameter."""
    weights = weights.to(update.dtype)
    if len(weights) == 1:
        update.mul_(weights)
    elif len(weights):
        torch._foreach_mul_(segment.layout.split(update), list(weights.unbind()))
