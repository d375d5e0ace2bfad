"""State of optimizers under masks: what has an entry for each weight is 0 where the weight is."""

import pytest
import torch
from torch import nn

from hf_efcp import create_optimizer
from hf_efcp.parallel import planned
from hf_efcp.sparsity import Sparsifier


def test_moments_of_a_part_of_a_parameter_are_masked():
    """As a rank of several has them."""
    model = nn.Linear(8, 8, bias=False)
    optimizer = create_optimizer("efcp_mfac", model, lr=0.1, block_size=8, window=2)
    with planned(2):
        optimizer._adopt_state()
    moment = optimizer.state[model.weight]["exp_avg"]
    assert moment.shape == (32,)
    moment.fill_(1)
    sparsifier = Sparsifier(model, 0.5, "static")
    sparsifier.apply_(optimizer)
    assert torch.equal(moment.bool(), sparsifier.masks["weight"].view(-1)[:32])


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda params: torch.optim.AdamW(params, amsgrad=True),
        lambda params: torch.optim.RMSprop(params, centered=True, momentum=0.9),
        torch.optim.Adagrad,
        torch.optim.Adadelta,
        torch.optim.Adamax,
        torch.optim.ASGD,
        lambda params: create_optimizer("sketchy_shampoo", list(params), lr=0.1, momentum=0.9),
    ],
)
def test_moments_of_every_optimizer_are_masked(make):
    """Each state tensor of the parameter's shape that holds gradients, their squares, or averages of weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 14), nn.Tanh(), nn.Linear(14, 3))
    optimizer = make(model.parameters())
    sparsifier = Sparsifier(model, 0.6, "set", total_steps=20, interval=2)
    sparsifier.apply_(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 10)).square().mean().backward()
        sparsifier.mask_gradients_()
        optimizer.step()
        sparsifier.finish_step_(optimizer)
    checked = 0
    for layer in sparsifier.layers:
        inactive = ~sparsifier.masks[layer.name]
        for value in optimizer.state[layer.parameter].values():
            if isinstance(value, torch.Tensor) and value.shape == inactive.shape:
                assert not value[inactive].any()
                checked += 1
    assert checked >= 2


def test_averages_of_weights_bring_nothing_back():
    """A schedule-free optimizer keeps a second iterate `z` and puts an average with it into the weights."""
    model = nn.Linear(6, 6, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight]["z"] = model.weight.detach().clone()
    sparsifier = Sparsifier(model, 0.5, "static")
    sparsifier.apply_(optimizer)
    model.weight.data.lerp_(optimizer.state[model.weight]["z"], 0.3)
    assert torch.equal(model.weight != 0, sparsifier.masks["weight"])
