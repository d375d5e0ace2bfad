"""AGENT's coefficient and the variance that a correction removes, against formulas in float64."""

import math

import numpy as np
import pytest
import torch

from hf_efcp.sparsity import AgentCoefficient, CorrectionOptions, GradientCorrection, VarianceProbe
from hf_efcp.sparsity.coefficient import linear_decay


def pair(seed, n=50):
    generator = np.random.default_rng(seed)
    old = 2.3 + 0.2 * generator.standard_normal(n)
    return 0.7 * old + 0.05 * generator.standard_normal(n), old


def test_the_average_is_the_papers():
    """c = γτ, τ ← (1 − α)τ + α·Cov(a, o)/Var(o), with one degree of freedom less, over several passes."""
    coefficient, tau = AgentCoefficient(gamma=0.1, smoothing=0.3, initial=0.1, clip=None), 0.1
    for seed in range(5):
        now, old = pair(seed)
        tau = 0.7 * tau + 0.3 * np.cov(now, old, ddof=1)[0, 1] / np.var(old, ddof=1)
        assert coefficient.update(now.tolist(), torch.tensor(old)) == pytest.approx(0.1 * tau, rel=1e-12)
    assert coefficient.value == pytest.approx(0.1 * tau, rel=1e-12)


@pytest.mark.parametrize(("slope", "taken"), [(-8.0, 0.0), (0.4, 0.4), (1.7, 1.0)])
def test_slopes_are_clipped_before_they_are_averaged(slope, taken):
    """A pass right after the first epoch is often far below 0; it must not pull later ones there."""
    old = torch.linspace(1, 2, 20, dtype=torch.float64)
    coefficient = AgentCoefficient(gamma=1.0, smoothing=0.5, initial=0.2)
    assert coefficient.update(slope * old, old) == pytest.approx(0.5 * 0.2 + 0.5 * taken, rel=1e-12)
    assert coefficient.newest == pytest.approx(slope, rel=1e-9)
    unclipped = AgentCoefficient(gamma=1.0, smoothing=0.5, initial=0.2, clip=None)
    assert unclipped.update(slope * old, old) == pytest.approx(0.5 * 0.2 + 0.5 * slope, rel=1e-9)


@pytest.mark.parametrize(
    ("now", "old"),
    [
        ([1.0], [1.0]),
        ([], []),
        ([1.0, 2.0], [3.0, 3.0]),
        ([1.0, 2.0, 3.0], [2.3, 2.3, 2.3]),
        ([1.0, 2.0], [1.0, math.nan]),
        ([math.inf, 2.0], [1.0, 2.0]),
        ([math.nan, 2.0], [1.0, 2.0]),
    ],
)
def test_passes_without_a_slope_change_nothing(now, old):
    """One batch, no variance, or what is not a number: published, a NaN stays in the average for good."""
    coefficient = AgentCoefficient(gamma=0.1, smoothing=0.3, initial=0.1, clip=(0, 1))
    assert coefficient.update(now, old) == pytest.approx(0.01)
    assert coefficient.newest is None
    now, old = pair(0)
    assert coefficient.update(now, old) > 0.01


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"smoothing": 1.5}, "`smoothing` must be in"),
        ({"gamma": math.nan}, "`gamma` must be finite"),
        ({"smoothing": math.nan}, "`smoothing` must be finite"),
        ({"clip": (1, 0)}, "`clip` must be"),
        ({"clip": 0.5}, "`clip` must be"),
        ({"clip": (0, 1, 2)}, "`clip` must be"),
        ({"clip": (math.nan, 1)}, "`clip` must be"),
    ],
)
def test_wrong_numbers_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        AgentCoefficient(**given)


@pytest.mark.parametrize("name", ["gamma", "smoothing", "initial"])
def test_words_are_no_numbers(name):
    with pytest.raises(TypeError, match=f"`{name}` must be a number, got 'much'"):
        AgentCoefficient(**{name: "much"})


def test_the_correlation_of_the_losses_is_told():
    now, old = pair(3)
    coefficient = AgentCoefficient()
    coefficient.update(now, old)
    assert coefficient.correlation == pytest.approx(np.corrcoef(now, old)[0, 1], rel=1e-12)
    again = AgentCoefficient()
    again.load_state_dict(coefficient.state_dict())
    assert again.correlation == coefficient.correlation
    coefficient.update([1.0], [1.0])
    assert coefficient.correlation is None


def test_losses_must_be_as_many():
    with pytest.raises(ValueError, match="got 2 and 1"):
        AgentCoefficient().update([1.0], [1.0, 2.0])


def test_linear_decay_ends_at_zero():
    assert [linear_decay(0.5, x) for x in (0, 0.5, 1, 2)] == [0.5, 0.25, 0, 0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coefficient": "los"}, "`coefficient` must be one of loss, grad, fixed, linear"),
        ({"refresh": 0}, "`refresh` must be `epoch` or"),
        ({"refresh": "step"}, "`refresh` must be `epoch` or"),
        ({"full_grad_batches": 0}, "`full_grad_batches` must be at least 1"),
        ({"measure_every": 0}, "`measure_every`"),
        ({"value": math.inf}, "`value`"),
        ({"smoothing": -1}, "`smoothing`"),
    ],
)
def test_wrong_options_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        CorrectionOptions(**given)


def gradients(seed=0, batches=30, size=40):
    """Gradients at θ and at θ̃ that share most of their noise; float64, (batches, size) each."""
    generator = torch.Generator().manual_seed(seed)
    shared, own, other = (torch.randn(batches, size, generator=generator, dtype=torch.float64) for _ in range(3))
    return 0.3 + 0.8 * shared + 0.3 * own, 0.1 + shared + 0.2 * other


@pytest.mark.parametrize("c", [0.0, 0.1, 0.7, 1.0, -0.5])
def test_the_probe_is_the_variance_of_the_corrected_gradient(c):
    now, old = gradients()
    probe = VarianceProbe()
    for g, back in zip(now, old, strict=True):
        probe.add({"a": g[:10], "b": g[10:]}, {"a": back[:10], "b": back[10:]})
    corrected = now + c * (old.mean(0) - old)
    trace = corrected.var(0, unbiased=False).sum() / now.var(0, unbiased=False).sum()
    assert probe.ratio(c) == pytest.approx(float(trace), rel=1e-10)
    covariance = ((now - now.mean(0)) * (old - old.mean(0))).mean(0).sum()
    assert probe.best() == pytest.approx(float(covariance / old.var(0, unbiased=False).sum()), rel=1e-10)
    assert probe.ratio(probe.best()) <= probe.ratio(c) + 1e-12


def test_inner_products_find_the_best_coefficient():
    """`coefficient=grad`: over a whole epoch the running slope is tr Cov(g, g̃)/tr Var(g̃) around u."""
    now, old = gradients(batches=2000)
    model = torch.nn.Linear(40, 1, bias=False).double()
    core = GradientCorrection(model, CorrectionOptions("grad", smoothing=0.02, clip=None))
    core.refresh_(0, {"weight": old.mean(0, keepdim=True)}, torch.zeros(1), torch.zeros(1))
    for g, back in zip(now, old, strict=True):
        core.measure_({"weight": 8 * g[None]}, {"weight": 8 * back[None]}, 8.0, {})
    best = float(((now - now.mean(0)) * (old - old.mean(0))).mean(0).sum() / old.var(0, unbiased=False).sum())
    assert core.coefficient() == pytest.approx(best, rel=0.03)


def test_masked_entries_do_not_count():
    now, old = gradients()
    mask = torch.arange(40) < 5
    kept = []
    for columns, masks in ((slice(None), {"weight": mask[None]}), (slice(0, 5), {})):
        core = GradientCorrection(torch.nn.Linear(1, 1), CorrectionOptions("grad"))
        core.full_gradient = {"weight": old.mean(0, keepdim=True)[:, columns]}
        core.measure_({"weight": now[:1, columns]}, {"weight": old[:1, columns]}, 1.0, masks)
        kept.append(core.coefficient())
    assert kept[0] == pytest.approx(kept[1], rel=1e-12)
    assert kept[0] != 0


@pytest.mark.parametrize("side", ["now", "old"])
def test_a_gradient_on_one_side_alone_is_zero_on_the_other(side):
    """An expert that no token of a batch was sent to, at θ or at θ̃: d = g + c(u − g̃) all the same."""
    model = torch.nn.Linear(4, 1, bias=False).double()
    core = GradientCorrection(model, CorrectionOptions())
    g, full = torch.randn(2, 1, 4, dtype=torch.float64)
    core.full_gradient = {"weight": full}
    now, old = ({"weight": g}, {}) if side == "now" else ({}, {"weight": g})
    core.combine_(now, old, 0.3, 2.0)
    expected = g + 0.3 * 2 * full if side == "now" else 0.3 * (2 * full - g)
    torch.testing.assert_close(model.weight.grad, expected, rtol=0, atol=1e-15)


class Counting(torch.nn.Module):
    """A module that replaces its buffers instead of changing them, one of which begins as none."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", None)

    def forward(self, x):
        self.calls = self.calls + 1
        self.last = x.detach().clone()
        return x * self.weight


def test_swapping_puts_replaced_buffers_back():
    model = Counting()
    core = GradientCorrection(model, CorrectionOptions())
    core.take_snapshot_(0)
    calls = model.calls
    with core.swapped():
        model(torch.ones(2))
        assert model.calls == 1
    assert model.calls is calls
    assert calls == 0
    assert model.last is None


def test_a_callers_autocast_sees_the_swapped_weights():
    """It keeps the weights that it cast, by their tensor, and would serve them for the swapped ones."""
    model = torch.nn.Linear(3, 3, bias=False)
    core = GradientCorrection(model, CorrectionOptions())
    core.take_snapshot_(0)
    with torch.no_grad():
        model.weight.mul_(-2)
    x = torch.ones(1, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        now = model(x)
        with core.swapped():
            old = model(x)
        again = model(x)
    torch.testing.assert_close(now, -2 * old)
    assert torch.equal(now, again)


def test_swapping_puts_everything_back_after_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    core = GradientCorrection(model, CorrectionOptions())
    core.take_snapshot_(0)
    snapshot = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    storage = model[0].weight.data_ptr()

    def fail():
        with core.swapped():
            assert torch.equal(model[0].weight, snapshot)
            model(torch.randn(4, 3))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[0].weight.data_ptr() == storage


def dead_channel():
    """A layer before a batch norm whose first channel is 0 at the snapshot and has grown since; data; its core."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3, bias=False), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight[0] = 0
    cores = [GradientCorrection(model, CorrectionOptions(correct_grown=grown), ["0.weight"]) for grown in (True, False)]
    for core in cores:
        core.take_snapshot_(0)
    with torch.no_grad():
        model[0].weight[0] = torch.randn(5)
    return model, torch.randn(16, 5), cores


def test_weights_that_were_zero_may_be_spared():
    """Behind a norm their gradients at the snapshot are some 1/√eps times too large; others are the same to the bit."""
    model, x, cores = dead_channel()
    gradients = []
    for core in cores:
        with core.swapped():
            gradients.append(torch.autograd.grad(model(x).square().sum(), list(core.parameters.values())))
    corrected, spared = (dict(zip(cores[0].parameters, g, strict=True)) for g in gradients)
    live = torch.autograd.grad(model(x).square().sum(), model[0].weight)[0]
    assert corrected["0.weight"][0].norm() > 30 * live[0].norm()
    assert not spared["0.weight"][0].any()
    assert torch.equal(spared["0.weight"][1:], corrected["0.weight"][1:])
    assert all(torch.equal(spared[name], corrected[name]) for name in spared if name != "0.weight")


def test_spared_weights_have_no_full_gradient_either():
    """So `u − g̃` is 0 there, and the gradient is the plain one; no hook stays behind."""
    model, x, (_, core) = dead_channel()
    with torch.no_grad():
        model[0].weight[0] = 0
    core.refresh_(1, {n: torch.ones_like(p) for n, p in core.parameters.items()}, torch.ones(2), torch.ones(2))
    assert not core.full_gradient["0.weight"][0].any()
    assert all(bool(full[-1].all()) for full in core.full_gradient.values())
    with core.swapped():
        pass
    model(x).sum().backward()
    assert model[0].weight.grad[0].any()


def test_whether_grown_weights_are_corrected_is_true_or_false():
    with pytest.raises(TypeError, match="`correct_grown` must be true or false, got 'no'"):
        CorrectionOptions(correct_grown="no")
