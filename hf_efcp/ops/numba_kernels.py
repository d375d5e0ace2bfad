"""The window operations as loops over blocks, compiled by numba at their first call and cached on disk.

Formats, names and shapes are those of `torch_ops`. Numba has no bfloat16: such numbers come as uint16, their bits.
Indices come unsigned, which spares numba's test for negative ones. Every kernel serves blocks `start` to `stop`, or
groups of them, and releases the GIL. No kernel assumes that a float is finite: fast-math is limited to reordering
and fusing the float64 sums.
"""

from __future__ import annotations

import numpy as np

from hf_efcp.ops.numba_compiler import compiled
from hf_efcp.ops.numba_formats import as_float32, rounded

# ------------------------------------------------------------------- selection


@compiled()
def _count(keys, bound):
    """Number of int32 `keys` that are at least `bound`."""
    count = np.int32(0)
    for i in range(len(keys)):  # an iterator over the array would not be vectorized
        count = np.int32(count + np.int32(keys[i] >= bound))
    return count


@compiled()
def _lower_bound(keys, k, slack, guess):
    """A bound that at least `k` and at most `k + slack` of the int32 `keys` reach, and how many do.

    Found by doubling steps from `guess` and bisection. Where ties leave no such bound: the k-th largest key.
    """
    low, high, step = np.int64(0), np.int64(0x7FFFFFFF), np.int64(1) << 20
    bound, reached = np.int64(guess), len(keys)
    while True:
        count = _count(keys, np.int32(bound))
        if count >= k:
            low, reached = bound, count
            if count <= k + slack:
                break
        else:
            high = bound
        if high - low <= 1:
            break
        if high == 0x7FFFFFFF:
            bound = min(low + step, high - 1)
        elif low == 0:
            bound = max(high - step, 1)
        else:
            bound = (low + high) >> 1
        step <<= 1
    return low, reached


@compiled()
def select(x, k, n_parts, guess, maxima, found, found_keys, chosen):
    """Write the indices of the `k` largest magnitudes of `x` to `chosen`, exactly.

    The block is read as `n_parts` parts of equal length; the entries at one place of each part form a group. A bound
    that k group maxima reach is a bound that k entries reach, and only groups that reach it can hold one of them.

    Args:
        x: (n,) float32.
        n_parts: divides n; n/n_parts is at least k.
        guess: an expected bound, any integer from 1 on.
        maxima: (n/n_parts,) int32, scratch.
        found, found_keys: (n + 1,) int32, scratch.
        chosen: (n + 1,) int32.

    Returns:
        The bound, a guess for the next block.
    """
    n = len(x)
    n_groups = n // n_parts
    # The bits of non-negative floats order as the floats do, and integers compare without a test for NaN.
    bits = x.view(np.int32)
    for i in range(n_groups):
        maxima[i] = bits[i] & np.int32(0x7FFFFFFF)
    for part in range(1, n_parts):
        part_bits = bits[part * n_groups : (part + 1) * n_groups]
        for i in range(n_groups):
            maxima[i] = max(maxima[i], part_bits[i] & np.int32(0x7FFFFFFF))
    bound, _ = _lower_bound(maxima, k, k >> 2, guess)
    n_open = 0
    for i in range(n_groups):  # no branch: which groups are open is not predictable
        chosen[n_open] = i
        n_open += maxima[i] >= bound
    n_found = n_open * n_parts
    for part in range(n_parts):  # all entries of the open groups
        first = np.int32(part * n_groups)
        part_bits = bits[first : first + n_groups]
        keys, places = found_keys[part * n_open : (part + 1) * n_open], found[part * n_open : (part + 1) * n_open]
        for group in range(n_open):
            keys[group] = part_bits[np.uint32(chosen[group])] & np.int32(0x7FFFFFFF)
            places[group] = chosen[group] + first
    smallest, n_reached = _lower_bound(found_keys[:n_found], k, 0, max(bound, 1))
    if n_reached > k:
        smallest += 1  # ties: those above first
    n_chosen = 0
    for i in range(n_found):
        chosen[n_chosen] = found[i]
        n_chosen += found_keys[i] >= smallest
    for i in range(n_found):
        if n_chosen == k:
            break
        chosen[n_chosen] = found[i]
        n_chosen += found_keys[i] == smallest - 1
    return max(bound, 1)


# -------------------------------------------------------------------- residual


@compiled()
def read_sum(out, residual, grid, gradient):
    """`out = residual + gradient` for one block."""
    n = len(out)
    if grid is None:
        for i in range(n):
            out[i] = as_float32(residual[i]) + gradient[i]
    else:
        step, zero, half = grid[0], grid[1], n // 2
        for i in range(half):
            out[i] = (np.float32(residual[i] & np.uint8(15)) - zero) * step + gradient[i]
        for i in range(half):
            out[half + i] = (np.float32(residual[i] >> np.uint8(4)) - zero) * step + gradient[half + i]


@compiled()
def _level(x, step, zero):
    """The 4-bit number of `x`."""
    return np.uint8(min(max(np.rint(x / step) + zero, np.float32(0)), np.float32(15)))


@compiled()
def write(residual, grid, x):
    """`residual = x` for one block, rounded to its format."""
    if grid is None:
        for i in range(len(x)):
            residual[i] = rounded(x[i], np.float32(1), residual)
    else:
        low, high = np.float32(0), np.float32(0)
        for i in range(len(x)):
            low, high = min(low, x[i]), max(high, x[i])
        step = np.float32((high - low) / np.float32(15))
        safe = step if step > 0 else np.float32(1)
        zero = np.float32(np.rint(-low / safe))
        grid[0], grid[1] = step, zero
        half = len(x) // 2
        for i in range(half):
            residual[i] = _level(x[i], safe, zero) | (_level(x[half + i], safe, zero) << np.uint8(4))


# --------------------------------------------------------------------- kernels


@compiled()
def accumulate_topk(start, stop, group, residual, grid, gradient, n_parts, indices, values, scales):
    """`torch_ops.accumulate_topk_` for the groups of blocks `start` to `stop`, where it accepts.

    Args:
        group: blocks in a group.
        residual: (B, block_size) float32 or uint16, or (B, block_size/2) uint8 with `grid`; changed in place.
        grid: (B, 2) float32 or `None`.
        n_parts: as in `select`.
        indices: (B, k), written.
        values: (B, k) float32, uint16 or int8, written.
        scales: (B/group,) float32, written, or `None`.
    """
    k, n = indices.shape[1], gradient.shape[1]
    sums = np.empty((group, n), np.float32)
    chosen = np.empty((group, n + 1), np.int32)
    maxima = np.empty(n // n_parts, np.int32)
    found, found_keys = np.empty(n + 1, np.int32), np.empty(n + 1, np.int32)
    guess = 0x3F800000
    for unit in range(start, stop):
        first = unit * group
        for member in range(group):
            b = first + member
            read_sum(sums[member], residual[b], None if grid is None else grid[b], gradient[b])
            guess = select(sums[member], k, n_parts, guess, maxima, found, found_keys, chosen[member])
        take(sums, chosen, indices[first : first + group], values[first : first + group], scales, unit)
        for member in range(group):
            write(residual[first + member], None if grid is None else grid[first + member], sums[member])


@compiled()
def take(sums, chosen, indices, values, scales, unit):
    """Move the chosen entries of a group of blocks to a row, in its format; the rounding error stays in `sums`.

    Args:
        sums: (group, n) float32.
        chosen: (group, n + 1) int32, from `select`.
        indices, values: (group, k), written.
        scales: as in `accumulate_topk`; number `unit` is written.
    """
    k = indices.shape[1]
    scale = np.float32(1)
    if scales is not None:
        scale = _largest(sums, chosen, k) / np.float32(127)
        scales[unit] = scale
    for member in range(len(sums)):
        x, taken = sums[member], chosen[member]
        for j in range(k):
            indices[member, j] = taken[j]
            values[member, j] = rounded(x[taken[j]], scale, values)
            x[taken[j]] -= as_float32(values[member, j]) * scale


@compiled()
def _largest(sums, chosen, k):
    """The largest magnitude among the chosen entries of a group of blocks."""
    largest = np.float32(0)
    for member in range(len(sums)):
        for j in range(k):
            largest = max(largest, abs(sums[member, chosen[member, j]]))
    return largest


@compiled(fastmath={"reassoc", "contract"})
def add_dots(out, block, indices, values, scales):
    """`out += G block` for one block, with (m, k) indices and values and (m,) scales or `None`."""
    for row in range(len(indices)):
        scale = np.float32(1) if scales is None else scales[row]
        total = 0.0
        for j in range(indices.shape[1]):
            stored = as_float32(values[row, j]) * scale
            total += np.float64(block[indices[row, j]]) * np.float64(stored)
        out[row] += total


@compiled()
def window_dots(start, stop, piece, indices, values, scales, group, x, out):
    """`torch_ops.window_dots`, summed over the blocks of each piece `start` to `stop`.

    Args:
        piece: blocks in a piece.
        indices: (B, m, k) uint8 or uint16.
        values: (B, m, k) float32, uint16 or int8.
        scales: (B/group, m) float32, or `None`.
        x: (B, block_size) float32 or float64.
        out: (pieces, m) float64, zero, added to.
    """
    for number in range(start, stop):
        for b in range(number * piece, min((number + 1) * piece, len(indices))):
            add_dots(out[number], x[b], indices[b], values[b], None if scales is None else scales[b // group])


@compiled()
def row_dots(start, stop, piece, indices, values, scales, group, row, block_size, out):
    """`torch_ops.row_dots`, summed over the blocks of each piece `start` to `stop`; arguments as in `window_dots`."""
    block = np.zeros(block_size, np.float32)
    for number in range(start, stop):
        for b in range(number * piece, min((number + 1) * piece, len(indices))):
            scale = np.float32(1) if scales is None else scales[b // group, row]
            for j in range(indices.shape[2]):
                block[indices[b, row, j]] = as_float32(values[b, row, j]) * scale
            add_dots(out[number], block, indices[b], values[b], None if scales is None else scales[b // group])
            for j in range(indices.shape[2]):
                block[indices[b, row, j]] = np.float32(0)


@compiled()
def window_combine(start, stop, indices, values, scales, group, weights, out):
    """`torch_ops.window_combine_` for the blocks `start` to `stop`; `weights` (m,) of the dtype of `out`."""
    for b in range(start, stop):
        add_rows(out[b], indices[b], values[b], None if scales is None else scales[b // group], weights)


@compiled()
def add_rows(block, indices, values, scales, weights):
    """`block += Gᵀ weights` for one block; see `add_dots`."""
    for row in range(len(indices)):
        weight = weights[row]
        scale = np.float32(1) if scales is None else scales[row]
        for j in range(indices.shape[1]):
            block[indices[row, j]] += weight * (as_float32(values[row, j]) * scale)
