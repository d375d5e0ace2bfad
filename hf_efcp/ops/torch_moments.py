"""Adam's moments in plain torch: the definition that compiled backends must equal, as in `torch_ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efcp.ops.torch_ops import entries_per_pass

ADAM_EPS = 1e-8  # AdamW's default in torch and in transformers
_CHUNK = 1 << 18  # entries at a time: temporaries stay in cache


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
    """Replace `update` by Adam's direction over it (arXiv 1412.6980).

    Moments in bfloat16 are rounded to the nearest (first) and stochastically (second): an average with β₂ = 0.999
    changes by less than half a step of bfloat16 and would stand still.

    Args:
        update: (n,) float32, changed in place and returned.
        first, second: (n,) float32 or bfloat16, the moments, changed in place.
        step: () number of steps taken, this one included.
        accept: () bool; where false, the moments stay as they are and the update becomes zero.
    """
    count = step.double()
    correction1, correction2 = ((1 - beta**count).float() for beta in (beta1, beta2))
    size = entries_per_pass(update.device, _CHUNK)
    for u, m, v in zip(update.split(size), first.split(size), second.split(size), strict=True):
        mean = m.float().lerp(u, 1 - beta1)
        square = v.float().lerp(u.square(), 1 - beta2)
        m.copy_(torch.where(accept, mean, m.float()))
        v.copy_(torch.where(accept, _rounded(square, v.dtype, step), v.float()))
        direction = mean.div_(correction1).div_(square.div_(correction2).sqrt_().add_(eps))
        torch.where(accept, direction, direction.new_zeros(()), out=u)
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
    """Take a gradient into Adam's moments, and replace it by the mean without its start at zero, `m/(1 − β₁ᵗ)`.

    With `adam_direction_`, what is preconditioned may be the mean: together, without a preconditioner, they are
    `adam_`, but that both moments are read as they are stored: a step need not hold the mean besides.

    Args:
        gradient: (n,) float32, changed in place and returned.
        first, second, step, accept: as in `adam_`; `second` may be missing. Where `accept` is false, moments stay.
    """
    size = entries_per_pass(gradient.device, _CHUNK)
    factor = (1 / (1 - beta1 ** step.double())).float()
    squares = [None] * -(-len(gradient) // size) if second is None else second.split(size)
    for g, m, v in zip(gradient.split(size), first.split(size), squares, strict=True):
        if v is not None:
            square = v.float().lerp(g.square(), 1 - beta2)
            v.copy_(torch.where(accept, _rounded(square, v.dtype, step), v.float()))
        mean = m.float().lerp(g, 1 - beta1).to(m.dtype)
        m.copy_(torch.where(accept, mean, m))
        torch.mul(mean.float(), factor, out=g)
    return gradient


def adam_direction_(
    update: Tensor, second: Tensor, step: Tensor, accept: Tensor, *, beta2: float, eps: float = ADAM_EPS
) -> Tensor:
    """Divide `update`, (n,) float32, by `√(v/(1 − β₂ᵗ)) + eps`, `v` the second moment; zero unless accepted."""
    size = entries_per_pass(update.device, _CHUNK)
    correction = (1 - beta2 ** step.double()).float()
    for u, v in zip(update.split(size), second.split(size), strict=True):
        root = v.float().div(correction).sqrt_().add_(eps)
        torch.where(accept, u / root, u.new_zeros(()), out=u)
    return update


def _rounded(x: Tensor, dtype: torch.dtype, step: Tensor) -> Tensor:
    """`x` rounded to bfloat16 stochastically, as float32; as it is for float32.

    The noise is a hash of the value's own bits and the step: no generator, so that resume and ranks agree.
    """
    if dtype is torch.float32:
        return x
    bits = x.view(torch.int32)
    noise = ((bits ^ step.to(bits.device, torch.int32) * 0x3C6EF35F) * -0x61C88647 >> 8) & 0xFFFF
    return (bits + noise & -0x10000).view(torch.float32)
