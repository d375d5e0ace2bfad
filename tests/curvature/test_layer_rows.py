"""Rows of inputs and gradients of every kind of layer, and which parameters are layers."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_efcp.curvature.layers import find_layers, gradient_rows, input_rows

CASES = {
    "linear, vectors": (lambda: nn.Linear(4, 3), (5, 4)),
    "linear, one vector": (lambda: nn.Linear(4, 3), (4,)),
    "linear, images": (lambda: nn.Linear(4, 3, bias=False), (2, 3, 5, 4)),
    "Conv1D of transformers": (lambda: Conv1D(3, 4), (2, 5, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, stride=2), (2, 4, 9)),
    "conv1d, circular, dilated": (
        lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2, padding_mode="circular"),
        (2, 4, 9),
    ),
    "conv2d": (lambda: nn.Conv2d(3, 4, (2, 3), padding=(0, 1)), (2, 3, 5, 6)),
    "conv2d, unbatched": (lambda: nn.Conv2d(3, 4, 3, bias=False), (3, 5, 6)),
    "conv2d, same, even kernel": (lambda: nn.Conv2d(3, 4, 2, padding="same"), (2, 3, 5, 6)),
    "conv2d, circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 5, 6)),
    "conv2d, reflected": (lambda: nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"), (2, 3, 5, 6)),
    "conv2d, grouped": (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2), (2, 6, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 2), stride=(2, 1, 2)), (2, 2, 3, 4, 5)),
    "conv3d, grouped, dilated, circular": (
        lambda: nn.Conv3d(4, 6, 2, padding=1, dilation=(1, 2, 1), groups=2, padding_mode="circular"),
        (2, 4, 3, 4, 3),
    ),
    "conv2d, depthwise, circular": (
        lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6, padding_mode="circular"),
        (2, 6, 5, 5),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Using padding=.same.")
def test_gradient_is_the_sum_of_outer_products_of_rows(name):
    """`G = Σ g aᵀ`, each group of a convolution with its own rows; the identity on which K-FAC rests."""
    make, shape = CASES[name]
    torch.manual_seed(0)
    module, x = make().double(), torch.randn(shape, dtype=torch.float64)
    out = module(x)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    (layer,) = find_layers(module, set(module.parameters()), ("dense", "dense"), 99).layers
    a, g = input_rows(module, x), gradient_rows(module, gradient)
    assert a.shape[:2] == g.shape[:2]
    parts = [torch.einsum("bto,bti->oi", *pair) for pair in zip(g.chunk(a.shape[2], -1), a.unbind(2), strict=True)]
    expected = torch.cat(parts)
    if module.bias is not None:
        expected = torch.cat([expected, g.sum((0, 1))[:, None]], 1)
    blocks = layer.matrices(module.weight.grad, None if module.bias is None else module.bias.grad)
    torch.testing.assert_close(torch.cat(blocks, 1), expected)
    for p, block in zip(layer.parameters, blocks, strict=True):
        assert block.data_ptr() == p.grad.data_ptr()  # what is written there is the parameter's


class Odd(nn.Module):
    """Layers that share parameters, and parameters that are in no layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight
        self.frozen_bias = nn.Linear(4, 5)
        self.frozen_bias.bias.requires_grad_(False)
        self.frozen_weight = nn.Linear(4, 5)
        self.frozen_weight.weight.requires_grad_(False)
        self.attention = nn.MultiheadAttention(4, 2)
        self.token = nn.Parameter(torch.zeros(4))
        self.wide = nn.Linear(4, 70)


def test_each_parameter_is_in_a_layer_or_has_a_reason():
    model = Odd()
    trained = {p for p in model.parameters() if p.requires_grad}
    plan = find_layers(model, trained, ("dense", "dense"), 64)
    layers = {layer.name: layer for layer in plan.layers}
    assert set(layers) == {"one", "frozen_bias", "wide"}
    assert layers["one"].modules == [model.one, model.two]
    assert layers["frozen_bias"].bias is None
    assert [type(s).__name__ for s in (layers["wide"].inputs, layers["wide"].outputs)] == ["Dense", "Diagonal"]
    assert plan.reasons == {
        "embedding.weight": "shared by Embedding and Linear",
        "frozen_weight.bias": "bias of Linear whose weight is frozen or shared",
        "attention.in_proj_weight": "parameter of MultiheadAttention",
        "attention.in_proj_bias": "parameter of MultiheadAttention",
        "attention.out_proj.weight": "parameter of NonDynamicallyQuantizableLinear",
        "attention.out_proj.bias": "parameter of NonDynamicallyQuantizableLinear",
        "token": "parameter of Odd",
    }
    in_layers = {p for layer in plan.layers for p in layer.parameters}
    assert in_layers | {model.get_parameter(name) for name in plan.reasons} == trained
