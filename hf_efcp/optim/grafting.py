"""Grafting: another rule's length of a step, for the direction of a preconditioned gradient.

The graft step of the raw gradient `g` is `g` itself (`sgd`), `g/√v` with `v` the decayed mean square of each entry
(`rmsprop`) or of its row and column (`adafactor`), or of a fixed root mean square (`rms`). A whole tensor takes its
Frobenius norm. Moments are corrected for their start at zero, as Adam's, so that Adam's learning rates fit.
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
    kind: str, state: dict[str, Tensor], gradient: Tensor, square: Tensor | None, correction: float
) -> Tensor:
    """Frobenius norm of the graft step, (), without the step.

    Args:
        state: after `update_moments_`.
        square: the squared gradient, where the graft has moments.
        correction: `1 − β₂ᵗ` after t gradients, 1 for sums.
    """
    if "mean_square" in state:
        return (correction * (square * _reciprocal(state["mean_square"])).sum()).sqrt()
    if "row_square" in state:
        row, column = state["row_square"], state["column_square"]
        weighted = (square @ _reciprocal(column).to(square.dtype)[..., None]).squeeze(-1)
        return (correction * (weighted * _reciprocal(row) * row.mean(-1, keepdim=True)).sum()).sqrt()
    norm = torch.linalg.vector_norm(gradient)
    if kind == "rms":
        return torch.where(norm > 0, UPDATE_RMS * gradient.numel() ** 0.5, torch.zeros_like(norm))
    return norm


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


def graft_(direction: Tensor, length: Tensor) -> Tensor:
    """Scale the direction to a norm of `length`; zero where it is zero."""
    norm = torch.linalg.vector_norm(direction)
    return direction.mul_(torch.where(norm > 0, length / torch.where(norm > 0, norm, 1), 0))


def _reciprocal(x: Tensor) -> Tensor:
    """1/x, and 0 for entries that were always zero."""
    return torch.where(x > 0, 1 / x, 0)
