"""The first pass of a step over the blocks of a model, compiled by numba.

A block stays in cache from its gradient to its row, its residual and its inner products: what is as long as the model
is read and written once. Kernels are cached by this file: who changes the functions that it imports touches it.
"""

from __future__ import annotations

import numpy as np

from hf_efcp.ops.numba_compiler import compiled
from hf_efcp.ops.numba_formats import as_float32
from hf_efcp.ops.numba_kernels import add_dots, read_sum, select, take, write
from hf_efcp.ops.numba_memory import BFLOAT16, FLOAT32, bytes_, floats, halves, read_of_table, square
from hf_efcp.ops.numba_moments import adam_mean


@compiled()
def _plus_residual(out, residual, block, x):
    """`out = residual + x`, for a block; `residual` as in `first_pass`."""
    address, kind, grid = residual
    n = len(out)
    if kind == FLOAT32:
        read_sum(out, floats(address, block * n, n), None, x)
    elif kind == BFLOAT16:
        read_sum(out, halves(address, block * n, n), None, x)
    else:
        read_sum(out, bytes_(address, block * (n // 2), n // 2), grid[block], x)


@compiled()
def _keep(residual, block, x):
    """The residual of a block becomes `x`."""
    address, kind, grid = residual
    n = len(x)
    if kind == FLOAT32:
        write(floats(address, block * n, n), None, x)
    elif kind == BFLOAT16:
        write(halves(address, block * n, n), None, x)
    else:
        write(bytes_(address, block * (n // 2), n // 2), grid[block], x)


@compiled()
def _average(x, block, moments, rates):
    """`adam_mean` for a block; `moments` as in `first_pass`."""
    first, second, kind, seed = moments
    n = len(x)
    if kind == FLOAT32:
        mean = floats(first, block * n, n)
        if second:
            adam_mean(0, n, x, mean, floats(second, block * n, n), seed, rates[:2], rates[2])
        else:
            adam_mean(0, n, x, mean, None, seed, rates[:2], rates[2])
    else:
        half = halves(first, block * n, n)
        if second:
            adam_mean(0, n, x, half, halves(second, block * n, n), seed, rates[:2], rates[2])
        else:
            adam_mean(0, n, x, half, None, seed, rates[:2], rates[2])


@compiled()
def _add_both(first, second, line, x, indices, values, scales):
    """`add_dots` of two vectors, to the bit, which reads the rows once."""
    for row in range(len(indices)):
        scale = np.float32(1) if scales is None else scales[row]
        of_line = of_x = 0.0
        for j in range(indices.shape[1]):
            place, stored = indices[row, j], np.float64(as_float32(values[row, j]) * scale)
            of_line += np.float64(line[place]) * stored
            of_x += np.float64(x[place]) * stored
        first[row] += of_line
        second[row] += of_x


@compiled()
def first_pass(start, stop, shape, indices, values, scales, row, gradients, residual, moments, rates, out):
    """Error feedback, a new row, moments and inner products for the parts `start` to `stop` of the blocks.

    Args:
        shape: groups of blocks in a part, G blocks in a group, n entries in a block, and `n_parts` of `select`.
        indices, values: the window, (B, m, k).
        scales: (B/G, m), or `None`.
        row: the one that is written.
        gradients: (B,) pieces of the blocks, and a table.
        residual: address, kind, and (B, 2) grid for 4 bits.
        moments: addresses of the first and, or 0, of the second, kind, seed; without any, kind is −1.
        rates: `1 − β₁`, `1 − β₂`, and what the mean is multiplied by.
        out: (parts, m) float64 zeros for the newest row's products; another for those of `x`, (parts, 0) without;
            and (B,) float64, sums of squares of `x`. `x` is the mean, or the gradient where there are no moments.
    """
    per_part, group, n, n_parts = shape
    pieces, table = gradients
    newest, dots, squares = out
    k = indices.shape[2]
    x, sums = np.empty((group, n), np.float32), np.empty((group, n), np.float32)
    chosen, maxima = np.empty((group, n + 1), np.int32), np.empty(n // n_parts, np.int32)
    found, found_keys = np.empty(n + 1, np.int32), np.empty(n + 1, np.int32)
    line = np.zeros(n, np.float32)
    guess = 0x3F800000
    n_units = len(indices) // group
    for part in range(start, stop):
        for unit in range(part * per_part, min((part + 1) * per_part, n_units)):
            first = unit * group
            last = first + group
            for member in range(group):
                read_of_table(x[member], table, pieces[first + member], first + member)
                _plus_residual(sums[member], residual, first + member, x[member])
                guess = select(sums[member], k, n_parts, guess, maxima, found, found_keys, chosen[member])
            of_unit = None if scales is None else scales[unit]
            of_row = None if scales is None else scales[:, row]
            take(sums, chosen, indices[first:last, row], values[first:last, row], of_row, unit)
            for member in range(group):
                b = first + member
                _keep(residual, b, sums[member])
                if moments[2] >= 0:
                    _average(x[member], b, moments, rates)
                if len(squares):
                    squares[b] = square(x[member])
                scale = np.float32(1) if of_unit is None else of_unit[row]
                for j in range(k):
                    line[indices[b, row, j]] = as_float32(values[b, row, j]) * scale
                if len(squares):
                    _add_both(newest[part], dots[part], line, x[member], indices[b], values[b], of_unit)
                else:
                    add_dots(newest[part], line, indices[b], values[b], of_unit)
                for j in range(k):
                    line[indices[b, row, j]] = np.float32(0)
