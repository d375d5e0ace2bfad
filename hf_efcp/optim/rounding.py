"""Weights of 16 bits: steps below their precision, kept on average."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from hf_efcp.optim.options import Option

WEIGHT_ROUNDING = Option(
    "weight_rounding",
    str,
    "of bfloat16 and float16 weights; to the nearest, steps below half a unit in the last place are lost",
    choices=("stochastic", "nearest"),
    source="arXiv 2010.06192",
)

_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of float32's significand
_SALT = 0x3C6EF35F
_CHUNK = 1 << 18  # entries at a time: temporaries stay in cache


def step_rounded_(weight: Tensor, update: Tensor, *, factor: Tensor | float, lr: float, step: Tensor | int) -> None:
    """`w ← factor·w − lr·update`, computed in float32 and rounded stochastically to the dtype of `w`.

    The probability of either neighbour is its nearness, so the mean of many steps is that of exact ones. What is
    representable stays as it is. The noise is a hash of the result's own bits and the step: no generator, so that
    resumed runs and ranks agree.

    Args:
        weight: of any shape and memory format, bfloat16 or float16; changed in place.
        update: of its shape.
        factor: of decay, () or a number.
        step: () int64, or the host's number.
    """
    step = step.to(weight.device) if isinstance(step, Tensor) else step
    flat = weight.view(-1) if weight.is_contiguous() else weight.reshape(-1)  # a copy, written back below
    for w, u in zip(flat.split(_CHUNK), update.reshape(-1).split(_CHUNK), strict=True):
        w.copy_(stochastically(w.float().mul_(factor).add_(u, alpha=-lr), weight.dtype, step))
    if flat.data_ptr() != weight.data_ptr():
        weight.copy_(flat.view(weight.shape))


@contextlib.contextmanager
def exactly(weight: Tensor, rounding: str, step: int) -> Iterator[Tensor]:
    """A float32 copy to step on, of 16-bit weights that are rounded stochastically afterwards; else they themselves."""
    if rounding != "stochastic" or weight.dtype not in _DROPPED_BITS:
        yield weight
        return
    exact = weight.float()
    yield exact
    weight.copy_(stochastically(exact, weight.dtype, step))


def stochastically(x: Tensor, dtype: torch.dtype, step: Tensor | int) -> Tensor:
    """`x`, float32, rounded to `dtype`; float16's subnormals to the nearest."""
    dropped = _DROPPED_BITS[dtype]
    bits = x.view(torch.int32)
    salt = (
        step.to(torch.int32) * _SALT if isinstance(step, Tensor) else (step * _SALT + (1 << 31)) % (1 << 32) - (1 << 31)
    )
    noise = (bits ^ salt) * -0x61C88647
    noise = (noise ^ (noise >> 15)) * 0x2C1B3C6D
    noise = (noise >> 12) & ((1 << dropped) - 1)
    return (bits + noise & -(1 << dropped)).view(torch.float32).to(dtype)
