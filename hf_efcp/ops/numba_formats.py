"""How compiled kernels read and write numbers of each format. Numba has no bfloat16: it comes as uint16, its bits."""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload


def as_float32(x):
    """The number, a bfloat16 from its bits; an integer as it is."""
    raise NotImplementedError  # compiled code only


@overload(as_float32, inline="always")
def _(x):
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: np.float32(x)


def rounded(x, scale, like):
    """`x/scale` as an element of the array `like`; floats have scale 1. Ties go to even numbers, as torch's do."""
    raise NotImplementedError  # compiled code only


@overload(rounded)
def _(x, scale, like):
    if like.dtype == types.uint16:

        def to_bfloat16(x, scale, like):
            bits = np.float32(x).view(np.uint32)
            if x != x:
                return np.uint16(0x7FC0)
            return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

        return to_bfloat16
    if like.dtype == types.int8:

        def to_int8(x, scale, like):
            if scale == 0:
                return np.int8(0)
            return np.int8(min(max(np.rint(x / scale), np.float32(-127)), np.float32(127)))

        return to_int8
    return lambda x, scale, like: np.float32(x)


def rounded_at_random(x, seed, like):
    """A finite float32 as an element of the array `like`; to bfloat16 stochastically, by a hash of its bits."""
    raise NotImplementedError  # compiled code only


@overload(rounded_at_random, inline="always")
def _(x, seed, like):
    if like.dtype == types.uint16:

        def to_bfloat16(x, seed, like):
            bits = np.float32(x).view(np.uint32)
            noise = (np.uint32(np.uint32(bits ^ seed) * np.uint32(0x9E3779B9)) >> np.uint32(8)) & np.uint32(0xFFFF)
            return np.uint16(np.uint32(bits + noise) >> np.uint32(16))

        return to_bfloat16
    return lambda x, seed, like: np.float32(x)
