"""Heavy ball, Nesterov's, and their averages: from updates to steps of weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hf_efcp.ops import cautious, entries_per_pass
from hf_efcp.optim.partition import Slices

_CHUNK = 1 << 17  # entries at a time: temporaries stay in cache


class Momentum(NamedTuple):
    """`m ← factor·m + gain·u`, and the step is `m`, or with Nesterov `factor·m + gain·u`, over `correction`."""

    factor: float
    gain: float = 1.0
    nesterov: bool = False
    correction: float = 1.0

    @classmethod
    def of(cls, factor: float, nesterov: bool, ema: bool, count: int) -> Momentum:
        """Of the `count`-th step. An average is corrected for its start at zero, as Adam's: it is one of updates."""
        if not ema:
            return cls(factor, 1.0, nesterov)
        return cls(factor, 1 - factor, nesterov, 1 - factor ** (count + nesterov))


def step_(weight: Tensor, update: Tensor, lr: float, accept: Tensor | None, slices: Slices | None) -> None:
    """`w ← w − lr·u`.

    Args:
        accept: () bool, where false nothing moves; `None` counts as true.
        slices: what `update` has of the weight's slices; the others are zero.
    """
    if slices is None:
        weight.add_(_where(accept, update, 0.0), alpha=-lr)
    else:
        weight.index_add_(slices.axis, slices.index, _where(accept, update, 0.0).to(weight.dtype), alpha=-lr)


def momentum_step_(
    weight: Tensor,
    buffer: Tensor,
    update: Tensor,
    lr: float,
    rule: Momentum,
    accept: Tensor | None,
    gradient: Tensor | None,
) -> None:
    """The step of `rule`, which changes `buffer`, float32 or bfloat16; computed in the dtype of the update.

    Args:
        accept: () bool, where false nothing moves; `None` counts as true.
        gradient: the step is `cautious` of it; `None` for the step as it is.
    """
    for w, m, u, g in _chunks(weight, buffer, update, update if gradient is None else gradient):
        moved = torch.mul(m.to(u.dtype), rule.factor).add_(u, alpha=rule.gain)
        m.copy_(_where(accept, moved, m))
        step = torch.mul(moved, rule.factor).add_(u, alpha=rule.gain) if rule.nesterov else moved
        step = step if gradient is None else cautious(step, g)
        w.add_(_where(accept, step, 0.0), alpha=-lr / rule.correction)


def momentum_step_slices_(
    weight: Tensor,
    buffer: Tensor,
    update: Tensor,
    lr: float,
    rule: Momentum,
    slices: Slices,
    gradient: Tensor | None,
) -> None:
    """`momentum_step_` of an accepted update that has the weight's `slices` alone, as `gradient`; others are zero."""
    axis, index, _ = slices
    before = buffer.index_select(axis, index).to(update.dtype).mul_(rule.factor)
    kept = before + rule.gain * update
    share = rule.factor if rule.nesterov else 1.0
    for w, m, _ in _chunks(weight, buffer, buffer):
        moved = torch.mul(m.to(update.dtype), rule.factor)
        m.copy_(moved)
        w.add_(moved, alpha=-lr * share / rule.correction)
    buffer.index_copy_(axis, index, kept.to(buffer.dtype))
    gain = rule.gain * (1 + rule.factor if rule.nesterov else 1.0)
    if gradient is None:
        step_(weight, update, lr * gain / rule.correction, None, slices)
    else:
        taken = share * before  # the loop's step of these slices
        step_(weight, cautious(taken + gain * update, gradient) - taken, lr / rule.correction, None, slices)


def _where(accept: Tensor | None, new: Tensor, old: Tensor | float) -> Tensor:
    return new if accept is None else torch.where(accept, new, old)


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat parts of equal place; the tensors as they are where one has another memory format."""
    if not all(x.is_contiguous() for x in tensors):
        yield tensors
        return
    size = entries_per_pass(tensors[0].device, _CHUNK)
    yield from zip(*(x.view(-1).split(size) for x in tensors), strict=True)
