"""What the tests of compiled backends draw, and how they compare with the definition in torch."""

import pytest
import torch

from hf_efcp.ops import torch_ops

VALUES = [torch.float32, torch.bfloat16, torch.int8]
RESIDUALS = [torch.float32, torch.bfloat16, None]  # None: 4 bits
YES, NO = torch.tensor(True), torch.tensor(False)
each_value_dtype = pytest.mark.parametrize("value_dtype", VALUES, ids=str)
each_residual_dtype = pytest.mark.parametrize("residual_dtype", RESIDUALS, ids=str)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_residual(x, dtype):
    return torch_ops.pack_int4(x) if dtype is None else (x.to(dtype, copy=True), None)


def make_window(n_blocks, window, block_size, k, value_dtype, group=1):
    indices = draw(n_blocks, window, block_size, seed=1).argsort(-1)[..., :k]
    indices = indices.to(torch.uint8 if block_size <= 256 else torch.int16)
    values, scales = draw(n_blocks, window, k, seed=2), None
    if value_dtype is torch.int8:
        values, scales = values * 40, draw(n_blocks // group, window, seed=3).abs()
    return indices, values.clamp(-127, 127).to(value_dtype), scales


def dense(indices, values, block_size):
    return torch.zeros(len(indices), block_size).scatter_(1, indices, values.float())


def accumulate_on(backends, x, gradient, k, value_dtype, residual_dtype, accept, group):
    """Residual, grid, indices, values and scales of each backend."""
    results = []
    for ops in backends:
        residual, grid = make_residual(x, residual_dtype)
        taken = ops.accumulate_topk_(residual, gradient.clone(), k, value_dtype, accept, grid=grid, group=group)
        results.append((residual, grid, *taken))
    return results


def assert_same(theirs, ours):
    assert (theirs is None) == (ours is None)
    if theirs is not None:
        assert theirs.dtype == ours.dtype
        assert torch.equal(theirs, ours)
