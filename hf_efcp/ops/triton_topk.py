"""Block top-k with error feedback as a Triton kernel: one launch, whatever the number of tensors.

Formats, names and shapes are those of `torch_ops`. Floats are neither fused nor reassociated (the launches say
`enable_fp_fusion=False`), sums have one fixed order and no float is added atomically: every run of a step gives the
same bits. Offsets inside a block's rows fit 32 bits; those of blocks are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def float32(x):
    """The number, a bfloat16 by its bits: the interpreter's own conversions round towards zero."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Float32 numbers in `dtype`, bfloat16 with ties to even."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x != x, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _round_even(x):
    """The nearest integer, ties to even, of a float32 below 2²²: what is added leaves no bit for the fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _of_rows(x):
    """(R,) as something that an (R, n) compares with: (R, 1), or a scalar for one row, which needs no layout."""
    if x.shape[0] == 1:
        return tl.max(x, axis=0)
    else:
        return x[:, None]


@triton.jit
def _largest(x):
    """Of a scalar or an (R, 1), as a scalar."""
    if x.type.is_block():
        return tl.max(tl.max(x, axis=1), axis=0)
    else:
        return x


@triton.jit
def _bound(keys, low, K: tl.constexpr):
    """For each row of `keys` (R, n) int32 a bound that `K` keys reach: by exactly `K` of them, or the K-th largest.

    Bisection over the bits from `low` on, which `K` keys must reach. Bits of non-negative floats order as the
    floats do.
    """
    high = _of_rows(tl.max(keys, axis=1))
    while _largest(high - low) > 0:
        middle = high - (high - low) // 2
        count = _of_rows(tl.sum((keys >= middle).to(tl.int32), axis=1))
        is_open = low < high
        low = tl.where((count >= K) & is_open, middle, low)
        high = tl.where((count > K) | (is_open == 0), high, tl.where(count == K, low, middle - 1))
    return low


@triton.jit
def _places(keys, K: tl.constexpr, GROUPS: tl.constexpr):
    """Which of the `keys` (R, n) int32, negative for none, are the `K` largest of their row, the lowest index first
    among equal ones, and the place of each among them, 0 … K − 1: those above the K-th key first.
    """
    rows: tl.constexpr = keys.shape[0]
    low = _of_rows(tl.zeros((rows,), tl.int32))
    if rows == 1 and GROUPS >= 2 * K:
        # What K maxima of groups reach starts the search close to its end, and one thread in a few holds a maximum.
        low = _bound(tl.max(tl.reshape(keys, (1, GROUPS, keys.shape[1] // GROUPS)), axis=2), low, K)
    low = _bound(keys, low, K)
    above = (keys > low).to(tl.int32)
    equal = (keys == low).to(tl.int32)
    ranks = tl.cumsum(above + (equal << 16), axis=1)  # two counts, each at most 2¹⁵
    n_above = _of_rows(tl.sum(above, axis=1))
    place = tl.where(above > 0, ranks & 0xFFFF, n_above + ((ranks >> 16) & 0xFFFF)) - 1
    return tl.where((above + equal > 0) & (place < K), place, -1)


@triton.jit
def _spread(x, columns: tl.constexpr):
    """(R,) numbers of rows for each of the R·columns entries."""
    return tl.reshape(tl.broadcast_to(x[:, None], (x.shape[0], columns)), (x.shape[0] * columns,))


@triton.jit
def _quotient(x, y):
    """`x/y`, correctly rounded, for any y but 0."""
    return tl.div_rn(x, tl.where(y > 0, y, 1.0))


@triton.jit
def push_topk(
    residual_ptr,
    grid_ptr,
    gradient_ptr,
    indices_ptr,
    values_ptr,
    scales_ptr,
    row_ptr,
    accept_ptr,
    n_blocks,
    window,
    BLOCK_SIZE: tl.constexpr,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,  # of this program; those that share a scale
    ROWS: tl.constexpr,  # BLOCKS, up to a power of two
    COLUMNS: tl.constexpr,  # BLOCK_SIZE, so that each of PARTS is a power of two
    GROUPS: tl.constexpr,  # of COLUMNS
    PARTS: tl.constexpr,  # of a block: 2 for 4 bits, one in each half of the bytes
    INT8: tl.constexpr,
    FRESH: tl.constexpr,  # whether the rows are new memory, written in any case
):
    """`torch_ops.push_topk_` in one pass over residual and gradient."""
    LENGTH: tl.constexpr = BLOCK_SIZE // PARTS
    PADDED: tl.constexpr = COLUMNS // PARTS
    # Everything is one-dimensional but what is reduced by rows: other shapes cost conversions between layouts. And
    # offsets from the program's first block are 32-bit: half the registers.
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    i = tl.arange(0, ROWS * COLUMNS)
    block, within, part = i // COLUMNS, i % PADDED, i % COLUMNS // PADDED
    column = part * LENGTH + within
    here = block * BLOCK_SIZE + column
    mask = (block < BLOCKS) & (first + block < n_blocks) & (within < LENGTH)
    accept = tl.load(accept_ptr).to(tl.int32)  # 0 or 1
    if FRESH:
        row, writes = 0, 1
    else:
        row, writes = tl.load(row_ptr), accept
    x = tl.load(gradient_ptr + first * BLOCK_SIZE + here, mask=mask, other=0.0)
    grid = grid_ptr
    in_grid = tl.arange(0, ROWS)
    if PARTS == 2:
        grid += 2 * (first + in_grid)
        in_grid = (in_grid < BLOCKS) & (first + in_grid < n_blocks)
        packed = tl.load(residual_ptr + first * LENGTH + block * LENGTH + within, mask=mask, other=0).to(tl.int32)
        level = tl.where(part == 1, packed >> 4, packed & 15).to(tl.float32)
        step, zero = tl.load(grid, mask=in_grid, other=0.0), tl.load(grid + 1, mask=in_grid, other=0.0)
        x += (level - _spread(zero, COLUMNS)) * _spread(step, COLUMNS)
    else:
        x += float32(tl.load(residual_ptr + first * BLOCK_SIZE + here, mask=mask, other=0.0))

    magnitude = tl.where(mask, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
    place = tl.reshape(_places(tl.reshape(magnitude, (ROWS, COLUMNS)), K, GROUPS), (ROWS * COLUMNS,))
    if INT8:
        scale = tl.div_rn(tl.max(magnitude, axis=0).to(tl.float32, bitcast=True), 127.0)
        value = tl.minimum(tl.maximum(_round_even(_quotient(x, scale)), -127.0), 127.0).to(tl.int8)
        stored = value.to(tl.float32) * scale
        tl.store(scales_ptr + tl.program_id(0).to(tl.int64) * window + row, scale, mask=writes != 0)
    else:
        value = rounded(x, values_ptr.dtype.element_ty)
        stored = float32(value)
    start = (first * window + row) * K
    entry = block * (window * K) + place
    taken = place >= 0
    written = place >= K * (1 - writes)  # a bound for the mask: a scalar condition would have to be made a vector
    tl.store(indices_ptr + start + entry, column.to(indices_ptr.dtype.element_ty), mask=written)
    tl.store(values_ptr + start + entry, value, mask=written)

    x = tl.where(taken, x - stored, x)
    if PARTS == 2:
        x = tl.reshape(tl.where(mask, x, 0.0), (ROWS, COLUMNS))
        low, high = tl.minimum(tl.min(x, axis=1), 0.0), tl.maximum(tl.max(x, axis=1), 0.0)
        step = tl.div_rn(high - low, 15.0)
        zero = _round_even(_quotient(-low, step))
        level = _round_even(_quotient(x, tl.broadcast_to(step[:, None], (ROWS, COLUMNS)))) + zero[:, None]
        level = tl.reshape(tl.minimum(tl.maximum(level, 0.0), 15.0).to(tl.int32), (ROWS, 2, PADDED))
        packed = tl.reshape(tl.sum(level << (4 * tl.arange(0, 2))[None, :, None], axis=1), (ROWS * PADDED,))
        j = tl.arange(0, ROWS * PADDED)
        block, within = j // PADDED, j % PADDED
        there = (block < BLOCKS) & (first + block < n_blocks) & (within < accept * LENGTH)
        tl.store(residual_ptr + first * LENGTH + block * LENGTH + within, packed.to(tl.uint8), mask=there)
        in_grid &= tl.arange(0, ROWS) < accept * ROWS
        tl.store(grid, step, mask=in_grid)
        tl.store(grid + 1, zero, mask=in_grid)
    else:
        to = residual_ptr + first * BLOCK_SIZE + here
        tl.store(to, rounded(x, residual_ptr.dtype.element_ty), mask=mask & (within < accept * LENGTH))
