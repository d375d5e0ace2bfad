"""Cautious steps: against what an optimizer without them would have moved, entry by entry."""

import pytest
import torch

from hf_efcp.ops import backend, cautious
from hf_efcp.optim import GGT, MFAC, SketchyShampoo

STEPS = 7
SHAPES = [(5,), (4, 6), (30, 3)]  # the last has an axis above `max_dim`, of whose rows most have no gradient


def gradients(seed=0):
    """Steps of gradients that turn round again and again; of the last tensor two rows a step, others exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        found = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
        rows = torch.zeros(30, 1, dtype=torch.float64)
        rows[[step, (3 * step + 1) % 30]] = 1
        found[2] *= rows
        yield found


def moves(new, dtype=torch.float64, **options):
    """What each step adds to weights; the gradients do not depend on them."""
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    optimizer = new(params, lr=0.1, **options)
    for found in gradients():
        before = [p.detach().clone() for p in params]
        for p, g in zip(params, found, strict=True):
            p.grad = g.to(dtype, copy=True)
        optimizer.step()
        yield [p.detach() - old for p, old in zip(params, before, strict=True)]


def assert_cautious(plain, ours, tolerance):
    """A step of `ours` has no entry of `plain` that goes up its gradient, and others √2 times."""
    held = 0
    for found, usual, changed in zip(gradients(), plain, ours, strict=True):
        for g, d, c in zip(found, usual, changed, strict=True):
            against = d.double() * g
            factor = torch.ones_like(against).masked_fill(against < 0, 2**0.5).masked_fill(against > 0, 0)
            torch.testing.assert_close(c.double(), factor * d, rtol=tolerance, atol=tolerance)
            held += int((against > 0).sum())
    assert held > 0  # without momentum it is the preconditioner that turns signs


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    "options",
    [{}, {"nesterov": False}, {"ema": True}, {"ema": True, "nesterov": False, "scaling": "adafactor"}],
    ids=str,
)
def test_cautious_step_of_shampoo(options, momentum):
    """Entries that go up their gradient stay, others move √2 times as far; the averages know nothing of it."""
    options = {"momentum": momentum, "max_dim": 16, **options}
    assert_cautious(moves(SketchyShampoo, **options), moves(SketchyShampoo, cautious=True, **options), 1e-12)


@pytest.mark.parametrize("new", [MFAC, GGT])
@pytest.mark.parametrize(
    "options",
    [
        {"precondition": "momentum"},
        {"scaling": "layer_rms", "density": 0.5, "block_size": 8},
        {"scaling": "none", "compression": "none"},
        {"compression": "lowrank", "rank": 2},
    ],
    ids=str,
)
def test_cautious_step_over_a_window(new, options, monkeypatch):
    """In torch; `test_fused_step` has the kernels' steps against these."""
    monkeypatch.setenv(backend.VARIABLE, "torch")
    backend.cpu_backend.cache_clear()
    options = {"window": 4, "dtype": torch.float32, **options}
    try:
        assert_cautious(moves(new, **options), moves(new, cautious=True, **options), 2e-6)
    finally:
        backend.cpu_backend.cache_clear()


def test_decay_is_no_part_of_it():
    """Weight decay moves what a cautious step leaves."""
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = SketchyShampoo([p], lr=0.1, cautious=True, momentum=0.9, nesterov=False, weight_decay=0.5)
    for gradient in ([4.0, 4.0], [0.1, -0.1]):
        before = p.detach().clone()
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    decayed = before * (1 - 0.1 * 0.5)
    assert p[0] < decayed[0]
    assert p[1] == decayed[1]


def test_small_entries_do_not_underflow():
    """Signs are compared: a product of 1e-30 and 1e-30 is 0 in float32."""
    step, gradient = torch.full((3,), 1e-30), torch.tensor([1e-30, -1e-30, 0.0])
    torch.testing.assert_close(cautious(step, gradient) / 1e-30, torch.tensor([2**0.5, 0.0, 1.0]))
