"""The second pass of a step over the blocks of a model, compiled by numba: from rows to weights, as `numba_start`."""

from __future__ import annotations

import numpy as np

from hf_efcp.ops.caution import BOLD
from hf_efcp.ops.numba_compiler import compiled
from hf_efcp.ops.numba_formats import as_float32, rounded
from hf_efcp.ops.numba_kernels import add_rows
from hf_efcp.ops.numba_memory import FLOAT32, floats, halves, read, read_of_table, square
from hf_efcp.ops.numba_moments import adam, adam_direction, heavy_ball

_BOLD = np.float32(BOLD)


@compiled()
def _direct(u, block, moments, rates, eps):
    """Momentum, Adam's direction, or its root, for a block of the update; arguments as in `second_pass`."""
    mode, first, second, kind, seed = moments
    n = len(u)
    if kind == FLOAT32:
        if mode == 1:
            heavy_ball(u, floats(first, block * n, n), rates[0])
        elif mode == 2:
            adam(0, n, u, floats(first, block * n, n), floats(second, block * n, n), seed, rates[:2], rates[2:], eps)
        elif mode == 3:
            adam_direction(0, n, u, floats(second, block * n, n), rates[3], eps)
    elif mode == 1:
        heavy_ball(u, halves(first, block * n, n), rates[0])
    elif mode == 2:
        adam(0, n, u, halves(first, block * n, n), halves(second, block * n, n), seed, rates[:2], rates[2:], eps)
    elif mode == 3:
        adam_direction(0, n, u, halves(second, block * n, n), rates[3], eps)


@compiled()
def _at_random(x, salt):
    """The bits of a bfloat16: `optim.rounding.stochastically`."""
    bits = np.float32(x).view(np.int32)
    noise = np.int32(np.int32(bits ^ salt) * np.int32(-0x61C88647))
    noise = np.int32(np.int32(noise ^ np.int32(noise >> 15)) * np.int32(0x2C1B3C6D))
    noise = np.int32(np.int32(noise >> 12) & np.int32(0xFFFF))
    return np.uint16(np.uint32(np.int32(bits + noise)) >> np.uint32(16))


@compiled(fastmath={"contract"})
def _move(u, w, lr, factor):
    """`w ← factor·w − lr·u`, all float32; in two loops, as the product is to be rounded as torch does."""
    if factor != 1:
        for i in range(len(w)):
            w[i] *= factor
    for i in range(len(w)):
        w[i] -= lr * u[i]


@compiled()
def _move_half(u, half, lr, factor, salt, stochastic):
    """As `_move` for bfloat16, rounded as `optim.apply` does: a last bit of the sum would change how it is rounded."""
    if stochastic:
        for i in range(len(half)):
            half[i] = _at_random(as_float32(half[i]) * factor - lr * u[i], salt)
    else:
        for i in range(len(half)):
            decayed = rounded(as_float32(half[i]) * factor, np.float32(1), half)
            half[i] = rounded(as_float32(decayed) - lr * u[i], np.float32(1), half)


@compiled()
def _cautious(u, g):
    """`ops.cautious`. Signs are compared as bits, without branches, so that the loop is vectorised."""
    bits, against = u.view(np.int32), g.view(np.int32)
    for i in range(len(u)):
        factor = _BOLD if (bits[i] ^ against[i]) >= 0 else np.float32(0)
        u[i] *= factor if g[i] != 0 else np.float32(1)


@compiled()
def second_pass(
    start,
    stop,
    shape,
    indices,
    values,
    scales,
    coefficients,
    own,
    vector,
    moments,
    rates,
    eps,
    out,
    pieces,
    weights,
    against,
    options,
):
    """`numba_ops.combine_step_` for the blocks `start` to `stop`.

    Args:
        shape: G blocks in a group, n entries in a block.
        indices, values, scales: as in `first_pass`.
        coefficients: (S, m) float32, a row for all pieces or one for each.
        own: (S,) float32, what x counts; (0,) for nothing.
        vector: x: a table, or (0, 5) with address and kind of a flat vector; and what it is multiplied by.
        moments: what they do (0 nothing, 1 momentum, 2 Adam's, 3 Adam's second as it is), addresses, kind, seed.
        rates: momentum, or `1 − β₁`; `1 − β₂`; `1 − β₁ᵗ`; `1 − β₂ᵗ`, all float32.
        eps: Adam's.
        out: factors (0,), (1,) or (pieces,) float32; squares (B,) or (0,) float64; the direction, (B, n) or (0, n).
        pieces: (B,) int32, of the blocks.
        weights: their table, or (0, 5), and the rates of groups.
        against: table of the gradients of which the direction is `cautious`, or (0, 5).
        options: salt of 16-bit weights and whether they are rounded at random.
    """
    group, n = shape
    source, address, kind, multiple = vector
    factors, squares, direction = out
    table, rates_of = weights
    u = np.empty(n, np.float32)
    g = np.empty(n if len(against) else 0, np.float32)
    for b in range(start, stop):
        piece = pieces[b]
        system = piece if len(coefficients) > 1 else 0
        if len(own):
            if len(source):
                read_of_table(u, source, piece, b)
            else:
                read(u, address, kind, b * n, n)
            s = own[piece if len(own) > 1 else 0]
            for i in range(n):
                u[i] = (u[i] * multiple) * s
        else:
            u[:] = np.float32(0)
        if len(coefficients):
            of_block = None if scales is None else scales[b // group]
            add_rows(u, indices[b], values[b], of_block, coefficients[system])
        if moments[0]:
            _direct(u, b, moments, rates, eps)
        if len(factors):
            factor = factors[piece if len(factors) > 1 else 0]
            for i in range(n):
                u[i] *= factor
        if len(squares):
            squares[b] = square(u)
        if len(against):
            read_of_table(g, against, piece, b)
            _cautious(u, g)
        if len(direction):
            direction[b] = u
        if len(table) and table[piece, 1] >= 0:
            first = (b - table[piece, 3]) * n
            count = min(n, table[piece, 2] - first)
            lr, factor = rates_of[table[piece, 4]]
            if table[piece, 1] == FLOAT32:
                _move(u, floats(table[piece, 0], first, count), lr, factor)
            else:
                _move_half(u, halves(table[piece, 0], first, count), lr, factor, *options)
