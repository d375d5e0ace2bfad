"""Long vectors by their addresses, and what two passes over them share.

A vector comes as its address and the place of its dtype in `fused.KINDS`, so that a kernel is compiled for the format
of rows alone, and not for each combination of formats.
"""

from __future__ import annotations

import numpy as np
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from hf_efcp.ops.numba_compiler import compiled
from hf_efcp.ops.numba_formats import as_float32

FLOAT32, BFLOAT16, INT4 = 0, 1, -4  # the last one: a residual's


@intrinsic
def _pointer(typing_context, address):
    """A pointer from an integer."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@compiled()
def floats(address, first, count):
    """The `count` float32 numbers at `address`, from number `first` on."""
    return carray(_pointer(address + 4 * first), (count,), np.float32)


@compiled()
def halves(address, first, count):
    """As `floats`, of 16 bits each."""
    return carray(_pointer(address + 2 * first), (count,), np.uint16)


@compiled()
def bytes_(address, first, count):
    """As `floats`, of 8 bits each, unsigned."""
    return carray(_pointer(address + first), (count,), np.uint8)


@compiled()
def read(out, address, kind, first, count):
    """`out[:count]`, a block, from number `first` on of those at `address`; zeros behind, and where there are none."""
    count = min(max(count, 0), len(out))
    if kind == FLOAT32:
        numbers = floats(address, first, count)
        for i in range(count):
            out[i] = numbers[i]
    elif kind == BFLOAT16:
        bits = halves(address, first, count)
        for i in range(count):
            out[i] = as_float32(bits[i])
    else:
        count = 0
    out[count:] = np.float32(0)


@compiled()
def read_of_table(out, table, piece, block):
    """A block of vectors that `fused.weight_table` lists."""
    first = (block - table[piece, 3]) * len(out)
    read(out, table[piece, 0], table[piece, 1], first, table[piece, 2] - first)


@compiled(fastmath={"reassoc", "contract"})
def square(x):
    """`Σx²` in float64, of a float32 vector."""
    total = 0.0
    for i in range(len(x)):
        total += np.float64(x[i]) * np.float64(x[i])
    return total


@compiled()
def block_squares(start, stop, x, out):
    """`torch_ops.block_squares` for the blocks `start` to `stop`, to the bit as the first pass has them."""
    for b in range(start, stop):
        out[b] = square(x[b])
