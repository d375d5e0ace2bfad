"""Sparse momentum: how many weights grow in which layer, and what its momentum is of."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_efcp.sparsity import Sparsifier
from hf_efcp.sparsity.redistribution import momentum_sizes, redistributed


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 16), nn.Linear(16, 4))


@given(st.integers(0, 10_000))
def test_momentum_moves_weights_between_layers(seed):
    """As many grow as were removed, in proportion to the mean momentum, within 99 % of the room."""
    generator = torch.Generator().manual_seed(seed)
    kept = {f"l{i}": torch.rand(30 + 40 * i, generator=generator) < 0.4 for i in range(3)}
    momentum = {n: torch.rand(m.shape, generator=generator) * (i + 1) for i, (n, m) in enumerate(kept.items())}
    removed = {n: int(m.sum()) // 3 for n, m in kept.items()}
    sizes = momentum_sizes(kept, momentum)
    adding = redistributed(kept, removed, sizes)
    assert sum(adding.values()) == sum(removed.values())
    shares = {n: float(momentum[n][m].mean()) for n, m in kept.items()}
    assert sizes == pytest.approx(shares)
    free = {n: int((~m).sum()) for n, m in kept.items()}
    unbounded = {n: shares[n] / sum(shares.values()) * sum(removed.values()) for n in kept}
    for n in kept:
        assert adding[n] <= free[n]
        if all(unbounded[k] <= math.floor(0.99 * free[k]) for k in kept):
            assert abs(adding[n] - unbounded[n]) <= 1


def snfs_gradients(net):
    """Equal numbers in a layer, so that momentum has one size there: 1, 2 and 5."""
    return {f"{i}.weight": torch.full_like(net[i].weight, size) for i, size in enumerate((1.0, 2.0, 5.0))}


def test_snfs_weighs_layers_by_the_momentum_of_what_was_active():
    """v_l is taken before the pruning (arXiv 1907.04840, algorithm 1): here of weights of which the large ones stay."""
    net = model()
    made = Sparsifier(net, 0.7, "snfs", total_steps=100, interval=1)
    made.apply_()
    before = {n: m.clone() for n, m in made.masks.items()}
    gradients = snfs_gradients(net)
    # In the first layer the small weights, which go, have five times the momentum.
    small = net[0].weight.abs() <= net[0].weight[before["0.weight"]].abs().median()
    gradients["0.weight"] = torch.where(small, 5.0, 1.0)
    sizes = {n: float(g[before[n]].mean()) for n, g in gradients.items()}
    removed = {n: math.ceil(made.method.exchange_rate(1, made.last) * int(m.sum())) for n, m in before.items()}
    made.observe_(gradients)
    made.finish_step_()
    for name, mask in made.masks.items():
        gained = int(mask.sum()) - int(before[name].sum()) + removed[name]
        assert abs(gained - sum(removed.values()) * sizes[name] / sum(sizes.values())) <= 1


def test_momentum_is_of_gradients_without_their_scale():
    """A GradScaler's scale changes between steps; momentum must not mix gradients of several."""
    runs = []
    for scales in ((1, 1, 1), (1024, 2048, 512)):
        net = model()
        made = Sparsifier(net, 0.7, "snfs", total_steps=100, interval=50)
        for number, scale in enumerate(scales):
            gradients = {n: (number + 1) * scale * g for n, g in snfs_gradients(net).items()}
            made.observe_(gradients, scale)
        runs.append(made.state_dict()["momentum"])
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
