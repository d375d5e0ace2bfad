"""Adam's moments as one loop over the entries, compiled by numba."""

from __future__ import annotations

import numpy as np

from hf_efcp.ops.numba_compiler import compiled
from hf_efcp.ops.numba_formats import as_float32, rounded, rounded_at_random


@compiled(fastmath={"contract"})
def adam(start, stop, update, first, second, seed, rates, corrections, eps):
    """`torch_moments.adam_` for the entries `start` to `stop`, where it accepts.

    Args:
        update: (n,) float32.
        first, second: (n,) float32 or uint16.
        seed: uint32, of the step.
        rates: `1 − β₁` and `1 − β₂`, float32.
        corrections: `1 − β₁ᵗ` and `1 − β₂ᵗ`, float32.
        eps: float32.
    """
    rate1, rate2 = rates
    factor1, factor2 = np.float32(1) / corrections[0], np.float32(1) / corrections[1]
    one, parts = np.float32(1), (update[start:stop], first[start:stop], second[start:stop])
    u, m, v = parts
    for i in range(len(u)):
        g = u[i]
        old1, old2 = as_float32(m[i]), as_float32(v[i])
        mean = old1 + rate1 * (g - old1)
        square = old2 + rate2 * (g * g - old2)
        m[i] = rounded(mean, one, m)
        v[i] = rounded_at_random(square, seed, v)
        u[i] = (mean * factor1) / (np.sqrt(square * factor2) + eps)


@compiled(fastmath={"contract"})
def adam_mean(start, stop, gradient, first, second, seed, rates, correction):
    """`torch_moments.adam_mean_` for the entries `start` to `stop`; `second` may be `None`, `correction` is 1 − β₁ᵗ."""
    rate1, rate2 = rates
    one, factor = np.float32(1), np.float32(1) / correction
    for i in range(start, stop):
        g = gradient[i]
        if second is not None:
            square = as_float32(second[i])
            second[i] = rounded_at_random(square + rate2 * (g * g - square), seed, second)
        mean = as_float32(first[i])
        mean += rate1 * (g - mean)
        first[i] = rounded(mean, one, first)
        gradient[i] = mean * factor


@compiled(fastmath={"contract"})
def adam_direction(start, stop, update, second, correction, eps):
    """`torch_moments.adam_direction_` for the entries `start` to `stop`; `correction` is 1 − β₂ᵗ."""
    factor = np.float32(1) / correction
    for i in range(start, stop):
        update[i] /= np.sqrt(as_float32(second[i]) * factor) + eps
