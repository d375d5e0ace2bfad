"""Grafting: another rule's length of a step, for the direction of a preconditioned gradient.

The graft step of the raw gradient `g` is `g` itself (`sgd`), `g/√v` with `v` the decayed mean square of each entry
(`rmsprop`) or of its row and column (`adafactor`), or of a fixed root mean square (`rms`). A whole tensor takes its
Frobenius norm, but the slices along an axis too long for a sketch, a vocabulary's, take each their own: else the
words of every sentence, whose gradients are the longest, would get most of the whole table's. Moments are corrected
for their start at zero, as Adam's, so that Adam's learning rates fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

UPDATE_RMS = 0.25  # root mean square of the step with grafting="rms"; about that of Adam


def graft_state(kind: str, parameter: Tensor) -> dict[str, Tensor]:
    """New float32 tensors of what a graft remembers of a parameter."""
    new = {"dtype": torch.float32, "device": parameter.device}
    if kind == "rmsprop" or (kind == "adafactor" and parameter.ndim < 2):
        return {"mean_square": torch.zeros(parameter.shape, **new)}
    if kind == "adafactor":
        *rest, rows, columns = parameter.shape
        return {"row_square": torch.zeros(*rest, rows, **new), "column_square": torch.zeros(*rest, columns, **new)}
    return {}


def update_moments_(state: dict[str, Tensor], square: Tensor, beta2: float, accept: Tensor | None) -> None:
    """Take a squared gradient into what `graft_state` made; nothing where `accept`, () bool, is given and false.

    β₂ = 1 sums.
    """
    for name, axis in (("mean_square", None), ("row_square", -1), ("column_square", -2)):
        if name not in state:
            continue
        new = square if axis is None else square.mean(axis)
        moment = state[name]
        updated = moment + new if beta2 == 1 else moment.lerp(new.to(moment.dtype), 1 - beta2)
        moment.copy_(updated if accept is None else torch.where(accept, updated, moment))


def graft_norm(
    kind: str,
    state: dict[str, Tensor],
    gradient: Tensor,
    square: Tensor | None,
    correction: float,
    each: tuple[int, ...] = (),
) -> Tensor:
    """Frobenius norm of the graft step without the step; of every axis length 1 but for those in `each`.

    Args:
        state: after `update_moments_`.
        square: the squared gradient, where the graft has moments.
        correction: `1 − β₂ᵗ` after t gradients, 1 for sums.
        each: axes whose slices have norms of their own.
    """
    rest = _others(gradient, each)
    if "mean_square" in state:
        return (correction * _sum(square * _reciprocal(state["mean_square"]), rest)).sqrt()
    if "row_square" in state:
        row, column = state["row_square"], _reciprocal(state["column_square"]).to(square.dtype)
        rows = _reciprocal(row) * row.mean(-1, keepdim=True)
        weighted = square * column[..., None, :] if square.ndim - 1 in each else square @ column[..., None]
        return (correction * _sum(weighted * rows[..., None], rest)).sqrt()
    norm = _norm(gradient, rest)
    if kind == "rms":
        return torch.where(norm > 0, UPDATE_RMS * (gradient.numel() / norm.numel()) ** 0.5, torch.zeros_like(norm))
    return norm


def _others(tensor: Tensor, each: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that are not in `each`."""
    return tuple(axis for axis in range(tensor.ndim) if axis not in each)


def graft_step(kind: str, state: dict[str, Tensor], gradient: Tensor, correction: float) -> Tensor:
    """The step whose norm `graft_norm` gives, a new tensor."""
    if "mean_square" in state:
        inverse = _reciprocal(state["mean_square"])
    elif "row_square" in state:
        row, column = state["row_square"], state["column_square"]
        inverse = (_reciprocal(row) * row.mean(-1, keepdim=True))[..., None] * _reciprocal(column)[..., None, :]
    elif kind == "rms":
        norm = torch.linalg.vector_norm(gradient)
        return gradient * (graft_norm(kind, state, gradient, None, correction) / torch.where(norm > 0, norm, 1))
    else:
        return gradient.clone()
    return gradient * (correction * inverse).sqrt().to(gradient.dtype)


def graft_(direction: Tensor, length: Tensor, each: tuple[int, ...] = ()) -> Tensor:
    """Scale the direction, or its slices along the axes in `each`, to norms of `length`; zero where it is zero."""
    norm = _norm(direction, _others(direction, each))
    return direction.mul_(torch.where(norm > 0, length / torch.where(norm > 0, norm, 1), 0))


def _norm(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(x, dim=axes, keepdim=True) if axes else x.abs()


def _sum(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.sum(axes, keepdim=True) if axes else x


def _reciprocal(x: Tensor) -> Tensor:
    """1/x, and 0 for entries that were always zero."""
    return torch.where(x > 0, 1 / x, 0)
