"""A block size that fits the model: least bytes where tensors are small, fast reads where they are large."""

import pytest
import torch

from hf_efcp import create_optimizer
from hf_efcp.curvature.layout import fitting_block_size
from hf_efcp.optim import MFAC


def shapes_of(*numels):
    return [torch.nn.Parameter(torch.zeros(n)) for n in numels]


@pytest.mark.parametrize(
    ("numels", "size"),
    [
        ([2048 * 7], 2048),
        ([2048 * 7, 2048 * 2 + 1], 512),  # 2047 and 1023 of 18433 entries are more than 5 %
        ([100, 300, 5000], 256),  # 512 pads by 5 × 632
        ([3, 5], 256),  # nothing fits
        ([10**7, 3], 2048),
        ([], 2048),
    ],
)
def test_largest_size_that_pads_little(numels, size):
    assert fitting_block_size(numels) == size


def test_of_a_small_model_it_saves_a_quarter_of_the_bytes():
    numels = [96] * 40 + [96 * 96] * 16
    small, large = (create_optimizer("efcp_mfac", shapes_of(*numels), lr=1e-3, **o) for o in ({}, {"block_size": 2048}))
    for optimizer in (small, large):
        optimizer.materialize_state()
    assert small.defaults["block_size"] == 256
    assert small.state_bytes() < 0.75 * large.state_bytes()
    assert small.state_bytes() < 8 * sum(numels)


def test_it_stays_when_parameters_are_added():
    """Rows of the old size are in the state; a model of both would take another."""
    optimizer = MFAC(shapes_of(4096), lr=0.1, block_size=None, window=4)
    weight = optimizer.param_groups[0]["params"][0]
    weight.grad = torch.ones(4096)
    optimizer.step()
    optimizer.add_param_group({"params": shapes_of(*[100] * 50)})
    optimizer.step()
    assert optimizer.defaults["block_size"] == 2048
    assert optimizer.state[weight]["indices"].shape[0] == 2


def test_a_saved_size_is_kept():
    """Also by accelerate, which loads an optimizer's own state when it prepares it."""
    first, second = (create_optimizer("efcp_mfac", shapes_of(100, 300), lr=1e-3, **o) for o in ({"block_size": 64}, {}))
    second.load_state_dict(second.state_dict())
    assert second.defaults["block_size"] == 256
    for optimizer in (first, second):
        optimizer.materialize_state()
    second.load_state_dict(first.state_dict())
    assert second.defaults["block_size"] == 64
    second.materialize_state()


def test_a_wrong_iterable_is_still_named_by_torch():
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        MFAC(torch.zeros(3), lr=0.1, block_size=None)
    with pytest.raises(ValueError, match="empty parameter list"):
        MFAC([], lr=0.1, block_size=None)
