"""Where parameters lie in a flat vector of blocks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_efcp.curvature.layout import Layout

CPU = torch.device("cpu")
shapes = st.lists(st.lists(st.integers(0, 5), max_size=3).map(torch.Size), min_size=1, max_size=6)


@given(shapes, st.integers(1, 20))
def test_every_parameter_starts_at_a_block_and_padding_is_short(shapes, block_size):
    layout = Layout(shapes, block_size)
    start = 0
    for shape, blocks in zip(shapes, layout.blocks, strict=True):
        assert blocks.start == start
        assert len(blocks) == math.ceil(math.prod(shape) / block_size)
        start = blocks.stop
    assert (layout.n_blocks, layout.size) == (start, start * block_size)
    assert layout.numel == sum(math.prod(shape) for shape in shapes)


@given(shapes, st.integers(1, 20))
def test_flatten_and_split_undo_one_another(shapes, block_size):
    layout = Layout(shapes, block_size)
    tensors = [torch.rand(shape) + 1 for shape in shapes]
    flat = layout.flatten(tensors, CPU)
    assert flat.shape == (layout.size,)
    for tensor, part in zip(tensors, layout.split(flat), strict=True):
        assert torch.equal(part, tensor)
    assert flat.count_nonzero() == layout.numel  # padding is zero


def test_split_gives_views():
    layout = Layout([torch.Size([2, 3]), torch.Size([])], 4)
    flat = layout.zeros(torch.bfloat16, CPU)
    for number, part in enumerate(layout.split(flat), start=1):
        part.fill_(number)
    assert flat.tolist() == [1] * 6 + [0] * 2 + [2] + [0] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_flatten_casts_and_reads_strides_and_takes_none_for_zero(dtype):
    layout = Layout([torch.Size([2, 3]), torch.Size([3]), torch.Size([2])], 4)
    strided = torch.arange(6.0, dtype=dtype).view(3, 2).T
    flat = layout.flatten([strided, None, torch.ones(2, dtype=dtype)], CPU)
    assert flat.dtype is torch.float32
    assert flat.tolist() == [0, 2, 4, 1, 3, 5, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0]


def test_flatten_copies():
    gradient = torch.ones(3)
    Layout([torch.Size([3])], 1).flatten([gradient], CPU).zero_()
    assert gradient.tolist() == [1, 1, 1]


def test_number_of_tensors_is_checked():
    with pytest.raises(ValueError, match="argument"):
        Layout([torch.Size([3])], 1).flatten([torch.ones(3), torch.ones(3)], CPU)
