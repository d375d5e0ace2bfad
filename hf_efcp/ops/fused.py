"""What a kernel needs that finishes a step: rows, moments, and the weights that it writes itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_efcp.ops.backend import backend_of

KINDS = (torch.float32, torch.bfloat16, torch.float16)


class Rows(NamedTuple):
    """Rows of a window, weighted, to be added to x.

    Attributes:
        indices, values, scales: as in `torch_ops.window_combine_`.
        coefficients: (S, m) float32, a row for the whole model or one for each piece.
        own: (S,), what x counts; `None` for 0, 1.0 for as it is.
    """

    indices: Tensor
    values: Tensor
    scales: Tensor | None
    coefficients: Tensor
    own: Tensor | float | None


class Vector(NamedTuple):
    """A long vector where it lies: `flat`, or the pieces of a `table` as of `Weights`; times `factor`."""

    flat: Tensor | None = None
    table: Tensor | None = None
    factor: float = 1.0


class Moments(NamedTuple):
    """Momentum (`second` is `None`) or Adam's moments, flat float32 or bfloat16, and their decays.

    Without `first`, `second` alone is divided by, and has had this step's gradient already.
    """

    first: Tensor | None
    second: Tensor | None
    beta1: float
    beta2: float = 0.0


class Weights(NamedTuple):
    """Weights, and the step that each takes: `w ← (1 − lr·weight_decay)·w − lr·u`.

    Attributes:
        pieces: (B,) int32, the piece of each block.
        table: (pieces, 5) int64: address of the piece's first weight, place of its dtype in `KINDS` or −1 for what
            stays as it is, entries, first block, group.
        rates: (groups, 2) float32: lr and 1 − lr·weight_decay.
        dtypes: those that the table names.
        stochastic: whether 16-bit weights are rounded so, see `optim.rounding`.
    """

    pieces: Tensor
    table: Tensor
    rates: Tensor
    dtypes: frozenset[torch.dtype]
    stochastic: bool


def combine_step_for(tensor: Tensor) -> Callable[..., None] | None:
    """`combine_step_` of Triton's or numba's backend where one of them serves this tensor; torch has none."""
    return getattr(backend_of(tensor), "combine_step_", None)


def start_step_for(tensor: Tensor) -> Callable[..., Any] | None:
    """`numba_step.start_step_` where that serves this tensor; no other backend has its like."""
    return getattr(backend_of(tensor), "start_step_", None)


def has_address(tensor: Tensor) -> bool:
    """Whether a kernel may read it, or write to it, given its address. Numba has no float16."""
    data = tensor.data
    kinds = KINDS if start_step_for(data) is None else KINDS[:2]
    return type(data) is Tensor and data.dtype in kinds and data.is_contiguous()


def weight_table(
    weights: Sequence[Tensor | None], blocks: Sequence[range], groups: Sequence[int], device: torch.device
) -> Tensor:
    """The `table` of `Weights`. It holds addresses: make it anew where weights move, and keep them alive.

    Args:
        weights: of each piece, in memory of `device`; `None` for what stays as it is.
        blocks: of each piece.
        groups: number of each piece's group.
    """
    rows = []
    for weight, span, group in zip(weights, blocks, groups, strict=True):
        address, kind, numel = 0, -1, 0
        if weight is not None:
            address, kind, numel = weight.data_ptr(), KINDS.index(weight.dtype), weight.numel()
        rows.append((address, kind, numel, span.start, group))
    return from_host(rows, torch.int64, device).view(-1, 5)


def from_host(numbers: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of numbers of the host, which does not wait for the device."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype).pin_memory().to(device, non_blocking=True)
