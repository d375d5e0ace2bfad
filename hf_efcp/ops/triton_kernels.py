"""Window dots and combine as Triton kernels: one launch each, whatever the number of tensors.

Formats, names and shapes are those of `torch_ops`. Floats are neither fused nor reassociated (the launches say
`enable_fp_fusion=False`), sums have one fixed order and no float is added atomically: every run of a step gives the
same bits. Offsets inside a block's rows fit 32 bits; those of blocks are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_efcp.ops.triton_topk import float32


@triton.jit
def window_dots(
    x_ptr,
    row_ptr,
    indices_ptr,
    values_ptr,
    scales_ptr,
    parts_ptr,
    n_blocks,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,  # blocks that share a scale
    COLUMNS: tl.constexpr,  # BLOCK_SIZE, up to a power of two
    SPAN: tl.constexpr,  # rows of the window for one program
    TILE: tl.constexpr,  # rows at a time
    WIDTH: tl.constexpr,  # entries of a row at a time
    INT8: tl.constexpr,
    OF_ROW: tl.constexpr,  # x is row `row` of the window; `x_ptr` is memory for a block of each program
    STAGED: tl.constexpr,  # whether a block of x fits into shared memory
):
    """Each program's part of `torch_ops.window_dots` or `row_dots`: `parts` (programs, WINDOW) float64.

    A program takes every n-th block and rows from `program_id(1)·SPAN` on. The sum over `parts` is the caller's.
    """
    program, n_programs = tl.program_id(0), tl.num_programs(0)
    first = tl.program_id(1) * SPAN
    chunk = tl.arange(0, SPAN // TILE)
    e = tl.arange(0, WIDTH)
    total = tl.zeros((SPAN // TILE, TILE), tl.float64)
    column = tl.arange(0, COLUMNS)
    slot = x_ptr + (program.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * BLOCK_SIZE
    if OF_ROW:
        tl.store(slot + column, tl.zeros((COLUMNS,), tl.float32), mask=column < BLOCK_SIZE)
        tl.debug_barrier()
        row = tl.load(row_ptr).to(tl.int32)
    for number in range(program, n_blocks, n_programs):
        block = tl.zeros((), tl.int64) + number
        start = block * (WINDOW * K)
        scales_of = scales_ptr
        if INT8:
            scales_of += block // GROUP * WINDOW
        if OF_ROW:
            for k in range(0, K, WIDTH):
                entry = start + row * K + k + e
                value = float32(tl.load(values_ptr + entry, mask=k + e < K, other=0))
                if INT8:
                    value *= tl.load(scales_of + row)
                index = tl.load(indices_ptr + entry, mask=k + e < K, other=0).to(tl.int32)
                tl.store(slot + index, value, mask=k + e < K)
            tl.debug_barrier()  # what other threads wrote is read below
        else:
            slot = x_ptr + block * BLOCK_SIZE
        if STAGED:
            x = tl.load(slot + column, mask=column < BLOCK_SIZE, other=0.0)
        for t in range(SPAN // TILE):
            rows = first + t * TILE + tl.arange(0, TILE)
            sums = tl.zeros((TILE,), tl.float64)
            for k in range(0, K, WIDTH):
                mask = (rows < WINDOW)[:, None] & (k + e < K)[None, :]
                entry = start + (rows * K)[:, None] + (k + e)[None, :]
                index = tl.load(indices_ptr + entry, mask=mask, other=0).to(tl.int32)
                value = float32(tl.load(values_ptr + entry, mask=mask, other=0))
                if INT8:
                    value *= tl.load(scales_of + rows, mask=rows < WINDOW, other=0.0)[:, None]
                if STAGED:
                    gathered = tl.reshape(tl.gather(x, tl.reshape(index, (TILE * WIDTH,)), 0), (TILE, WIDTH))
                else:
                    gathered = tl.load(slot + index, mask=mask, other=0.0)
                products = gathered.to(tl.float64) * value.to(tl.float64)
                sums += tl.sum(tl.where(mask, products, 0.0), axis=1)
            total += tl.where((chunk == t)[:, None], sums[None, :], 0.0)
        if OF_ROW:
            tl.debug_barrier()
            for k in range(0, K, WIDTH):
                index = tl.load(indices_ptr + start + row * K + k + e, mask=k + e < K, other=0).to(tl.int32)
                tl.store(slot + index, tl.zeros((WIDTH,), tl.float32), mask=k + e < K)
            tl.debug_barrier()
    rows = first + chunk[:, None] * TILE + tl.arange(0, TILE)[None, :]
    tl.store(parts_ptr + program * WINDOW + rows, total, mask=rows < WINDOW)


@triton.jit
def add_rows(
    out,
    weights,
    indices_ptr,
    values_ptr,
    scales_ptr,
    block,
    WINDOW: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,  # K, up to a power of two
    INT8: tl.constexpr,
):
    """Add one block of all rows, each times its weight, to the block at `out`.

    Indices of a row differ, so its entries are added side by side; rows one after the other. The next row is on its
    way while one is added. The block of `out` stays in the multiprocessor's cache.
    """
    e = tl.arange(0, WIDTH)
    entry = block * (WINDOW * K) + e
    scales_of = scales_ptr
    if INT8:
        scales_of += block // GROUP * WINDOW
    index = tl.load(indices_ptr + entry, mask=e < K, other=0).to(tl.int32)
    value = float32(tl.load(values_ptr + entry, mask=e < K, other=0))
    for row in range(WINDOW):
        entry += K
        more = (e < K) & (row + 1 < WINDOW)
        next_index = tl.load(indices_ptr + entry, mask=more, other=0).to(tl.int32)
        next_value = float32(tl.load(values_ptr + entry, mask=more, other=0))
        if INT8:
            value *= tl.load(scales_of + row)
        before = tl.load(out + index, mask=e < K, other=0.0)
        term = value.to(before.dtype) * tl.load(weights + row)
        tl.store(out + index, before + term, mask=e < K)
        tl.debug_barrier()  # the next row may be added to the same entries by other threads
        index, value = next_index, next_value


@triton.jit
def window_combine(
    out_ptr,
    indices_ptr,
    values_ptr,
    scales_ptr,
    weights_ptr,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    INT8: tl.constexpr,
):
    """`torch_ops.window_combine_` for one block a program."""
    block = tl.program_id(0).to(tl.int64)
    out = out_ptr + block * BLOCK_SIZE
    add_rows(out, weights_ptr, indices_ptr, values_ptr, scales_ptr, block, WINDOW, K, GROUP, WIDTH, INT8)
