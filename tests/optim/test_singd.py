"""SINGD against the paper's equations in float64, and the identities that follow from them."""

import contextlib
import copy

import pytest
import torch
from oracle_singd import DenseLayer, moments
from torch import nn

from hf_efcp.optim import singd_batches
from hf_efcp.optim.singd import SINGD
from hf_efcp.optim.singd_state import FactorPair

PLAIN = {"lr": 0.05, "T": 2, "lr_cov": 0.2, "damping": 0.1, "momentum": 0.9}


class Deep(nn.Module):
    """Two layers, the first with a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3, bias=False)
        self.double()

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def batch(step, n=6, tokens=()):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(n, *tokens, d, generator=generator, dtype=torch.float64) for d in (5, 3)]


def loss_of(model, x, y):
    return (model(x) - y).square().sum(-1).mean()


def train(model, optimizer, steps, **sizes):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, *batch(step, **sizes)).backward()
        optimizer.step()


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("tokens", [(), (4,)], ids=["vectors", "tokens"])
@pytest.mark.parametrize(
    "options",
    [
        {"alpha1": 0.5},
        {"alpha1": 0.0, "momentum": 0.0},
        {"kfac_like": True},
        {"normalize_lr_cov": True, "lr_cov": 0.8},
        {"loss_average": None},
        {"loss_average": "batch+sequence"},
    ],
    ids=str,
)
def test_ten_steps_are_the_papers(options, tokens):
    options = {**PLAIN, "alpha1": 0.5, "loss_average": "batch", **options}
    model = Deep()
    twin = copy.deepcopy(model)
    optimizer = SINGD(model, **options)
    rules = {"damping": options["damping"], "alpha1": options["alpha1"], "momentum": options["momentum"]}
    rules |= {"lr_cov": options["lr_cov"], "is_kfac": options.get("kfac_like", False)}
    rules |= {"normalizes": options.get("normalize_lr_cov", False)}
    layers = {twin.first: DenseLayer(6, 7, **rules), twin.second: DenseLayer(7, 3, **rules)}
    for step in range(10):
        x, y = batch(step, tokens=tokens)
        n_loss = {"batch": len(x), "batch+sequence": x.shape[:-1].numel(), None: 1}[options["loss_average"]]
        twin.zero_grad()
        z = twin.first(x)
        hidden = torch.tanh(z)
        out = twin.second(hidden)
        z.retain_grad()
        out.retain_grad()
        (out - y).square().sum(-1).mean().backward()
        ones = torch.ones(*x.shape[:-1], 1, dtype=torch.float64)
        rows = {twin.first: (torch.cat([x, ones], -1), z.grad), twin.second: (hidden.detach(), out.grad)}
        for module, layer in layers.items():
            if step % 2 == 0:
                layer.update(*moments(*rows[module], n_loss))
            grad = module.weight.grad
            if module.bias is not None:
                grad = torch.cat([grad, module.bias.grad[:, None]], 1)
            move = layer.step(grad)
            with torch.no_grad():
                module.weight -= 0.05 * move[:, : module.weight.shape[1]]
                if module.bias is not None:
                    module.bias -= 0.05 * move[:, -1]
        train(model, optimizer, [step], tokens=tokens)
        torch.testing.assert_close(parameters(model), parameters(twin), rtol=1e-10, atol=1e-12)


def fixed(kfac_like, updates=4000, **options):
    """A layer's KKᵀ and CCᵀ after many updates with the same statistics, and its U and V."""
    torch.manual_seed(1)
    model = nn.Linear(4, 3, bias=False).double()
    x, y = torch.randn(40, 4, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    optimizer = SINGD(model, lr=0.0, T=1, lr_cov=0.1, damping=0.1, alpha1=0.0, kfac_like=kfac_like, **options)
    for _ in range(updates // 10):
        optimizer.zero_grad()
        (model(x) - y).square().sum(-1).mean().backward()
        optimizer.step()
    with torch.no_grad():
        u, v = moments(x, 2 * (model(x) - y) / 40, 40)
    state = optimizer.state[model.weight]
    return state["input_metric"].view(4, 4), state["output_metric"].view(3, 3), u, v


def test_ikfac_arrives_at_the_damped_inverse():
    """`KKᵀ = (U + λI)⁻¹` and `CCᵀ = (V + λI)⁻¹`: K-FAC's preconditioner."""
    kk, cc, u, v = fixed(kfac_like=True)
    torch.testing.assert_close(kk, torch.linalg.inv(u + 0.1 * torch.eye(4)), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(cc, torch.linalg.inv(v + 0.1 * torch.eye(3)), rtol=1e-6, atol=1e-8)


def test_ingd_arrives_at_its_fixed_point():
    """`τ(CᵀVC) KᵀUK + λ τ(CᵀC) KᵀK = I`, which is `KKᵀ (τ(CᵀVC) U + λ τ(CᵀC) I) = I`."""
    kk, cc, u, v = fixed(kfac_like=False)
    curvature = (v @ cc).trace() / 3 * u + 0.1 * cc.trace() / 3 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(kk @ curvature, torch.eye(4, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_ikfacs_input_side_solves_least_squares():
    """Where outputs are uncorrelated the curvature is `U ⊗ I`: `G KKᵀ` is the damped Newton step."""
    kk, _, u, _ = fixed(kfac_like=True)
    gradient = torch.randn(3, 4, dtype=torch.float64)
    exact = torch.linalg.solve(u + 0.1 * torch.eye(4, dtype=torch.float64), gradient.T).T
    torch.testing.assert_close(gradient @ kk, exact, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_ikfac_is_gauss_newton_on_deep_linear_networks(layer):
    """There the Gauss-Newton matrix of a layer is `E[aaᵀ] ⊗ BᵀB`, B the layers above (arXiv 1503.05671).

    With each input's residuals the unit vectors in turn, the gradients' second moment is that matrix over d_out.
    """
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3))).double()
    weight, x = model[layer].weight, torch.randn(8, 3, dtype=torch.float64)
    optimizer = SINGD(model, lr=0.0, T=1, kfac_like=True, damping=1e-12, lr_cov=0.5, limit_lr_cov=True)
    for _ in range(800):
        optimizer.zero_grad()
        out = model(x.repeat_interleave(3, 0))
        targets = out.detach() - torch.eye(3, dtype=torch.float64).repeat(8, 1)
        (0.5 * (out - targets).square().sum(-1).mean()).backward()
        optimizer.step()
    jacobian = torch.func.jacrev(lambda w: torch.func.functional_call(model, {f"{layer}.weight": w}, (x,)))(weight)
    rows = jacobian.detach().reshape(-1, 9)
    gauss_newton = rows.T @ rows / (8 * 3)
    pair = FactorPair(optimizer._layers()[layer], optimizer.state[weight], optimizer.defaults)
    gradient = torch.randn(3, 3, dtype=torch.float64)
    exact = torch.linalg.solve(gauss_newton, gradient.flatten()).view(3, 3)
    weight.grad = gradient
    torch.testing.assert_close(pair.directions()[0], exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("structures", ["block7diagonal", "block30diagonal", "hierarchical7_15"])
def test_structures_no_smaller_than_the_layer_are_dense(structures):
    model = Deep()
    other = copy.deepcopy(model)
    train(model, SINGD(model, **PLAIN), range(9))
    train(other, SINGD(other, **PLAIN, structures=structures), range(9))
    torch.testing.assert_close(parameters(other), parameters(model), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "structures", ["diagonal", "block3diagonal", "hierarchical2_2", "triltoeplitz", "triutoeplitz"]
)
@pytest.mark.parametrize("kfac_like", [False, True])
def test_every_structure_learns_and_resumes(structures, kfac_like):
    model = Deep()
    options = {**PLAIN, "structures": (structures, "dense"), "kfac_like": kfac_like, "warm_start": True, "lr": 0.01}
    optimizer = SINGD(model, **options)
    x, y = batch(0, n=40)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(loss_of(model, x, y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    twin = copy.deepcopy(model)
    resumed = SINGD(twin, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(5))
    train(twin, resumed, range(5))
    assert all(torch.equal(p, q) for p, q in zip(parameters(model), parameters(twin), strict=True))


@pytest.mark.parametrize("cached", [True, False])
def test_kept_metrics_are_the_factors_product(cached):
    model, reference = Deep(), Deep()
    train(model, SINGD(model, **PLAIN, cache_metrics=cached), range(5))
    train(reference, SINGD(reference, **PLAIN), range(5))
    torch.testing.assert_close(parameters(model), parameters(reference), rtol=1e-10, atol=1e-12)


def test_factors_are_updated_beside_the_main_stream_where_there_are_streams(monkeypatch):
    """The side stream waits for the main one, and that one for it before factors are read; nothing else differs."""
    told = []

    class Stream(contextlib.nullcontext):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def wait_stream(self, other):
            told.append(f"{self.name} after {other.name}")

        def record_event(self):
            told.append(f"{self.name} done")
            return self.name

        def wait_event(self, event):
            told.append(f"{self.name} after {event}")

    def trained():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)).double()
        optimizer = SINGD(model, lr=0.1, T=2, structures="diagonal")
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 5, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
        return list(model.parameters())

    expected = trained()
    monkeypatch.setattr(singd_batches, "_has_streams", lambda device: True)
    monkeypatch.setattr(singd_batches, "_side_stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    torch.testing.assert_close(trained(), expected, rtol=0, atol=0)
    batches, layers = 2, 3
    assert told == (["side after main", "side done"] * batches + ["main after side"] * layers) * 2
