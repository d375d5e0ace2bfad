"""Grafting: another rule's length of a step, for the direction of a preconditioned gradient.

The graft step of the raw gradient `g` is `g` itself (`sgd`), `g/√v` with `v` the decayed mean square of each entry
(`rmsprop`) or of its row and column (`adafactor`), or of a fixed root mean square (`rms`). A whole tensor takes its
Frobenius norm, but the slices along an axis too long for a sketch, a vocabulary's, take each their own: else the
words of every sentence, whose gradients are the longest, would get most of the whole table's. Moments are corrected
for their start at zero, as Adam's, so that Adam's learning rates fit.

Gradients come in batches (n, *shape) of n parameters of one shape, of which `Slices` may have left out the zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_efcp.optim.partition import Slices, without_zeros

UPDATE_RMS = 0.25  # root mean square of the step with grafting="rms"; about that of Adam


def graft_state(kind: str, parameter: Tensor) -> dict[str, Tensor]:
    """New tensors of what a graft remembers of a parameter, float32, or float64 where that is."""
    new = {"dtype": torch.promote_types(parameter.dtype, torch.float32), "device": parameter.device}
    if kind == "rmsprop" or (kind == "adafactor" and parameter.ndim < 2):
        return {"mean_square": torch.zeros(parameter.shape, **new)}
    if kind == "adafactor":
        *rest, rows, columns = parameter.shape
        return {"row_square": torch.zeros(*rest, rows, **new), "column_square": torch.zeros(*rest, columns, **new)}
    return {}


def update_moments_(
    states: Sequence[dict[str, Tensor]],
    square: Tensor,
    beta2: float,
    accept: Tensor | None,
    slices: Slices | None = None,
) -> None:
    """Take squared gradients into what `graft_state` made; nothing where `accept`, () bool, is given and false.

    β₂ = 1 sums.
    """
    for name, axis in (("mean_square", None), ("row_square", -1), ("column_square", -2)):
        if name not in states[0]:
            continue
        new = (square if axis is None else _mean(square, axis, slices)).to(states[0][name].dtype)
        left = slices if axis is None else _reduced(slices, axis % (square.ndim - 1))
        new = new if left is None else left.spread(new)
        moments, parts = [state[name] for state in states], list(new.unbind(0))
        if accept is None:
            torch._foreach_add_(moments, parts) if beta2 == 1 else torch._foreach_lerp_(moments, parts, 1 - beta2)
            continue
        for moment, part in zip(moments, parts, strict=True):
            updated = moment + part if beta2 == 1 else moment.lerp(part, 1 - beta2)
            moment.copy_(torch.where(accept, updated, moment))


def _mean(square: Tensor, axis: int, slices: Slices | None) -> Tensor:
    """The mean along an axis counted from the end, zeros left out included."""
    if slices is None or axis % (square.ndim - 1) != slices.axis:
        return square.mean(axis)
    return square.sum(axis) / slices.length


def _reduced(slices: Slices | None, axis: int) -> Slices | None:
    """The same of a tensor without an axis."""
    if slices is None or slices.axis == axis:
        return None
    return slices._replace(axis=slices.axis - (axis < slices.axis))


class Moments(NamedTuple):
    """What the grafts of a batch remember, (n, …), without what `Slices` leaves out; `None` where it is not kept.

    `row_mean` is the mean of whole `row`s, (n, …, 1).
    """

    mean_square: Tensor | None = None
    row: Tensor | None = None
    column: Tensor | None = None
    row_mean: Tensor | None = None

    @classmethod
    def of(cls, states: Sequence[Mapping[str, Any]], slices: Slices | None, ndim: int) -> Moments:
        """`ndim`: of a parameter."""

        def stacked(name: str) -> Tensor:
            return torch.stack([state[name] for state in states])

        if "mean_square" in states[0]:
            square = stacked("mean_square")
            return cls(mean_square=without_zeros(square, slices))
        if "row_square" in states[0]:
            row, column = stacked("row_square"), stacked("column_square")
            mean, kept = row.mean(-1, keepdim=True), _reduced(slices, ndim - 1)
            if kept is not None and kept.axis != ndim - 2:
                mean = without_zeros(mean, kept)
            return cls(None, without_zeros(row, kept), without_zeros(column, _reduced(slices, ndim - 2)), mean)
        return cls()


def graft_norm(
    kind: str,
    moments: Moments,
    gradient: Tensor,
    square: Tensor | None,
    correction: float,
    each: tuple[int, ...] = (),
) -> Tensor:
    """Frobenius norms of the graft steps without the steps; of every axis length 1 but for the batch's and `each`.

    Args:
        moments: after `update_moments_`.
        gradient: (n, *shape).
        square: the squared gradient, where the graft has moments.
        correction: `1 − β₂ᵗ` after t gradients, 1 for sums.
        each: axes of a parameter whose slices have norms of their own.
    """
    rest = _others(gradient, each)
    if moments.mean_square is not None:
        return (correction * _sum(square * _reciprocal(moments.mean_square), rest)).sqrt()  # pyright: ignore[reportOptionalOperand]
    if moments.row is not None:
        column = _reciprocal(moments.column).to(square.dtype)  # pyright: ignore[reportArgumentType, reportOptionalMemberAccess]
        rows = _reciprocal(moments.row) * moments.row_mean  # pyright: ignore[reportOperatorIssue]
        is_kept = gradient.ndim - 2 in each
        weighted = square * column[..., None, :] if is_kept else square @ column[..., None]  # pyright: ignore[reportOptionalOperand]
        return (correction * _sum(weighted * rows[..., None], rest)).sqrt()
    norm = _norm(gradient, rest)
    if kind == "rms":
        return torch.where(norm > 0, UPDATE_RMS * (gradient.numel() / norm.numel()) ** 0.5, torch.zeros_like(norm))
    return norm


def _others(tensor: Tensor, each: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a batch, but for the first, that are not in `each`, which does not count the first."""
    return tuple(axis for axis in range(1, tensor.ndim) if axis - 1 not in each)


def graft_step(kind: str, moments: Moments, gradient: Tensor, correction: float) -> Tensor:
    """The step whose norm `graft_norm` gives, a new tensor."""
    if moments.mean_square is not None:
        inverse = _reciprocal(moments.mean_square)
    elif moments.row is not None:
        inverse = (_reciprocal(moments.row) * moments.row_mean)[..., None] * _reciprocal(moments.column)[..., None, :]  # pyright: ignore[reportArgumentType, reportOperatorIssue]
    elif kind == "rms":
        norm = _norm(gradient, _others(gradient, ()))
        return gradient * (graft_norm(kind, moments, gradient, None, correction) / torch.where(norm > 0, norm, 1))
    else:
        return gradient.clone()
    return gradient * (correction * inverse).sqrt().to(gradient.dtype)


def graft_(direction: Tensor, length: Tensor, each: tuple[int, ...] = ()) -> Tensor:
    """Scale the directions, or their slices along the axes in `each`, to norms of `length`; zero where they are."""
    norm = _norm(direction, _others(direction, each))
    return direction.mul_(torch.where(norm > 0, length / torch.where(norm > 0, norm, 1), 0))


def _norm(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(x, dim=axes, keepdim=True) if axes else x.abs()


def _sum(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.sum(axes, keepdim=True) if axes else x


def _reciprocal(x: Tensor) -> Tensor:
    """1/x, and 0 for entries that were always zero."""
    return torch.where(x > 0, 1 / x, 0)
