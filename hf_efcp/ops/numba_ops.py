"""Operations for the CPU, compiled by numba: the functions of `torch_ops` and `torch_moments`, to rounding, and faster.

Blocks are shared out over `torch.get_num_threads()` threads. The result does not depend on their number: each block
is one thread's, and sums over blocks are taken piece by piece in a fixed order.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_efcp.ops import numba_kernels, numba_moments
from hf_efcp.ops.torch_moments import ADAM_EPS

# A tenth of a millisecond's work, in entries: below, waking a thread costs more than it saves.
_WORTH_A_THREAD = 1 << 18
_PIECES = 64

_BITS = {torch.bfloat16: torch.uint16, torch.int16: torch.uint16}


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
    group = _group(indices, scales)
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
    indices, values, scales = map(_array, row)
    # A block is read once in `n_parts` parts, then k entries of each part: least work where the squares meet.
    k = indices.shape[1]
    n_parts = next(n for n in (16, 8, 4, 2, 1) if n == 1 or (block_size % n == 0 and n * n * k <= block_size))
    arrays = (_array(residual), _array(grid), _array(gradient), n_parts, indices, values, scales)
    _share(numba_kernels.accumulate_topk, n_blocks // group, gradient.numel(), group, *arrays)


def window_dots(indices: Tensor, values: Tensor, x: Tensor, scales: Tensor | None = None) -> Tensor:
    """See `torch_ops.window_dots`."""
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return _dots(numba_kernels.window_dots, indices, values, scales, _array(x))


def row_dots(indices: Tensor, values: Tensor, row: Tensor, scratch: Tensor, scales: Tensor | None = None) -> Tensor:
    """See `torch_ops.row_dots`."""
    return _dots(numba_kernels.row_dots, indices, values, scales, int(row), scratch.shape[1])


def _dots(kernel: Callable[..., None], indices: Tensor, values: Tensor, scales: Tensor | None, *vector: Any) -> Tensor:
    n_blocks, window, _ = indices.shape
    piece = max(1, -(-n_blocks // _PIECES))
    parts = np.zeros((-(-n_blocks // piece), window))
    arrays = (_array(indices), _array(values), _array(scales), _group(indices, scales), *vector, parts)
    _share(kernel, len(parts), indices.numel(), piece, *arrays)
    return torch.from_numpy(parts.sum(0))


def window_combine_(
    out: Tensor, indices: Tensor, values: Tensor, coefficients: Tensor, scales: Tensor | None = None
) -> Tensor:
    """See `torch_ops.window_combine_`."""
    weights = _array(coefficients.to(out.dtype))
    arrays = (_array(indices), _array(values), _array(scales), _group(indices, scales), weights, _array(out))
    _share(numba_kernels.window_combine, len(indices), indices.numel(), *arrays)
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
    seed = np.uint32(count * 0x3C6EF35F & 0xFFFFFFFF)
    rates = np.float32(1 - beta1), np.float32(1 - beta2)
    corrections = np.float32(1 - beta1**count), np.float32(1 - beta2**count)
    arrays = (_array(update), _array(first), _array(second))
    _share(numba_moments.adam, len(update), len(update), *arrays, seed, rates, corrections, np.float32(eps))
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
    seed = np.uint32(count * 0x3C6EF35F & 0xFFFFFFFF)
    rates = np.float32(1 - beta1), np.float32(1 - beta2)
    arrays = (_array(gradient), _array(first), _array(second))
    n = len(gradient)
    _share(numba_moments.adam_mean, n, n, *arrays, seed, rates, np.float32(1 - beta1**count))
    return gradient


def adam_direction_(
    update: Tensor, second: Tensor, step: Tensor, accept: Tensor, *, beta2: float, eps: float = ADAM_EPS
) -> Tensor:
    """See `torch_moments.adam_direction_`."""
    if not accept:
        return update.zero_()
    correction, n = np.float32(1 - beta2 ** int(step)), len(update)
    _share(numba_moments.adam_direction, n, n, _array(update), _array(second), correction, np.float32(eps))
    return update


def _group(indices: Tensor, scales: Tensor | None) -> int:
    """Blocks that share a scale."""
    return 1 if scales is None or not len(scales) else len(indices) // len(scales)


def _array(tensor: Tensor | None) -> np.ndarray | None:
    """The tensor's memory, in the types that the kernels know."""
    if tensor is None:
        return None
    bits = _BITS.get(tensor.dtype)
    return (tensor if bits is None else tensor.view(bits)).numpy()


def _share(kernel: Callable[..., None], n_units: int, work: int, *arguments: Any) -> None:
    """Call `kernel(start, stop, *arguments)` for all units, on as many threads as the work is worth."""
    n_threads = max(1, min(torch.get_num_threads(), n_units, work // _WORTH_A_THREAD))
    bounds = [n_units * i // n_threads for i in range(n_threads + 1)]
    others = []
    if n_threads > 1:
        pool = _threads(n_threads - 1, os.getpid())
        others = [pool.submit(kernel, bounds[i], bounds[i + 1], *arguments) for i in range(1, n_threads)]
    kernel(bounds[0], bounds[1], *arguments)
    for other in others:
        other.result()


@functools.cache
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked one has none of its parent's, and would wait for them forever."""
    return ThreadPoolExecutor(count, thread_name_prefix="hf_efcp")
