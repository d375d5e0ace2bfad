"""Operations for the CPU, compiled by numba: the functions of `torch_ops` and `torch_moments`, to rounding, and faster.

Blocks are shared out over `torch.get_num_threads()` threads. The result does not depend on their number: each block
is one thread's, and sums over blocks are taken piece by piece in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_efcp.ops import numba_kernels, numba_memory, numba_moments
from hf_efcp.ops.numba_calls import N_PARTS, array, blocks_per_scale, mean_factor, parts_of_blocks, seed_of, share
from hf_efcp.ops.numba_step import combine_step_, start_step_
from hf_efcp.ops.torch_moments import ADAM_EPS

__all__ = [
    "accumulate_topk_",
    "adam_",
    "adam_direction_",
    "adam_mean_",
    "block_squares",
    "combine_step_",
    "push_topk_",
    "row_dots",
    "start_step_",
    "window_combine_",
    "window_dots",
]


def accumulate_topk_(
    residual: Tensor,
    gradient: Tensor,
    k: int,
    value_dtype: torch.dtype,
    accept: Tensor,
    *,
    grid: Tensor | None = None,
    group: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `torch_ops.accumulate_topk_`."""
    if not accept:
        residual, grid = residual.clone(), None if grid is None else grid.clone()
    n_blocks = len(gradient)
    indices = torch.empty(n_blocks, k, dtype=torch.int64)
    values = torch.empty(n_blocks, k, dtype=value_dtype)
    scales = torch.empty(n_blocks // group) if value_dtype is torch.int8 else None
    _accumulate(residual, grid, gradient, group, (indices, values, scales))
    return indices, values, scales


def push_topk_(
    indices: Tensor,
    values: Tensor,
    row: Tensor,
    residual: Tensor,
    gradient: Tensor,
    accept: Tensor,
    *,
    scales: Tensor | None = None,
    grid: Tensor | None = None,
) -> None:
    """See `torch_ops.push_topk_`."""
    if not accept:
        return
    j = int(row)
    group = blocks_per_scale(indices, scales)
    _accumulate(
        residual, grid, gradient, group, (indices[:, j], values[:, j], None if scales is None else scales[:, j])
    )


def _accumulate(
    residual: Tensor,
    grid: Tensor | None,
    gradient: Tensor,
    group: int,
    row: tuple[Tensor, Tensor, Tensor | None],
) -> None:
    n_blocks, block_size = gradient.shape
    indices, values, scales = map(array, row)
    n_parts = parts_of_blocks(block_size, indices.shape[1])
    arrays = (array(residual), array(grid), array(gradient), n_parts, indices, values, scales)
    share(numba_kernels.accumulate_topk, n_blocks // group, gradient.numel(), group, *arrays)


def window_dots(indices: Tensor, values: Tensor, x: Tensor, scales: Tensor | None = None) -> Tensor:
    """See `torch_ops.window_dots`."""
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return _dots(numba_kernels.window_dots, indices, values, scales, array(x))


def row_dots(indices: Tensor, values: Tensor, row: Tensor, scratch: Tensor, scales: Tensor | None = None) -> Tensor:
    """See `torch_ops.row_dots`."""
    return _dots(numba_kernels.row_dots, indices, values, scales, int(row), scratch.shape[1])


def _dots(kernel: Callable[..., None], indices: Tensor, values: Tensor, scales: Tensor | None, *vector: Any) -> Tensor:
    n_blocks, window, _ = indices.shape
    piece = max(1, -(-n_blocks // N_PARTS))
    parts = np.zeros((-(-n_blocks // piece), window))
    arrays = (array(indices), array(values), array(scales), blocks_per_scale(indices, scales), *vector, parts)
    share(kernel, len(parts), indices.numel(), piece, *arrays)
    return torch.from_numpy(parts.sum(0))


def block_squares(x: Tensor) -> Tensor:
    """See `torch_ops.block_squares`."""
    out = torch.empty(len(x), dtype=torch.float64)
    share(numba_memory.block_squares, len(x), x.numel(), array(x), array(out))
    return out


def window_combine_(
    out: Tensor, indices: Tensor, values: Tensor, coefficients: Tensor, scales: Tensor | None = None
) -> Tensor:
    """See `torch_ops.window_combine_`."""
    weights = array(coefficients.to(out.dtype))
    arrays = (array(indices), array(values), array(scales), blocks_per_scale(indices, scales), weights, array(out))
    share(numba_kernels.window_combine, len(indices), indices.numel(), *arrays)
    return out


def adam_(
    update: Tensor,
    first: Tensor,
    second: Tensor,
    step: Tensor,
    accept: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float = ADAM_EPS,
) -> Tensor:
    """See `torch_moments.adam_`."""
    if not accept:
        return update.zero_()
    count = int(step)
    seed = seed_of(count)
    rates = np.float32(1 - beta1), np.float32(1 - beta2)
    corrections = np.float32(1 - beta1**count), np.float32(1 - beta2**count)
    arrays = (array(update), array(first), array(second))
    share(numba_moments.adam, len(update), len(update), *arrays, seed, rates, corrections, np.float32(eps))
    return update


def adam_mean_(
    gradient: Tensor,
    first: Tensor,
    second: Tensor | None,
    step: Tensor,
    accept: Tensor,
    *,
    beta1: float,
    beta2: float,
) -> Tensor:
    """See `torch_moments.adam_mean_`."""
    if not accept:
        return gradient
    count = int(step)
    seed = seed_of(count)
    rates = np.float32(1 - beta1), np.float32(1 - beta2)
    arrays = (array(gradient), array(first), array(second))
    n = len(gradient)
    share(numba_moments.adam_mean, n, n, *arrays, seed, rates, mean_factor(beta1, count))
    return gradient


def adam_direction_(
    update: Tensor, second: Tensor, step: Tensor, accept: Tensor, *, beta2: float, eps: float = ADAM_EPS
) -> Tensor:
    """See `torch_moments.adam_direction_`."""
    if not accept:
        return update.zero_()
    correction, n = np.float32(1 - beta2 ** int(step)), len(update)
    share(numba_moments.adam_direction, n, n, array(update), array(second), correction, np.float32(eps))
    return update
