"""Adam's moments as a Triton kernel: one pass over update and moments, in one launch."""

from __future__ import annotations

# pyright: reportArgumentType=false, reportCallIssue=false
# Numbers stand for `tl.constexpr` at a launch, whose own options no signature has.
import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_efcp.ops.torch_moments import ADAM_EPS
from hf_efcp.ops.triton_topk import float32, rounded

_PER_PROGRAM = 1024


@triton.jit
def at_random(x, step):
    """`x` rounded to bfloat16 stochastically, as float32: the noise is a hash of its bits and the step."""
    bits = x.to(tl.int32, bitcast=True)
    noise = (((bits ^ (step.to(tl.int32) * 0x3C6EF35F)) * -0x61C88647) >> 8) & 0xFFFF
    return ((bits + noise) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def moved_direction(u, first, second, mask, kept, rate1, rate2, correction1, correction2, step, EPS: tl.constexpr):
    """Adam's direction over `u`, the moments at `first` and `second` brought up to date where `kept`.

    Rates are `1 − β`, corrections `1 − βᵗ`, all float32; `step` is t, int32.
    """
    mean = float32(tl.load(first, mask=mask, other=0.0))
    square = float32(tl.load(second, mask=mask, other=0.0))
    mean += rate1 * (u - mean)
    square += rate2 * (u * u - square)
    tl.store(first, rounded(mean, first.dtype.element_ty), mask=kept)
    stored = square
    if second.dtype.element_ty == tl.bfloat16:
        stored = at_random(square, step)
    tl.store(second, rounded(stored, second.dtype.element_ty), mask=kept)
    return tl.div_rn(tl.div_rn(mean, correction1), tl.sqrt_rn(tl.div_rn(square, correction2)) + EPS)


@triton.jit
def adam(
    update_ptr,
    first_ptr,
    second_ptr,
    corrections_ptr,
    step_ptr,
    accept_ptr,
    n,
    rate1,  # an argument and no constant: schedulers of momentum change it at each step
    rate2,
    EPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """`torch_moments.adam_` for `SIZE` entries a program; see `moved_direction`."""
    start = tl.program_id(0).to(tl.int64) * SIZE
    i = tl.arange(0, SIZE)
    left = n - start
    mask = i < left
    kept = i < left * tl.load(accept_ptr).to(tl.int32)  # a scalar condition would have to be made a vector
    first, second = first_ptr + start + i, second_ptr + start + i
    u = tl.load(update_ptr + start + i, mask=mask, other=0.0)
    correction1, correction2 = tl.load(corrections_ptr), tl.load(corrections_ptr + 1)
    step = tl.load(step_ptr).to(tl.int32)
    u = moved_direction(u, first, second, mask, kept, rate1, rate2, correction1, correction2, step, EPS)
    tl.store(update_ptr + start + i, tl.where(kept, u, 0.0), mask=mask)


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
    if not update.numel():
        return update
    with torch.cuda.device_of(update):
        adam[(triton.cdiv(update.numel(), _PER_PROGRAM),)](
            *(update, first, second, corrections(step, beta1, beta2), step, accept.view(torch.uint8)),
            *(update.numel(), 1 - beta1, 1 - beta2),
            EPS=eps,
            SIZE=_PER_PROGRAM,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return update


@triton.jit
def adam_mean(
    gradient_ptr,
    first_ptr,
    second_ptr,
    factor_ptr,
    step_ptr,
    accept_ptr,
    n,
    rate1,
    rate2,
    HAS_SECOND: tl.constexpr,
    SIZE: tl.constexpr,
):
    """`torch_moments.adam_mean_` for `SIZE` entries a program; `factor` is `1/(1 − β₁ᵗ)`, float32."""
    start = tl.program_id(0).to(tl.int64) * SIZE
    i = tl.arange(0, SIZE)
    left = n - start
    mask = i < left
    kept = i < left * tl.load(accept_ptr).to(tl.int32)
    g = tl.load(gradient_ptr + start + i, mask=mask, other=0.0)
    mean = float32(tl.load(first_ptr + start + i, mask=mask, other=0.0))
    stored = rounded(mean + rate1 * (g - mean), first_ptr.dtype.element_ty)
    tl.store(first_ptr + start + i, stored, mask=kept)
    if HAS_SECOND:
        square = float32(tl.load(second_ptr + start + i, mask=mask, other=0.0))
        square += rate2 * (g * g - square)
        if second_ptr.dtype.element_ty == tl.bfloat16:
            square = at_random(square, tl.load(step_ptr))
        tl.store(second_ptr + start + i, rounded(square, second_ptr.dtype.element_ty), mask=kept)
    tl.store(gradient_ptr + start + i, float32(stored) * tl.load(factor_ptr), mask=mask)


@triton.jit
def adam_direction(update_ptr, second_ptr, corrections_ptr, accept_ptr, n, EPS: tl.constexpr, SIZE: tl.constexpr):
    """`torch_moments.adam_direction_` for `SIZE` entries a program; `corrections` has `1 − β₂ᵗ`, float32."""
    start = tl.program_id(0).to(tl.int64) * SIZE
    i = tl.arange(0, SIZE)
    left = n - start
    mask = i < left
    kept = i < left * tl.load(accept_ptr).to(tl.int32)
    u = tl.load(update_ptr + start + i, mask=mask, other=0.0)
    square = float32(tl.load(second_ptr + start + i, mask=mask, other=0.0))
    root = tl.sqrt_rn(tl.div_rn(square, tl.load(corrections_ptr))) + EPS
    tl.store(update_ptr + start + i, tl.where(kept, tl.div_rn(u, root), 0.0), mask=mask)


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
    if not gradient.numel():
        return gradient
    factor = (1 / (1 - beta1 ** step.double())).float()
    with torch.cuda.device_of(gradient):
        adam_mean[(triton.cdiv(gradient.numel(), _PER_PROGRAM),)](
            *(gradient, first, first if second is None else second, factor, step, accept.view(torch.uint8)),
            *(gradient.numel(), 1 - beta1, 1 - beta2),
            HAS_SECOND=second is not None,
            SIZE=_PER_PROGRAM,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return gradient


def adam_direction_(
    update: Tensor, second: Tensor, step: Tensor, accept: Tensor, *, beta2: float, eps: float = ADAM_EPS
) -> Tensor:
    """See `torch_moments.adam_direction_`."""
    if not update.numel():
        return update
    correction = (1 - beta2 ** step.double()).float()
    with torch.cuda.device_of(update):
        adam_direction[(triton.cdiv(update.numel(), _PER_PROGRAM),)](
            *(update, second, correction, accept.view(torch.uint8), update.numel()),
            EPS=eps,
            SIZE=_PER_PROGRAM,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return update


def corrections(step: Tensor, beta1: float, beta2: float) -> Tensor:
    """(2,) float32, `1 − βᵗ` of both."""
    count = step.double()
    return torch.stack([1 - beta1**count, 1 - beta2**count]).float()
