"""Weights of 16 bits keep small steps on average."""

import pytest
import torch
from torch import nn

from hf_efcp import create_optimizer
from hf_efcp.optim.rounding import stochastically

each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@each_dtype
def test_rounding_is_to_a_neighbour_and_unbiased(dtype):
    """The mean of n draws lies within 5 standard deviations, of half a spacing at most, divided by √n."""
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    draws = torch.stack([stochastically(x, dtype, torch.tensor(step)) for step in range(4000)]).double()
    spacing = torch.finfo(dtype).eps * 2.0 ** x.abs().log2().floor()
    assert ((draws - x).abs() < spacing).all()
    assert ((draws.mean(0) - x).abs() < 5 * 0.5 * spacing / 4000**0.5).all()


@each_dtype
def test_what_is_representable_stays(dtype):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(stochastically(x.float(), dtype, torch.tensor(3)), x)


def losses(rounding, dtype, n_steps=500):
    """A linear regression at a learning rate whose steps lie below the weights' precision."""
    generator = torch.Generator().manual_seed(0)
    inputs, truth = torch.randn(256, 16, generator=generator), torch.randn(16, generator=generator)
    weight = nn.Parameter((truth + 0.3).to(dtype))
    optimizer = create_optimizer("efcp_mfac", [weight], lr=1e-3, window=8, weight_rounding=rounding)
    found = []
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss = (inputs @ (weight.float() - truth)).square().mean()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def test_the_loss_falls_where_rounding_to_the_nearest_stands_still():
    """As with float32 weights, to the noise of the rounding."""
    exact, drawn, nearest = (
        losses(*case)
        for case in (("nearest", torch.float32), ("stochastic", torch.bfloat16), ("nearest", torch.bfloat16))
    )
    assert exact[-1] < 0.01 * exact[0]
    assert drawn[-1] < 0.02 * exact[0]
    assert nearest[-1] > 0.5 * exact[0]


RATES = {"sketchy_shampoo": 2e-3, "sketchy_adagrad": 0.05, "efcp_singd": 1e-3, "singd": 1e-3}


def layer_losses(name, rounding, dtype, n_steps=400):
    """The same for a layer, as SINGD needs one."""
    generator = torch.Generator().manual_seed(0)
    inputs, truth = torch.randn(64, 8, generator=generator), torch.randn(4, 8, generator=generator)
    layer = nn.Linear(8, 4, bias=False)
    layer.weight.data = (truth + 0.3).to(dtype)
    optimizer = create_optimizer(name, layer, lr=RATES[name], weight_rounding=rounding)
    found = []
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss = (layer(inputs.to(dtype)).float() - inputs @ truth.T).square().mean()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("name", RATES)
def test_no_optimizer_loses_small_steps(name):
    exact, drawn, nearest = (
        layer_losses(name, *case)
        for case in (("nearest", torch.float32), ("stochastic", torch.bfloat16), ("nearest", torch.bfloat16))
    )
    assert exact[-1] < 0.05 * exact[0]
    assert drawn[-1] < 0.1 * exact[0]
    assert nearest[-1] > 2 * drawn[-1]


def test_float32_weights_do_not_care():
    assert losses("stochastic", torch.float32, 20) == losses("nearest", torch.float32, 20)
