"""Grafting: another rule's length of a step, for the direction of a preconditioned gradient.

The graft step of the raw gradient `g` is `g` itself (`sgd`), `g/√v` with `v` the decayed mean square of each entry
(`rmsprop`) or of its row and column (`adafactor`), or of a fixed root mean square (`rms`). A whole tensor takes its
Frobenius norm. Moments are corrected for their start at zero, as Adam's, so that Adam's learning rates fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

UPDATE_RMS = 0.25  # root mean square of the step with grafting="rms"; about that of Adam
_EPSILON = 1e-16  # relative to the mean square: entries that were always zero


def graft_state(kind: str, parameter: Tensor) -> dict[str, Tensor]:
    """New float32 tensors of what a graft remembers of a parameter."""
    new = {"dtype": torch.float32, "device": parameter.device}
    if kind == "rmsprop" or (kind == "adafactor" and parameter.ndim < 2):
        return {"mean_square": torch.zeros(parameter.shape, **new)}
    if kind == "adafactor":
        *rest, rows, columns = parameter.shape
        return {"row_square": torch.zeros(*rest, rows, **new), "column_square": torch.zeros(*rest, columns, **new)}
    return {}


def update_moments_(state: dict[str, Tensor], gradient: Tensor, beta2: float, accept: Tensor | None) -> None:
    """Take the gradient into what `graft_state` made; nothing where `accept`, () bool, is given and false."""
    moments = [pair for pair in (("mean_square", None), ("row_square", -1), ("column_square", -2)) if pair[0] in state]
    if moments:
        square = gradient.square()
        for name, mean in moments:
            new = square if mean is None else square.mean(mean)
            moment = state[name]
            updated = moment + new if beta2 == 1 else moment.lerp(new.to(moment.dtype), 1 - beta2)
            moment.copy_(updated if accept is None else torch.where(accept, updated, moment))


def graft_step(kind: str, state: dict[str, Tensor], gradient: Tensor, beta2: float, count: int) -> Tensor:
    """The step whose length is grafted.

    Args:
        state: after `update_moments_`.
        count: gradients in the moments, this one included.
    """
    if kind == "rms":
        norm = torch.linalg.vector_norm(gradient)
        target = UPDATE_RMS * gradient.numel() ** 0.5
        return gradient * torch.where(norm > 0, target / norm, torch.zeros_like(norm))
    if kind in ("none", "sgd"):
        return gradient
    if "mean_square" in state:
        square = state["mean_square"]
    else:
        row, column = state["row_square"], state["column_square"]
        mean = row.mean(-1, keepdim=True)
        square = (row / torch.where(mean > 0, mean, 1))[..., None] * column[..., None, :]
    correction = 1.0 if beta2 == 1 else 1 - beta2**count
    floor = _EPSILON * square.mean()
    return gradient * torch.where(square > 0, (square / correction + floor).rsqrt(), 0).to(gradient.dtype)


def graft_(direction: Tensor, step: Tensor) -> Tensor:
    """Scale the direction to the length of `step`; zero where it is zero."""
    norm = torch.linalg.vector_norm(direction)
    factor = torch.linalg.vector_norm(step) / torch.where(norm > 0, norm, 1)
    return direction.mul_(torch.where(norm > 0, factor, 0))
