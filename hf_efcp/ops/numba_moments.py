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
def adam_mean(start, stop, gradient, first, second, seed, rates, factor):
    """`torch_moments.adam_mean_` for the entries `start` to `stop`; `second` may be `None`, `factor` is 1/(1 − β₁ᵗ)."""
    rate1, rate2 = rates
    one, parts = np.float32(1), (gradient[start:stop], first[start:stop])
    x, m = parts
    if second is not None:
        v = second[start:stop]
        for i in range(len(x)):
            square = as_float32(v[i])
            v[i] = rounded_at_random(square + rate2 * (x[i] * x[i] - square), seed, v)
    for i in range(len(x)):
        mean = as_float32(m[i])
        m[i] = rounded(mean + rate1 * (x[i] - mean), one, m)
        x[i] = as_float32(m[i]) * factor


@compiled(fastmath={"contract"})
def adam_direction(start, stop, update, second, correction, eps):
    """`torch_moments.adam_direction_` for the entries `start` to `stop`; `correction` is 1 − β₂ᵗ."""
    factor = np.float32(1) / correction
    u, v = update[start:stop], second[start:stop]
    for i in range(len(u)):
        u[i] /= np.sqrt(as_float32(v[i]) * factor) + eps


@compiled()
def heavy_ball(update, buffer, momentum):
    """`v ← momentum·v + u` for (n,) entries of `v`, float32 or uint16; the update becomes `v`, rounded as in torch."""
    for i in range(len(update)):
        update[i] += as_float32(buffer[i]) * momentum
        buffer[i] = rounded(update[i], np.float32(1), buffer)
