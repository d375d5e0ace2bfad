"""The published S-M-FAC step, written plainly from the paper: what `bench_step.py` measures against.

Global top-k with error feedback, int64 indices, float32 values; inner products by one take; the factor and the
coefficient loop of M-FAC (arXiv 2107.03356, section 3.2, with the unpivoted LU taken from LAPACK's Cholesky, which
favours it); one `index_add_` per row of the window.
"""

from __future__ import annotations

import torch
from torch import Tensor


class PublishedMFAC:
    """`u = λ⁻¹x − Gᵀw`, x the newest row, over a flat copy of all gradients.

    Args:
        params: parameters on one device.
        lr, window, damping, density: as in `hf_efcp.optim.MFAC` with `selection="global"`.
    """

    def __init__(self, params: list[Tensor], lr: float, *, window: int, damping: float, density: float):
        self.params, self.lr, self.window, self.inverse_damping = params, lr, window, 1 / damping
        self.size = sum(p.numel() for p in params)
        self.k = int(density * self.size)
        new = {"device": params[0].device}
        self.residual = torch.zeros(self.size, **new)
        self.indices = torch.zeros(window, self.k, dtype=torch.int64, **new)
        self.values = torch.zeros(window, self.k, **new)
        self.gram = torch.zeros(window, window, **new)
        self.steps = 0

    def fill(self, generator: torch.Generator) -> None:
        """A full window of random rows, without the steps that would fill it; the generator is of the same device."""
        for row in range(self.window):
            drawn = torch.randint(self.size, (self.k,), generator=generator, device=self.indices.device)
            self.indices[row] = drawn.sort().values
        self.values.normal_(generator=generator)
        self.gram = self.values @ self.values.T
        self.steps = self.window

    @torch.no_grad()
    def step(self) -> None:
        row = self.steps % self.window
        gradient = torch.cat([p.grad.view(-1) for p in self.params])
        summed = self.residual + gradient
        chosen = summed.abs().topk(self.k).indices
        compressed = torch.zeros_like(summed)
        compressed[chosen] = summed[chosen]
        self.residual = summed - compressed
        self.indices[row], self.values[row] = chosen, summed[chosen]
        dots = (compressed.take(self.indices) * self.values).sum(1)
        self.gram[row], self.gram[:, row] = dots, dots
        update = compressed * self.inverse_damping
        for indices, values, weight in zip(self.indices, self.values, self._weights(dots), strict=True):
            update.index_add_(0, indices, values * -weight)
        start = 0
        for p in self.params:
            p.add_(update[start : start + p.numel()].view_as(p), alpha=-self.lr)
            start += p.numel()
        self.steps += 1

    def _weights(self, dots: Tensor) -> Tensor:
        m, scale = self.window, self.inverse_damping
        factor = torch.linalg.cholesky(torch.eye(m, device=dots.device) * m + scale * self.gram)
        diagonal = factor.diagonal()
        upper = diagonal[:, None] * factor.T  # the U of an unpivoted LU
        ratios = upper / diagonal.square()[:, None]
        coefficients = torch.eye(m, device=dots.device) * scale
        for i in range(1, m):
            coefficients[i, :i] = -(ratios[:i, i] @ coefficients[:i, :i])
        return ((coefficients @ dots) / diagonal.square()) @ coefficients

    def state_bytes(self) -> int:
        return sum(t.nbytes for t in (self.residual, self.indices, self.values, self.gram))
