"""The end of a step as one Triton kernel: `Gᵀc + s·x`, momentum or Adam's moments, and the weights.

A block of the update stays in the multiprocessor's cache from its first row to its weights. What follows a norm of
the whole update (`scaling="rms"`) is a second launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_efcp.ops.caution import BOLD
from hf_efcp.ops.fused import Moments, Rows, Weights
from hf_efcp.ops.torch_moments import ADAM_EPS
from hf_efcp.ops.triton_kernels import add_rows
from hf_efcp.ops.triton_moments import corrections, moved_direction
from hf_efcp.ops.triton_topk import float32, rounded

_CHUNK = 256  # entries of a block at a time for one warp: 512 would take 92 registers a thread


@triton.jit
def _stochastic(x, step, dtype: tl.constexpr):
    """`optim.rounding.stochastically`."""
    DROPPED: tl.constexpr = 16 if dtype == tl.bfloat16 else 13
    bits = x.to(tl.int32, bitcast=True)
    noise = (bits ^ (step * 0x3C6EF35F)) * -0x61C88647
    noise = (noise ^ (noise >> 15)) * 0x2C1B3C6D
    noise = (noise >> 12) & ((1 << DROPPED) - 1)
    x = ((bits + noise) & -(1 << DROPPED)).to(tl.float32, bitcast=True)
    return rounded(x, dtype)


@triton.jit
def _move(
    address,
    kind,
    at,
    mask,
    u,
    lr,
    factor,
    step,
    dtype: tl.constexpr,
    KIND: tl.constexpr,  # place of the dtype in `fused.KINDS`
    STOCHASTIC: tl.constexpr,
):
    """`w ← factor·w − lr·u` for weights of this dtype, rounded as `optim.apply` does; others stay."""
    if kind == KIND:
        w = address.to(tl.pointer_type(dtype)) + at
        x = float32(tl.load(w, mask=mask, other=0.0)) * factor
        if dtype == tl.float32:
            tl.store(w, x - lr * u, mask=mask)
        elif STOCHASTIC:
            tl.store(w, _stochastic(x - lr * u, step, dtype), mask=mask)
        else:
            tl.store(w, rounded(float32(rounded(x, dtype)) - lr * u, dtype), mask=mask)


@triton.jit
def _read(address, kind, at, mask, dtype: tl.constexpr, KIND: tl.constexpr):
    """Entries of a vector of this dtype as float32; of others zeros."""
    return float32(tl.load(address.to(tl.pointer_type(dtype)) + at, mask=mask & (kind == KIND), other=0.0))


@triton.jit
def combine_step(
    out_ptr,
    indices_ptr,
    values_ptr,
    scales_ptr,
    coefficients_ptr,
    own_ptr,
    first_ptr,
    second_ptr,
    corrections_ptr,
    factors_ptr,
    squares_ptr,
    pieces_ptr,
    table_ptr,
    rates_ptr,
    against_ptr,
    accept_ptr,
    step_ptr,
    rate1,
    rate2,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: nothing to combine
    K: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    INT8: tl.constexpr,
    OWN: tl.constexpr,  # what x counts: 0, 1, or 2 for the numbers at `own_ptr`
    EACH: tl.constexpr,  # 1 where each piece has its own coefficients, 0 where the model has one set
    MOMENTS: tl.constexpr,  # 0: none, 1: momentum, 2: Adam's, 3: Adam's second, as it is
    EPS: tl.constexpr,
    FACTORS: tl.constexpr,  # 0: none, 1: one for the model, 2: one for each piece
    SQUARES: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    BOLD: tl.constexpr,
    STORE: tl.constexpr,
    FLOAT32: tl.constexpr,  # dtypes of weights
    BFLOAT16: tl.constexpr,
    FLOAT16: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One block a program; nothing where the step is not accepted. See `combine_step_`."""
    if tl.load(accept_ptr).to(tl.int32) == 0:
        return
    block = tl.program_id(0).to(tl.int64)
    piece = tl.load(pieces_ptr + block).to(tl.int64)
    out = out_ptr + block * BLOCK_SIZE
    e = tl.arange(0, CHUNK)
    if WINDOW:
        if OWN != 1:
            for start in range(0, BLOCK_SIZE, CHUNK):
                i = start + e
                x = tl.zeros((CHUNK,), tl.float32)
                if OWN == 2:
                    x = tl.load(out + i, mask=i < BLOCK_SIZE, other=0.0) * tl.load(own_ptr + EACH * piece)
                tl.store(out + i, x, mask=i < BLOCK_SIZE)
            tl.debug_barrier()
        weights = coefficients_ptr + EACH * piece * WINDOW
        add_rows(out, weights, indices_ptr, values_ptr, scales_ptr, block, WINDOW, K, GROUP, WIDTH, INT8)
    step = tl.load(step_ptr).to(tl.int32)
    if MOMENTS >= 2:
        correction1, correction2 = tl.load(corrections_ptr), tl.load(corrections_ptr + 1)
    if FLOAT32 or BFLOAT16 or FLOAT16:
        address, kind = tl.load(table_ptr + piece * 5), tl.load(table_ptr + piece * 5 + 1)
        numel, first_block = tl.load(table_ptr + piece * 5 + 2), tl.load(table_ptr + piece * 5 + 3)
        group = tl.load(table_ptr + piece * 5 + 4)
        lr, factor = tl.load(rates_ptr + group * 2), tl.load(rates_ptr + group * 2 + 1)
    if CAUTIOUS:
        against, against_kind = tl.load(against_ptr + piece * 5), tl.load(against_ptr + piece * 5 + 1)
    squares = tl.zeros((CHUNK,), tl.float64)
    for start in range(0, BLOCK_SIZE, CHUNK):
        i = start + e
        mask = i < BLOCK_SIZE
        u = tl.load(out + i, mask=mask, other=0.0)
        if MOMENTS == 1 or MOMENTS == 2:
            first = first_ptr + block * BLOCK_SIZE + i
        if MOMENTS >= 2:
            second = second_ptr + block * BLOCK_SIZE + i
        if MOMENTS == 3:
            square = float32(tl.load(second, mask=mask, other=0.0))
            u = tl.div_rn(u, tl.sqrt_rn(tl.div_rn(square, correction2)) + EPS)
        elif MOMENTS == 2:
            u = moved_direction(u, first, second, mask, mask, rate1, rate2, correction1, correction2, step, EPS)
        elif MOMENTS == 1:
            u += float32(tl.load(first, mask=mask, other=0.0)) * rate1
            tl.store(first, rounded(u, first_ptr.dtype.element_ty), mask=mask)
        if FACTORS:
            u *= tl.load(factors_ptr + (FACTORS - 1) * piece)
        if SQUARES:
            squares += tl.where(mask, u.to(tl.float64) * u.to(tl.float64), 0.0)
        if FLOAT32 or BFLOAT16 or FLOAT16:
            at = (block - first_block) * BLOCK_SIZE + i
            inside = mask & (at < numel)
        if CAUTIOUS:
            g = tl.zeros((CHUNK,), tl.float32)
            if FLOAT32:
                g += _read(against, against_kind, at, inside, tl.float32, 0)
            if BFLOAT16:
                g += _read(against, against_kind, at, inside, tl.bfloat16, 1)
            if FLOAT16:
                g += _read(against, against_kind, at, inside, tl.float16, 2)
            ahead = ((u > 0) & (g > 0)) | ((u < 0) & (g < 0))
            back = ((u > 0) & (g < 0)) | ((u < 0) & (g > 0))
            u = tl.where(ahead, u * BOLD, tl.where(back, 0.0, u))
        if STORE:
            tl.store(out + i, u, mask=mask)
        if FLOAT32 or BFLOAT16 or FLOAT16:
            if FLOAT32:
                _move(address, kind, at, inside, u, lr, factor, step, tl.float32, 0, STOCHASTIC)
            if BFLOAT16:
                _move(address, kind, at, inside, u, lr, factor, step, tl.bfloat16, 1, STOCHASTIC)
            if FLOAT16:
                _move(address, kind, at, inside, u, lr, factor, step, tl.float16, 2, STOCHASTIC)
    if SQUARES:
        tl.store(squares_ptr + block, tl.sum(squares, axis=0))


def combine_step_(
    out: Tensor,
    step: Tensor,
    accept: Tensor,
    *,
    pieces: Tensor,
    rows: Rows | None = None,
    moments: Moments | None = None,
    factors: Tensor | None = None,
    squares: Tensor | None = None,
    weights: Weights | None = None,
    against: Tensor | None = None,
    store: bool = False,
) -> None:
    """In one launch: x in `out` becomes `s·x + Gᵀc`, its direction by the moments, and a step of the weights.

    What is `None` is left out; nothing at all happens where `accept` is false. The steps are those of
    `torch_ops.window_combine_`, `optim.scaling`, `cautious` and `optim.apply`, in this order.

    Args:
        out: (B, block_size) float32; scratch afterwards, but for `store`.
        step: () int64, steps taken, this one included.
        accept: () bool.
        pieces: (B,) int32, the piece of each block.
        factors: (1,) or (pieces,) float32, what the direction is multiplied by.
        squares: (B,) float64, written: each block's sum of squares of the direction.
        against: table of the gradients, of the weights' dtypes, of which the step is `cautious`; with `weights`.
        store: whether `out` is to hold the direction.
    """
    n_blocks, block_size = out.shape
    if not n_blocks:
        return
    indices, values, scales, coefficients, own = rows or (None, None, None, None, 1.0)
    window, k = (0, 1) if rows is None else indices.shape[1:]
    kind = 0 if moments is None else 1 if moments.second is None else 3 if moments.first is None else 2
    rates = (0.0, 0.0)
    if moments is not None:
        rates = (moments.beta1, 0.0) if kind == 1 else (1 - moments.beta1, 1 - moments.beta2)
    dtypes = weights.dtypes if weights is not None else frozenset()
    width = triton.next_power_of_2(k)
    n_warps = min(32, max(1, width // 64))
    with torch.cuda.device_of(out):
        combine_step[(n_blocks,)](
            *(out, indices, values, scales, coefficients, own if isinstance(own, Tensor) else None),
            *((moments.first, moments.second) if moments else (None, None)),
            corrections(step, moments.beta1, moments.beta2) if kind >= 2 else None,
            *(factors, squares, pieces),
            *((weights.table, weights.rates, against) if weights else (None, None, None)),
            *(accept.view(torch.uint8), step, *rates),
            BLOCK_SIZE=block_size,
            WINDOW=window,
            K=k,
            GROUP=1 if scales is None or not len(scales) else n_blocks // len(scales),
            WIDTH=width,
            INT8=scales is not None,
            OWN=2 if isinstance(own, Tensor) else int(own or 0),
            EACH=int(coefficients is not None and len(coefficients) > 1),
            MOMENTS=kind,
            EPS=ADAM_EPS,
            FACTORS=0 if factors is None else 1 + (len(factors) > 1),
            SQUARES=squares is not None,
            CAUTIOUS=weights is not None and against is not None,
            BOLD=BOLD,
            STORE=store,
            FLOAT32=torch.float32 in dtypes,
            BFLOAT16=torch.bfloat16 in dtypes,
            FLOAT16=torch.float16 in dtypes,
            STOCHASTIC=weights is not None and weights.stochastic,
            CHUNK=min(_CHUNK * n_warps, triton.next_power_of_2(block_size)),
            num_warps=n_warps,
            enable_fp_fusion=False,
        )
