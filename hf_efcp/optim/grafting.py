"""Grafting: another rule's length of a step, for the direction of a preconditioned gradient.

The graft step of the raw gradient `g` is `g` itself (`sgd`), `g/√v` with `v` the decayed mean square of each entry
(`rmsprop`) or of its row and column, along the two longest axes (`adafactor`), or of a fixed root mean square (`rms`).
A whole tensor takes its Frobenius norm, but the slices along an axis too long for a sketch, a vocabulary's, take each
their own: else the words of every sentence, whose gradients are the longest, would get most of the whole table's.
Moments are corrected for their start at zero, as Adam's, so that Adam's learning rates fit.

Gradients come in batches (n, *shape) of n parameters of one shape, of which `Slices` may have left out the zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_efcp.optim.partition import Slices, without_zeros

UPDATE_RMS = 0.25  # root mean square of the step with grafting="rms"; about that of Adam


def graft_state(kind: str, parameter: Tensor, prefix: str = "") -> dict[str, Tensor]:
    """New tensors of what a graft remembers of a parameter, float32, or float64 where that is.

    `prefix`: of their names.
    """
    new = {"dtype": torch.promote_types(parameter.dtype, torch.float32), "device": parameter.device}
    factors = _factors(parameter.shape)
    if kind == "rmsprop" or (kind == "adafactor" and factors is None):
        return {f"{prefix}mean_square": torch.zeros(parameter.shape, **new)}
    if kind == "adafactor":
        return {
            f"{prefix}{name}": torch.zeros([1 if i == axis else d for i, d in enumerate(parameter.shape)], **new)
            for name, axis in zip(("column_square", "row_square"), factors, strict=True)  # pyright: ignore[reportArgumentType]
        }
    return {}


def _factors(shape: Sequence[int]) -> tuple[int, int] | None:
    """The axes of rows and columns: the two longest, as convolutions have shapes (out, in, 1, 1) or (out, in, 3, 3)."""
    rows, columns = sorted(sorted(range(len(shape)), key=shape.__getitem__)[-2:]) if len(shape) > 1 else (0, 0)
    return (rows, columns) if rows != columns and min(shape[rows], shape[columns]) > 1 else None


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
    if not states[0].keys() & {"mean_square", "row_square"}:
        return
    whole = (
        square.shape[1:]
        if slices is None
        else [slices.length if i == slices.axis else d for i, d in enumerate(square.shape[1:])]
    )
    rows, columns = _factors(whole) or (None, None)
    for name, axis in (("mean_square", None), ("row_square", columns), ("column_square", rows)):
        if name not in states[0]:
            continue
        new = (square if axis is None else _mean(square, axis, slices)).to(states[0][name].dtype)
        left = _left(slices, axis)
        new = new if left is None else left.spread(new)
        moments, parts = [state[name] for state in states], list(new.unbind(0))
        if accept is None:
            torch._foreach_add_(moments, parts) if beta2 == 1 else torch._foreach_lerp_(moments, parts, 1 - beta2)
            continue
        for moment, part in zip(moments, parts, strict=True):
            updated = moment + part if beta2 == 1 else moment.lerp(part, 1 - beta2)
            moment.copy_(torch.where(accept, updated, moment))


def _mean(square: Tensor, axis: int, slices: Slices | None) -> Tensor:
    """The mean along an axis, which stays with length 1, zeros left out included."""
    if slices is None or axis != slices.axis:
        return square.mean(axis + 1, keepdim=True)
    return square.sum(axis + 1, keepdim=True) / slices.length


def _left(slices: Slices | None, *reduced: int | None) -> Slices | None:
    """The same of a tensor whose `reduced` axes have length 1."""
    return None if slices is None or slices.axis in reduced else slices


class Moments(NamedTuple):
    """What the grafts of a batch remember, (n, *shape), without what `Slices` leaves out; `None` where it is not kept.

    Axes that a mean was taken of have length 1: columns in `row`, rows in `column`, both in `row_mean`, the mean of
    whole `row`s.
    """

    mean_square: Tensor | None = None
    row: Tensor | None = None
    column: Tensor | None = None
    row_mean: Tensor | None = None

    @classmethod
    def of(cls, states: Sequence[Mapping[str, Any]], slices: Slices | None, shape: Sequence[int]) -> Moments:
        """`shape`: of a parameter."""

        def stacked(name: str) -> Tensor:
            return torch.stack([state[name] for state in states])

        if "mean_square" in states[0]:
            return cls(mean_square=without_zeros(stacked("mean_square"), slices))
        if "row_square" in states[0]:
            rows, columns = _factors(shape)  # pyright: ignore[reportGeneralTypeIssues]
            row, column = stacked("row_square"), stacked("column_square")
            mean = without_zeros(row.mean(rows + 1, keepdim=True), _left(slices, rows, columns))
            return cls(
                None, without_zeros(row, _left(slices, columns)), without_zeros(column, _left(slices, rows)), mean
            )
        return cls()

    def inverse(self) -> Tensor:
        """One over the mean square of each entry, that of the whole or of its factors."""
        if self.mean_square is not None:
            return _reciprocal(self.mean_square)
        return (_reciprocal(self.row) * self.row_mean) * _reciprocal(self.column)  # pyright: ignore[reportArgumentType, reportOptionalOperand, reportOperatorIssue]


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
    if moments.row is not None and gradient.ndim == 3 and not each:  # a matrix: no temporary of its size
        rows = (_reciprocal(moments.row) * moments.row_mean).to(square.dtype)  # pyright: ignore[reportOperatorIssue, reportOptionalMemberAccess]
        columns = _reciprocal(moments.column).to(square.dtype)  # pyright: ignore[reportArgumentType, reportOptionalMemberAccess]
        return (correction * (rows * (square @ columns.mT)).sum(1, keepdim=True)).sqrt()
    if moments.mean_square is not None or moments.row is not None:
        return (correction * _sum(square * moments.inverse(), rest)).sqrt()  # pyright: ignore[reportOptionalOperand]
    norm = _norm(gradient, rest)
    if kind == "rms":
        return torch.where(norm > 0, UPDATE_RMS * (gradient.numel() / norm.numel()) ** 0.5, torch.zeros_like(norm))
    return norm


def _others(tensor: Tensor, each: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a batch, but for the first, that are not in `each`, which does not count the first."""
    return tuple(axis for axis in range(1, tensor.ndim) if axis - 1 not in each)


def graft_step(kind: str, moments: Moments, gradient: Tensor, correction: float, floor: float = 0.0) -> Tensor:
    """The step whose norm `graft_norm` gives, a new tensor.

    `floor` is added to each entry's mean square, in units of the parameter's largest: entries that are nothing but
    rounding, as a bias of attention's keys, stay small.
    """
    if floor and moments.mean_square is not None and gradient.numel():
        square = moments.mean_square
        largest = square.reshape(len(square), -1).amax(1).view(-1, *[1] * (square.ndim - 1))
        moments = moments._replace(mean_square=square + floor * largest)
    if moments.mean_square is not None or moments.row is not None:
        return gradient * (correction * moments.inverse()).sqrt().to(gradient.dtype)
    if kind == "rms":
        norm = _norm(gradient, _others(gradient, ()))
        return gradient * (graft_norm(kind, moments, gradient, None, correction) / torch.where(norm > 0, norm, 1))
    return gradient.clone()


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
