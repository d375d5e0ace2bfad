"""A whole step in two passes over the blocks: see `numba_start` and `numba_finish`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_efcp.ops import numba_finish, numba_start
from hf_efcp.ops.fused import KINDS, Moments, Rows, Vector, Weights
from hf_efcp.ops.numba_calls import N_PARTS, array, blocks_per_scale, mean_factor, parts_of_blocks, seed_of, share
from hf_efcp.ops.numba_memory import INT4
from hf_efcp.ops.torch_moments import ADAM_EPS

_NO_TABLE = np.empty((0, 5), np.int64)
_NO_PAIRS = np.empty((0, 2), np.float32)
_FLOATS, _DOUBLES = np.empty(0, np.float32), np.empty(0)
_NO_ROWS = Rows(torch.empty(0, 0, 0, dtype=torch.int16), torch.empty(0, 0, 0), None, torch.empty(0, 0), 1.0)


def start_step_(
    indices: Tensor,
    values: Tensor,
    row: Tensor,
    residual: Tensor,
    gradients: tuple[Tensor, Tensor],
    step: Tensor,
    *,
    block_size: int,
    scales: Tensor | None = None,
    grid: Tensor | None = None,
    moments: Moments | None = None,
    keeps: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`torch_ops.push_topk_`, `adam_mean_`, `row_dots` and `window_dots` in one pass, for gradients that are finite.

    Args:
        indices, values, row, residual, scales, grid: as in `push_topk_`.
        gradients: (B,) int32 pieces of the blocks, and their table, see `fused.weight_table`.
        step: () int64, steps taken, this one included.
        moments: take the gradient, as in `adam_mean_`.
        keeps: whether the mean, or without moments the gradient, has products too.

    Returns:
        (m,) float64 products of all rows with the newest; with x, the mean or gradient; (B,) float64 sums of squares
        of x. The last two are `None` unless it is kept.
    """
    n_blocks, window, k = indices.shape
    group, count = blocks_per_scale(indices, scales), int(step)
    per_part = max(1, -(-n_blocks // (group * N_PARTS)))
    n_parts = -(-n_blocks // (group * per_part))
    newest, dots = np.zeros((n_parts, window)), np.zeros((n_parts, window if keeps else 0))
    squares = np.zeros(n_blocks if keeps else 0)
    kind = INT4 if grid is not None else KINDS.index(residual.dtype)
    share(
        *(numba_start.first_pass, n_parts, n_blocks * block_size + indices.numel()),
        (per_part, group, block_size, parts_of_blocks(block_size, k)),
        *(array(indices), array(values), array(scales), int(row), tuple(map(array, gradients))),
        (residual.data_ptr(), kind, _NO_PAIRS if grid is None else array(grid)),
        *_mean(moments, count),
        (newest, dots, squares),
    )
    if not keeps:
        return torch.from_numpy(newest.sum(0)), None, None
    return torch.from_numpy(newest.sum(0)), torch.from_numpy(dots.sum(0)), torch.from_numpy(squares)


def _mean(moments: Moments | None, count: int) -> tuple[Any, Any]:
    """Moments and rates for `first_pass`."""
    if moments is None or moments.first is None:
        return (0, 0, -1, seed_of(count)), (np.float32(0),) * 3
    addresses = moments.first.data_ptr(), 0 if moments.second is None else moments.second.data_ptr()
    rates = np.float32(1 - moments.beta1), np.float32(1 - moments.beta2), mean_factor(moments.beta1, count)
    return (*addresses, KINDS.index(moments.first.dtype), seed_of(count)), rates


def combine_step_(
    out: Tensor,
    step: Tensor,
    accept: Tensor,
    *,
    pieces: Tensor,
    rows: Rows | None = None,
    source: Vector | None = None,
    moments: Moments | None = None,
    factors: Tensor | None = None,
    squares: Tensor | None = None,
    weights: Weights | None = None,
    against: Tensor | None = None,
    store: bool = False,
) -> None:
    """See `triton_step.combine_step_`. Where `source` says where x lies, `out` is written, if `store` asks for that.

    Args:
        out: may be (0, block_size) where nothing is read from it nor stored.
    """
    if not accept or not len(pieces):
        return
    indices, values, scales, coefficients, own = rows or _NO_ROWS
    count, block_size = int(step), out.shape[1]
    share(
        *(numba_finish.second_pass, len(pieces), len(pieces) * block_size + indices.numel()),
        (blocks_per_scale(indices, scales), block_size),
        *(array(indices), array(values), array(scales), array(coefficients)),
        array(own) if isinstance(own, Tensor) else _FLOATS if own is None else np.ones(1, np.float32),
        _vector(source or Vector(out)),
        *_direction(moments, count),
        np.float32(ADAM_EPS),
        (
            _FLOATS if factors is None else array(factors),
            _DOUBLES if squares is None else array(squares),
            array(out) if store else np.empty((0, block_size), np.float32),
        ),
        array(pieces),
        (_NO_TABLE, _NO_PAIRS) if weights is None else (array(weights.table), array(weights.rates)),
        _NO_TABLE if against is None else array(against),
        (seed_of(count).view(np.int32), weights is not None and weights.stochastic),
    )


def _vector(vector: Vector) -> tuple[Any, int, int, np.float32]:
    """As `second_pass` takes it."""
    flat, table, factor = vector
    if flat is None:
        return _NO_TABLE if table is None else array(table), 0, -1, np.float32(factor)
    return _NO_TABLE, flat.data_ptr(), KINDS.index(flat.dtype), np.float32(factor)


def _direction(moments: Moments | None, count: int) -> tuple[Any, Any]:
    """Moments and rates for `second_pass`."""
    seed, rates = seed_of(count), (np.float32(0),) * 4
    if moments is None:
        return (0, 0, 0, 0, seed), rates
    first, second, beta1, beta2 = moments
    mode = 1 if second is None else 3 if first is None else 2
    rates = tuple(map(np.float32, (beta1 if mode == 1 else 1 - beta1, 1 - beta2, 1 - beta1**count, 1 - beta2**count)))
    addresses = [0 if moment is None else moment.data_ptr() for moment in (first, second)]
    return (mode, *addresses, KINDS.index((second if first is None else first).dtype), seed), rates
