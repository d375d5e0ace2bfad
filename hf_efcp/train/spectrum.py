"""The eigenvalues of what an optimizer keeps of the curvature, read from its state."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hf_efcp.optim.base import EfcpOptimizer

_MOST = 6  # spectra that a picture holds


def spectra(optimizer: EfcpOptimizer) -> dict[str, list[float]]:
    """Positive eigenvalues by what they are of, descending; of many matrices those of the largest trace.

    - A window of gradients: `GGᵀ`, one for the model or one for each system.
    - A sketch: `σ²` of the directions that it holds of an axis.
    - Dense Kronecker factors with `cache_metrics`: `KKᵀ` of a layer's inputs or output gradients.

    Empty before the first step. Waits for the device.
    """
    found = [pair for place, state in enumerate(optimizer.state.values()) for pair in _of(place, state)]
    found = [(name, values[values > 0].sort(descending=True).values) for name, values in found]
    found = [(name, values) for name, values in found if len(values)]
    largest = sorted(found, key=lambda pair: float(pair[1].sum()), reverse=True)[:_MOST]
    return {name: values.tolist() for name, values in largest}


def _of(place: int, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The spectra in one parameter's state; `place` tells parameters apart."""
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        if key == "gram":
            for number, system in enumerate(value.double().cpu().reshape(-1, *value.shape[-2:])):
                yield ("GGᵀ" if value.ndim == 2 else f"GGᵀ of tensor {number}"), torch.linalg.eigvalsh(system)
        elif key.startswith("singular_values"):
            which = key.removeprefix("singular_values").strip("_").replace("_", ", axis ")
            yield f"sketch of tensor {place}" + (f", block {which}" if which else ""), value.double().cpu().square()
        elif key.endswith("_metric"):
            side = math.isqrt(value.numel())
            metric = value.double().cpu().reshape(side, side)
            yield f"{key.removesuffix('_metric')} of layer {place}", torch.linalg.eigvalsh(metric)
