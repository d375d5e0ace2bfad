"""LR-M-FAC and LR-GGT over whole runs, against float64 references that form every row."""

import math

import oracles
import pytest
import torch

from hf_efcp.optim import GGT, MFAC

SHAPES = [torch.Size(shape) for shape in ((12, 9), (31,), (4, 5, 3), (1,), (6, 2))]
NUMELS = [math.prod(shape) for shape in SHAPES]
FACTORED = [0, 2]  # at rank 2; the factors of the last would be larger than the matrix
WINDOW, RANK, STEPS = 8, 2, 40
PLAIN = {"window": WINDOW, "rank": RANK, "compression": "lowrank", "scaling": "none", "momentum": 0.0}


def gradients(steps=STEPS, noise=0.5):
    """[step][parameter], with a common part."""
    generator = torch.Generator().manual_seed(0)
    common = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [[0.1 * (c + noise * torch.randn(c.shape, generator=generator)) for c in common] for _ in range(steps)]


def updates_of(cls, steps, **options):
    """What each step subtracts at lr 1, and where the power iteration of each parameter started."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer = cls(params, lr=1.0, **{**PLAIN, **options})
    optimizer.materialize_state()
    starts = [optimizer.state[p]["right"][:, -1].clone() if "right" in optimizer.state[p] else None for p in params]
    updates = []
    for step in steps:
        for p, gradient in zip(params, step, strict=True):
            p.data.zero_()
            p.grad = gradient.clone()
        optimizer.step()
        updates.append(-torch.cat([p.detach().double().flatten() for p in params]))
    return updates, starts


def errors(ours, reference):
    return torch.stack([(u - r).norm() / r.norm() for u, r in zip(ours, reference, strict=True)])


def assert_follows(ours, steps, run):
    """Every update is that of `run` over the gradients, as exactly as the rule allows.

    A power iteration that starts from its last result under error feedback amplifies what it is given: rounding the
    gradients to float32 moves the float64 reference by 1e-7 at first and by 1e-4 to 1e-3 after 40 steps. The
    reference's own response to such rounding is what the float32 run is measured by.
    """
    generator = torch.Generator().manual_seed(9)
    rounded = [[g * (1 + 1e-7 * torch.randn(g.shape, generator=generator).double()) for g in step] for step in steps]
    reference = run(steps)
    found, own = errors(ours, reference), errors(run(rounded), reference).cummax(0).values
    assert found[:8].max() <= 1e-5
    assert (found <= 30 * own).all(), found / own
    assert 30 * own.max() <= 0.1  # else nothing would be shown


@pytest.mark.parametrize("precondition", ["compressed", "gradient"])
@pytest.mark.parametrize("damping", [1e-1, 1e-4])
def test_forty_steps_of_mfac_follow_the_reference(precondition, damping):
    """The ring wraps, residuals come back, and each basis starts from the last."""
    steps = gradients()
    options = {"damping": damping, "damping_mode": "absolute", "precondition": precondition}
    ours, starts = updates_of(MFAC, steps, **options)
    assert [i for i, start in enumerate(starts) if start is not None] == FACTORED

    def run(steps):
        compress = oracles.power_iteration(SHAPES, starts)
        return oracles.mfac(steps, window=WINDOW, damping=damping, compress=compress, precondition=precondition)

    assert_follows(ours, steps, run)


def test_one_system_for_each_layer_is_a_run_of_each_layer():
    """Block-diagonal curvature: each parameter's update is that of a model of its own."""
    steps = gradients()
    options = {"damping": 1e-2, "damping_mode": "absolute", "precondition": "compressed", "system": "layer"}
    ours, starts = updates_of(MFAC, steps, **options)
    for i, shape in enumerate(SHAPES):

        def run(steps, shape=shape, start=starts[i]):
            compress = oracles.power_iteration([shape], [start])
            return oracles.mfac(steps, window=WINDOW, damping=1e-2, compress=compress)

        assert_follows([update.split(NUMELS)[i] for update in ours], [[step[i]] for step in steps], run)


def test_forty_steps_of_ggt_follow_the_reference():
    steps, eps = gradients(), 0.1
    ours, starts = updates_of(GGT, steps, eps=eps, eps_mode="absolute", precondition="compressed")

    def run(steps):
        ring = oracles.Ring(NUMELS, WINDOW, oracles.power_iteration(SHAPES, starts))
        rows = [(ring.push(step)[0], ring.rows.clone()) for step in steps]
        return [oracles.ggt(window, row, eps) for row, window in rows]

    assert_follows(ours, steps, run)


@pytest.mark.parametrize("cls", [MFAC, GGT])
def test_full_rank_is_dense(cls):
    steps = gradients(20)
    full, _ = updates_of(cls, steps, rank=12, precondition="compressed")
    dense, _ = updates_of(cls, steps, compression="none", precondition="compressed")
    assert errors(full, dense).max() <= 1e-5


def test_two_dimensions_of_a_tensor_are_its_first_and_the_rest():
    """A gradient that has the rank of the factors in that view is kept whole."""
    generator = torch.Generator().manual_seed(1)
    outer = (torch.randn(4, 2, generator=generator) @ torch.randn(2, 15, generator=generator)).view(4, 5, 3)
    parameter = torch.nn.Parameter(torch.zeros(4, 5, 3))
    optimizer = MFAC([parameter], lr=1.0, **PLAIN)
    parameter.grad = outer.clone()
    optimizer.step()
    state = optimizer.state[parameter]
    row = (state["left"][:, 0] @ state["right"][:, 0].T).view(4, 5, 3)
    torch.testing.assert_close(row, outer, rtol=1e-5, atol=1e-5)
    assert state["residual"].abs().max() <= 1e-5
