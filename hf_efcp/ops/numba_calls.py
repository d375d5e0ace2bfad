"""How compiled kernels are called: tensors as numpy arrays, blocks shared out over threads."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

# A tenth of a millisecond's work, in entries: below, waking a thread costs more than it saves.
WORTH_A_THREAD = 1 << 18
PORTIONS = 8  # of a thread's work
N_PARTS = 64  # over which sums of blocks are taken, whatever the number of threads

_BITS = {torch.bfloat16: torch.uint16, torch.int16: torch.uint16}


def blocks_per_scale(indices: Tensor, scales: Tensor | None) -> int:
    """Blocks that share a scale."""
    return 1 if scales is None or not len(scales) else len(indices) // len(scales)


def array(tensor: Tensor | None) -> np.ndarray | None:
    """The tensor's memory, in the types that the kernels know."""
    if tensor is None:
        return None
    bits = _BITS.get(tensor.dtype)
    return (tensor if bits is None else tensor.view(bits)).numpy()


def share(kernel: Callable[..., None], n_units: int, work: int, *arguments: Any) -> None:
    """Call `kernel(start, stop, *arguments)` for all units, on as many threads as the work is worth.

    Each thread takes the next of a few portions when it is done with one: a sleeping core wakes milliseconds late.
    """
    n_threads = max(1, min(torch.get_num_threads(), n_units, work // WORTH_A_THREAD))
    if n_threads == 1:
        kernel(0, n_units, *arguments)
        return
    n_portions = min(n_units, PORTIONS * n_threads)
    bounds = [n_units * i // n_portions for i in range(n_portions + 1)]
    portions = iter(list(itertools.pairwise(bounds)))  # taking the next one is atomic

    def run() -> None:
        for start, stop in portions:
            kernel(start, stop, *arguments)

    others = [_threads(n_threads - 1, os.getpid()).submit(run) for _ in range(n_threads - 1)]
    run()
    for other in others:
        other.result()


@functools.cache
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked one has none of its parent's, and would wait for them forever."""
    return ThreadPoolExecutor(count, thread_name_prefix="hf_efcp")


def parts_of_blocks(block_size: int, k: int) -> int:
    """Equal parts in which a block is read to find its `k` largest entries, see `numba_kernels.select`.

    A block is read once, then k entries of each part: least work where the squares meet.
    """
    return next(n for n in (16, 8, 4, 2, 1) if n == 1 or (block_size % n == 0 and n * n * k <= block_size))


def seed_of(step: int) -> np.uint32:
    """What the rounding of the second moment is drawn by."""
    return np.uint32(step * 0x3C6EF35F & 0xFFFFFFFF)


def mean_factor(beta: float, step: int) -> np.float32:
    """1/(1 − βᵗ)."""
    return np.float32(1 / (1 - beta**step))
