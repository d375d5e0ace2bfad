"""Steps in one or two passes of kernels, numba's and in Triton's interpreter, against those in plain torch."""

import importlib.util

import pytest
import torch
from torch import nn

from hf_efcp import create_optimizer
from hf_efcp.ops import backend

NAMES = [name for name in ("numba", "triton") if importlib.util.find_spec(name)]
if torch.cuda.is_available():  # Triton's interpreter is for machines without
    NAMES = NAMES[:1]
pytestmark = pytest.mark.skipif(not NAMES, reason="needs numba or triton: pip install hf-efcp[cpu]")

# Moments of 16 bits are rounded by a draw: a last bit that differs may send them to the other neighbour.
SMALL = {"window": 3, "block_size": 32, "density": 0.1, "moment_dtype": "float32"}
each_scaling = pytest.mark.parametrize("scaling", ["none", "rms", "layer_rms", "adam"])
one_launch_or_two = pytest.mark.parametrize("scaling", ["adam", "layer_rms"])


@pytest.fixture(params=NAMES)
def served(request):
    """The backend whose kernels are tested."""
    yield request.param
    backend.cpu_backend.cache_clear()


@pytest.fixture
def launches(served, monkeypatch):
    """Arguments of each call of the kernel that ends a step."""
    found, module = [], importlib.import_module(f"hf_efcp.ops.{served}_ops")
    kernel = module.combine_step_
    monkeypatch.setattr(module, "combine_step_", lambda *a, **k: (found.append(k), kernel(*a, **k)))
    return found


def serve_by(name, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, name)
    backend.cpu_backend.cache_clear()


class Model(nn.Module):
    """Two blocks of 32 in the first weight; one part that may have no gradient, one that is frozen."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.spare, self.frozen = nn.Linear(11, 4), nn.Linear(2, 1), nn.Linear(3, 1)
        self.to(dtype)
        self.frozen.requires_grad_(False)

    def draw_gradients(self, seed, spare=False):
        """Not those of a loss: these do not depend on the weights, whose last bits differ."""
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.grad = None
            if p.requires_grad and (spare or p not in set(self.spare.parameters())):
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def build(model, name="efcp_mfac", **options):
    """Two groups, as HF makes them, with rates of their own, and frozen parameters in both."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0, "lr": 3e-3},
    ]
    return create_optimizer(name, groups, lr=1e-2, **{**SMALL, **options})


def take(model, optimizer, steps, spare=(1,)):
    for step in steps:
        model.draw_gradients(step, spare=step in spare)
        optimizer.step()


def both(served, monkeypatch, dtype=torch.float32, steps=2, name="efcp_mfac", **options):
    """Model and optimizer after some steps, of torch and of the kernel."""
    pairs = []
    for name_of_backend in ("torch", served):
        serve_by(name_of_backend, monkeypatch)
        model = Model(dtype)
        optimizer = build(model, name, **options)
        take(model, optimizer, range(steps))
        pairs.append((model, optimizer))
    return pairs


def assert_same_runs(pairs):
    """Weights to rounding in float32. Of 16 bits at most a few: what lies at a draw's edge goes to either side."""
    theirs, ours = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model, _ in pairs)
    if theirs.dtype is torch.float32:
        torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=3e-8)
    else:
        torch.testing.assert_close(ours, theirs, rtol=3 * torch.finfo(theirs.dtype).eps, atol=1e-6)
        assert (ours != theirs).float().mean() <= 0.1
    for theirs, ours in zip(*(optimizer.state.values() for _, optimizer in pairs), strict=True):
        assert theirs.keys() == ours.keys()
        assert all(theirs[name].dtype is ours[name].dtype for name in theirs)


@each_scaling
@pytest.mark.parametrize(
    ("dtype", "precondition"),
    [(torch.float32, "gradient"), (torch.bfloat16, "compressed"), (torch.float16, "gradient")],
    ids=str,
)
def test_steps_are_those_of_torch(scaling, dtype, precondition, served, monkeypatch, launches):
    assert_same_runs(both(served, monkeypatch, dtype, scaling=scaling, precondition=precondition))
    serves = not (served == "numba" and dtype is torch.float16)  # which numba does not know
    assert len(launches) == serves * 2 * (2 if "rms" in scaling else 1)


@pytest.mark.parametrize(
    "options",
    [
        {"weight_rounding": "nearest"},
        {"precondition": "momentum"},
        {"precondition": "momentum", "scaling": "layer_rms"},
        {"precondition": "momentum", "cautious": True},
        {"scaling": "layer_rms", "cautious": True},
        {"moment_dtype": "bfloat16", "value_dtype": "bfloat16", "residual_dtype": "bfloat16"},
    ],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()),
)
def test_every_format_and_system_has_the_steps_of_torch(options, served, monkeypatch, launches):
    assert_same_runs(both(served, monkeypatch, torch.bfloat16, **options))
    assert launches


@pytest.mark.parametrize(
    "options",
    [{"beta1": 0.5}, {"scaling": "none", "beta2": 0.9, "precondition": "compressed"}],
)
def test_ggt_has_the_steps_of_torch(options, served, monkeypatch, launches):
    assert_same_runs(both(served, monkeypatch, name="efcp_ggt", **options))
    assert len(launches) == 2


def test_what_has_no_gradient_or_is_frozen_stays(served, monkeypatch, launches):
    serve_by(served, monkeypatch)
    model = Model()
    optimizer = build(model)
    before = [p.detach().clone() for p in (*model.spare.parameters(), *model.frozen.parameters())]
    take(model, optimizer, [0, 2])
    assert len(launches) == 2
    for old, p in zip(before, (*model.spare.parameters(), *model.frozen.parameters()), strict=True):
        assert torch.equal(old, p)


@one_launch_or_two
def test_a_nan_leaves_no_trace(scaling, served, monkeypatch, launches):
    serve_by(served, monkeypatch)
    model = Model()
    optimizer = build(model, scaling=scaling)
    monkeypatch.setattr(type(optimizer), "_reads", lambda self, flag: False)  # as on a device: masks do the work
    take(model, optimizer, [0])
    weights = [p.detach().clone() for p in model.parameters()]
    state = [{n: t.clone() for n, t in s.items() if n != "skipped"} for s in optimizer.state.values()]
    model.used.weight.grad[0, 0] = torch.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(old, p) for old, p in zip(weights, model.parameters(), strict=True))
    for old, new in zip(state, optimizer.state.values(), strict=True):
        assert all(torch.equal(value, new[name]) for name, value in old.items())
    take(model, optimizer, [1])
    assert not torch.equal(weights[0], model.used.weight)


def test_an_update_that_overflows_is_left_out_as_with_torch(served, monkeypatch, launches):
    """x/λ is no float32 for λ = 1e-40."""
    pairs = both(served, monkeypatch, steps=2, scaling="none", damping_mode="absolute", damping=1e-40)
    assert [optimizer.skipped_steps for _, optimizer in pairs] == [2, 2]
    for model, _ in pairs:
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), Model().parameters(), strict=True))


@one_launch_or_two
def test_recording_changes_no_bit_and_reads_what_torch_reads(scaling, served, monkeypatch, launches):
    figures, weights = [], []
    for name, records in (("torch", True), (served, True), (served, False)):
        serve_by(name, monkeypatch)
        model = Model()
        optimizer = build(model, scaling=scaling)
        optimizer.record_metrics = records
        take(model, optimizer, range(2))
        figures.append({**optimizer.metrics(), **optimizer.diagnostics()})
        weights.append([p.detach() for p in model.parameters()])
    assert figures[0].keys() == figures[1].keys()
    for name, value in figures[0].items():
        assert figures[1][name] == pytest.approx(value, rel=1e-4), name
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*weights[1:], strict=True))


def test_weights_that_move_are_found_again(served, monkeypatch, launches):
    """As an average that is swapped in, or `model.to`, moves them."""
    pairs = []
    for moves in (False, True):
        serve_by(served, monkeypatch)
        model = Model()
        optimizer = build(model)
        take(model, optimizer, [0])
        if moves:
            for p in model.parameters():
                p.data = p.data.clone()
        take(model, optimizer, [1, 2])
        pairs.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*pairs, strict=True))


def test_strided_gradients_of_a_cautious_step_take_torchs(served, monkeypatch, launches):
    """Kernels read a gradient by its address."""
    pairs = []
    for name in ("torch", served):
        serve_by(name, monkeypatch)
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(5, 7))
        optimizer = create_optimizer("efcp_mfac", [weight], lr=0.1, cautious=True, **SMALL)
        for seed in range(3):
            weight.grad = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed)).t()
            optimizer.step()
        pairs.append(weight.detach())
    assert not launches
    torch.testing.assert_close(*pairs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("change", [lambda p: p.double(), lambda p: p.t().contiguous().t()], ids=["float64", "strided"])
def test_weights_that_no_kernel_writes_take_torchs_steps(change, served, monkeypatch, launches):
    pairs = []
    for name in ("torch", served):
        serve_by(name, monkeypatch)
        torch.manual_seed(0)
        weight = nn.Parameter(change(torch.randn(5, 7)))
        optimizer = create_optimizer("efcp_mfac", [weight], lr=0.1, **SMALL)
        for _ in range(2):
            weight.grad = change(torch.linspace(-1, 2, 35).view(5, 7))
            optimizer.step()
        pairs.append(weight.detach())
    assert not launches
    torch.testing.assert_close(*pairs, rtol=1e-6, atol=1e-7)
