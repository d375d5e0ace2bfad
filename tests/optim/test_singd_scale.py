"""How long SINGD's steps are and how fast its factors move, where that is not the published rule."""

import copy
import inspect

import pytest
import torch
from test_singd import PLAIN, Deep, batch, fixed, loss_of, moments, parameters, train
from torch import nn

from hf_efcp import create_optimizer
from hf_efcp.optim.singd import SINGD
from hf_efcp.optim.singd_state import FactorPair


def test_limited_updates_do_not_overshoot():
    """Inputs with a mean spread over all of them: ρ(m) is d·max|m|, and an update by that entry turns K round."""

    def trained(**options):
        torch.manual_seed(0)
        model = nn.Linear(20, 2, bias=False).double()
        optimizer = SINGD(model, lr=0.0, T=1, kfac_like=True, damping_mode="relative", lr_cov=0.5, **options)
        x = 3 + torch.randn(50, 20, dtype=torch.float64)
        for _ in range(60):
            optimizer.zero_grad()
            (model(x) ** 2).sum(-1).mean().backward()
            optimizer.step()
        return FactorPair(optimizer._layers()[0], optimizer.state[model.weight], optimizer.defaults), x.T @ x

    pair, u = trained(damping=0.1, limit_lr_cov=True)
    curvature = u / (u.trace() / 20) + 0.1 * torch.eye(20, dtype=torch.float64)
    torch.testing.assert_close(pair.state["input_metric"].view(20, 20) @ curvature, torch.eye(20).double())
    assert trained(damping=0.1, normalize_lr_cov=True)[0].growth() > 1e3 * pair.growth()


def test_relative_damping_forgets_the_scale_of_the_loss():
    ends = []
    for scale in (1.0, 1e-3):
        model = Deep()
        optimizer = SINGD(model, **{**PLAIN, "lr": 0.0, "damping_mode": "relative", "damping": 0.1})
        for step in range(4):
            optimizer.zero_grad()
            (scale * loss_of(model, *batch(step))).backward()
            optimizer.step()
        ends.append(optimizer.state[model.first.weight]["output_factor"])
    torch.testing.assert_close(*ends)


def test_relative_damping_is_in_mean_eigenvalues():
    """IKFAC arrives at `KKᵀ = (U/τ(U) + λI)⁻¹`."""
    kk, cc, u, v = fixed(kfac_like=True, damping_mode="relative")
    for metric, moment in ((kk, u), (cc, v)):
        d = len(moment)
        expected = torch.linalg.inv(moment / (moment.trace() / d) + 0.1 * torch.eye(d, dtype=torch.float64))
        torch.testing.assert_close(metric, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_adam_over_factors_that_stay_is_adamw(moment_dtype):
    """With lr_cov = 0 the factors are I, and the step torch's AdamW's; bfloat16 moments are near it."""
    model = Deep().float()
    twin = copy.deepcopy(model)
    options = {"lr": 0.01, "weight_decay": 0.1, "lr_cov": 0.0, "scaling": "adam"}
    ours, theirs = (
        SINGD(model, **options, moment_dtype=moment_dtype),
        torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1),
    )
    for step in range(10):
        for net, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            loss_of(net, *(t.float() for t in batch(step))).backward()
            optimizer.step()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if moment_dtype == "float32" else {"rtol": 0.05, "atol": 3e-3}
    torch.testing.assert_close(parameters(model), parameters(twin), **tolerance)


def test_warm_steps_take_a_mean_of_the_first_curvatures():
    """IKFAC, each factor a number, from I: `n`-th update with `lr_cov` 1/n, the first with 1/2, before `warm_steps`."""
    model = nn.Linear(1, 1, bias=False).double()
    optimizer = SINGD(model, lr=0.0, T=10, lr_cov=1e-3, damping=0.0, kfac_like=True, warm_steps=3)
    k, expected = 1.0, []
    for step in range(11):
        optimizer.zero_grad()
        (model(torch.full((1, 1), 0.5 + 0.1 * step, dtype=torch.float64)) ** 2).sum().backward()
        optimizer.step()
        if step < 3 or step == 10:
            beta = max(1e-3, min(0.5, 1 / (step + 1))) if step < 3 else 1e-3
            k -= beta * k * 0.5 * (k**2 * (0.5 + 0.1 * step) ** 2 - 1)
        expected.append(k**2)
        torch.testing.assert_close(optimizer.state[model.weight]["input_metric"].item(), expected[-1])


def test_gradients_of_one_direction_are_still_followed():
    """All outputs err alike, so one direction has all curvature: the first update must not take it away."""
    layer = nn.Linear(8, 4, bias=False)
    inputs, truth = torch.randn(64, 8), layer.weight.detach().clone()
    layer.weight.data += 0.3
    optimizer = create_optimizer("efcp_singd", layer, lr=1e-3)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (layer(inputs) - inputs @ truth.T).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    metric = optimizer.state[layer.weight]["output_metric"].view(4, 4)
    assert torch.linalg.eigvalsh(metric)[0] > 0
    assert losses[-1] < 0.4 * losses[0]


def test_other_parameters_follow_the_schedule_at_a_rate_of_their_own():
    """`fallback_lr` holds while `lr` is at its first value, in torch's AdamW's step; halved, both are."""
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)).double()
    twin = copy.deepcopy(model)
    optimizer = SINGD(model, lr=0.1, fallback_lr=0.003)
    reference = torch.optim.AdamW(twin.parameters(), lr=0.003, weight_decay=0.0)
    for step, share in enumerate((1.0, 0.5, 0.25)):
        optimizer.param_groups[0]["lr"], reference.param_groups[0]["lr"] = 0.1 * share, 0.003 * share
        model[0].load_state_dict(twin[0].state_dict())
        for net, own in ((model, optimizer), (twin, reference)):
            own.zero_grad()
            net(batch(step)[0]).pow(3).sum().backward()
            own.step()
        torch.testing.assert_close(parameters(model[1]), parameters(twin[1]), rtol=1e-6, atol=1e-8)


def test_warm_start_is_the_scale_of_the_fixed_point():
    """`τ(CᵀVC)·τ(KᵀUK) + λτ(CᵀC)τ(KᵀK) = 1` from the first update on, where I would grow for hundreds."""
    model = nn.Linear(4, 3, bias=False).double()
    optimizer = SINGD(model, lr=0.0, damping=1e-3, warm_start=True)
    x, y = batch(0)
    ((model(x[:, :4]) - y) / 100).square().sum(-1).mean().backward()
    u, v = moments(x[:, :4], 2e-4 * (model(x[:, :4]) - y).detach() / 6, 6)
    optimizer.step()
    k, c = optimizer.state[model.weight]["input_factor"][0], optimizer.state[model.weight]["output_factor"][0]
    traces = u.trace() / 4 * v.trace() / 3
    torch.testing.assert_close(k**2 * c**2 * (traces + 1e-3), torch.ones_like(k))


def test_growth_is_bounded():
    model = Deep()
    optimizer = SINGD(model, **{**PLAIN, "lr": 0.0, "T": 1, "damping": 1e-6}, max_growth=1.5)
    train(model, optimizer, range(60))
    assert optimizer.metrics()["singd_growth"] == pytest.approx(1.5)


def test_clips_shorten_the_preconditioned_gradient():
    """And leave its direction: `max_update_norm` to that norm, `kl_clip` by ν with `(lr·ν)²⟨u, g⟩ = κ`."""
    moves, products = {}, {}
    for name, clip in {"none": {}, "norm": {"max_update_norm": 0.01}, "kl": {"kl_clip": 1e-5}}.items():
        model = Deep()
        before = torch.cat([p.flatten() for p in parameters(model)])
        train(model, SINGD(model, **{**PLAIN, "momentum": 0.0}, **clip), [0])
        moves[name] = (before - torch.cat([p.flatten() for p in parameters(model)])) / 0.05
        products[name] = moves[name] @ torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(moves["norm"].norm().item(), 0.01)
    shrunk = products["kl"] / products["none"]
    torch.testing.assert_close((0.05 * shrunk) ** 2 * products["none"], torch.tensor(1e-5, dtype=torch.float64))
    for clipped in (moves["norm"], moves["kl"]):
        torch.testing.assert_close(clipped / clipped.norm(), moves["none"] / moves["none"].norm())


def test_layer_rms_is_the_root_mean_square_of_a_layers_step():
    model = Deep()
    before = parameters(model)
    train(model, SINGD(model, **PLAIN, scaling="layer_rms", rms=0.3), [0])
    weight, bias, _ = (b - p for b, p in zip(before, parameters(model), strict=True))
    torch.testing.assert_close(torch.cat([weight.flatten(), bias]).square().mean().sqrt().item(), 0.05 * 0.3)


def test_lr_cov_may_be_a_function_of_the_step(tmp_path):
    """As in the singd package; what is saved is a number, and the function goes on after loading."""
    options = {**PLAIN, "T": 1}
    model, reference = Deep(), Deep()
    optimizer, other = SINGD(model, **{**options, "lr_cov": lambda step: 0.1 / (1 + step)}), SINGD(reference, **options)
    for step in range(6):
        other.defaults["lr_cov"] = 0.1 / (1 + step)
        train(reference, other, [step])
        if step == 3:
            torch.save(optimizer.state_dict(), tmp_path / "state.pt")
            optimizer = SINGD(model, **{**options, "lr_cov": lambda step: 0.1 / (1 + step)})
            optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        train(model, optimizer, [step])
    assert optimizer.param_groups[0]["lr_cov"] == 0.1 / 6
    assert all(torch.equal(p, q) for p, q in zip(parameters(model), parameters(reference), strict=True))
    with pytest.raises(ValueError, match="`lr_cov` must be in"):
        SINGD(Deep(), lr_cov=lambda step: -1.0)


def test_signature_of_the_package_is_kept():
    ours = inspect.signature(SINGD).parameters
    values = {"lr": 1e-3, "momentum": 0.9, "damping": 1e-3, "alpha1": 0.5, "weight_decay": 0.0, "T": 10, "lr_cov": 1e-2}
    values |= {"loss_average": "batch", "structures": ("dense", "dense"), "kfac_approx": "expand", "kfac_like": False}
    values |= {"preconditioner_dtype": (None, None), "init_grad_scale": 1.0, "normalize_lr_cov": False, "params": None}
    assert {"model", "warn_unsupported"} <= set(ours)
    assert {name: ours[name].default for name in values} == values
    for dtype in (torch.bfloat16, torch.float16):
        group = SINGD(Deep(), preconditioner_dtype=(dtype, None)).param_groups[0]
        assert group["preconditioner_dtype"] == f"{dtype}+none".removeprefix("torch.")
