"""SINGD of linear layers in float64, written from the paper's equations: dense matrices, one row at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def moments(inputs: Tensor, gradients: Tensor, n_loss: float) -> tuple[Tensor, Tensor]:
    """U, the mean of aaᵀ, and V = N Σ ggᵀ, over rows of the last axis."""
    inputs, gradients = inputs.flatten(0, -2), gradients.flatten(0, -2)
    u = sum(torch.outer(a, a) for a in inputs) / len(inputs)
    v = n_loss * sum(torch.outer(g, g) for g in gradients)
    return u, v


class DenseLayer:
    """K, C, their momenta and the heavy ball of one weight."""

    def __init__(self, d_i: int, d_o: int, *, damping, alpha1, momentum, lr_cov, is_kfac=False, normalizes=False):
        self.k, self.c = torch.eye(d_i, dtype=torch.float64), torch.eye(d_o, dtype=torch.float64)
        self.m_k, self.m_c = torch.zeros_like(self.k), torch.zeros_like(self.c)
        self.buffer = torch.zeros(d_o, d_i, dtype=torch.float64)
        self.damping, self.alpha1, self.momentum, self.lr_cov = damping, alpha1, momentum, lr_cov
        self.is_kfac, self.normalizes = is_kfac, normalizes

    def update(self, u: Tensor, v: Tensor) -> None:
        """One update of both factors."""
        k, c, alpha1 = self.k, self.c, 0.0 if self.is_kfac else self.alpha1
        d_i, d_o = len(k), len(c)
        h_k, h_c, kk, cc = k.T @ u @ k, c.T @ v @ c, k.T @ k, c.T @ c
        ones = torch.ones((), dtype=torch.float64)
        t_hk, t_hc, t_kk, t_cc = (
            [ones] * 4 if self.is_kfac else [h_k.trace() / d_i, h_c.trace() / d_o, kk.trace() / d_i, cc.trace() / d_o]
        )
        half = 0.5 * (1 - alpha1) if self.normalizes else 0.5
        n_k = half * (t_hc * h_k + self.damping * t_cc * kk - torch.eye(d_i, dtype=torch.float64))
        n_c = half * (t_hk * h_c + self.damping * t_kk * cc - torch.eye(d_o, dtype=torch.float64))
        self.m_k, self.m_c = alpha1 * self.m_k + n_k, alpha1 * self.m_c + n_c
        steps = [self.lr_cov / (max(1.0, float(m.abs().max())) if self.normalizes else 1) for m in (self.m_k, self.m_c)]
        self.k, self.c = k - steps[0] * k @ self.m_k, c - steps[1] * c @ self.m_c

    def step(self, gradient: Tensor) -> Tensor:
        """The heavy ball of the preconditioned gradient."""
        self.buffer = self.momentum * self.buffer + self.c @ self.c.T @ gradient @ self.k @ self.k.T
        return self.buffer
