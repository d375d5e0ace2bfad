"""Symmetric products, and dense matrices of which MMᵀ alone is stored."""

import pytest
import torch

from hf_efcp.curvature.structures import DenseMetric
from hf_efcp.curvature.structures.dense import symmetric_product


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("d", [40, 192, 193, 256, 301, 769])
def test_symmetric_products_are_mirrored(d):
    a = random(5, d)
    torch.testing.assert_close(symmetric_product(a, a), a.T @ a)
    b = random(d, d) / d
    torch.testing.assert_close(symmetric_product(b.T @ b, b.T @ b), b.T @ b @ b.T @ b)


@pytest.mark.parametrize("limits", [False, True])
def test_metric_moves_as_the_factor_does(limits):
    """`M ← M(I − βm)`, `m = ½(MᵀWM − I)`, β divided by max(1, ρ(m))."""
    m, a = random(6, 6), random(9, 6)
    u = a.T @ a
    w = 10 * u + 0.2 * torch.eye(6, dtype=torch.float64)
    direction = (m.T @ w @ m - torch.eye(6, dtype=torch.float64)) / 2
    beta = 0.3 / torch.linalg.eigvalsh(direction).abs().max() if limits else 0.3
    moved = m - beta * m @ direction
    structure = DenseMetric(6)
    p = structure.moved((m @ m.T).flatten(), u.flatten(), 10.0, 0.2, lr_cov=0.3, limits=limits).view(6, 6)
    slack = 1e-3 * p.abs().max().item() if limits else 1e-9  # ρ by power iterations
    torch.testing.assert_close(p, moved @ moved.T, rtol=1e-9, atol=slack)
    torch.testing.assert_close(structure.mean_square(p.flatten()), p.trace() / 6)
