"""A preconditioned gradient before it is summed: `Gᵀc + s·x`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_efcp import ops
from hf_efcp.optim.segment import Segment


@dataclass
class Combination:
    """`Gᵀc + s·x` for what one segment has of the model.

    Attributes:
        coefficients: c, (S, m), for each of the segment's systems.
        own: s, (S,) float64; 1.0 for x as it is, `None` for none of it.
        out: (size,) float32, x, in memory that may be written over.
    """

    segment: Segment
    coefficients: Tensor
    own: Tensor | float | None
    out: Tensor

    def sum_(self) -> Tensor:
        """The vector itself, in `out`."""
        if self.own is None:
            self.out.zero_()
        elif isinstance(self.own, Tensor):
            _scale_(self.out, self.own, self.segment)
        self.segment.window.combine(self.coefficients, self.out)
        return self.out

    def rows(self) -> ops.Rows:
        """What a kernel needs to sum it; for block-wise top-k rows and float32 coefficients."""
        window, own = self.segment.window, self.own
        own = own.float() if isinstance(own, Tensor) else own
        return ops.Rows(window.indices, window.values, window.scales, self.coefficients.contiguous(), own)

    def largest(self) -> Tensor:
        """() what s·x adds at most to any entry, in float64."""
        if self.own is None or not len(self.out):
            return self.coefficients.new_zeros((), dtype=torch.float64)
        x = torch.linalg.vector_norm(self.out, torch.inf).double()
        return x * self.own.abs().max() if isinstance(self.own, Tensor) else x


def _scale_(update: Tensor, weights: Tensor, segment: Segment) -> None:
    """`update *= weight`, with one weight or one for each parameter."""
    weights = weights.to(update.dtype)
    if len(weights) == 1:
        update.mul_(weights)
    elif len(weights):
        torch._foreach_mul_(segment.layout.split(update), list(weights.unbind()))
