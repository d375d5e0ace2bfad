"""Window operations in plain torch: the definition that compiled backends must equal.

A window holds `m` sparse rows of a flat vector cut into `B` blocks of `block_size` entries:
`indices` (B, m, k), local to their block, and `values` (B, m, k). The order keeps everything that one
block needs contiguous, so a pass reads the window once and its block of the dense vector stays in cache.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

# Entries per pass of a window: temporaries of a few megabytes stay in the last-level cache and in malloc's
# free list. One call over a whole window of 10M entries is 5 times slower, all of it page faults.
_CHUNK = 1 << 18

_GROUP = 8  # entries per group in the two-stage selection


def block_topk(x: Tensor, k: int) -> Tensor:
    """Indices of the `k` largest magnitudes of each row of `x`.

    Args:
        x: (B, block_size), finite.
        k: entries kept, 1 ≤ k ≤ block_size.

    Returns:
        (B, k) int64, unordered; among equal magnitudes any may be chosen.

    Where blocks are large, the selection has two exact stages: at most `k` groups can hold one of the `k`
    largest entries, and they are among the `k` groups with the largest maxima.
    """
    n_blocks, block_size = x.shape
    magnitude = x.abs()
    n_groups = block_size // _GROUP
    if block_size % _GROUP or k * 2 > n_groups:
        return magnitude.topk(k, dim=1, sorted=False).indices
    maxima = magnitude.view(n_blocks, _GROUP, n_groups).amax(1)  # group g holds entries g, g + n_groups, …
    groups = maxima.topk(k, dim=1, sorted=False).indices
    stride = torch.arange(_GROUP, device=x.device) * n_groups
    candidates = (groups[:, None, :] + stride[None, :, None]).view(n_blocks, _GROUP * k)
    chosen = magnitude.gather(1, candidates).topk(k, dim=1, sorted=False).indices
    return candidates.gather(1, chosen)


def window_dots(indices: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """`G x`: inner products of all rows with a dense vector, products and sums in float64.

    Args:
        indices: (B, m, k) integers, local to their block.
        values: (B, m, k) floating point.
        x: (B, block_size).

    Returns:
        (m,) float64 on the device of `x`. Float64 makes the Gram matrix that of the stored values: a float32
        sum leaves it indefinite once `m·damping` is below 1e-7 of a squared norm.
    """
    n_blocks, window, k = indices.shape
    per_chunk = max(1, min(n_blocks, _CHUNK // (window * k)))
    total = torch.zeros(window, dtype=torch.float64, device=x.device)
    multiply = _csr_dots if x.device.type == "cpu" and torch.backends.mkl.is_available() else _gather_dots
    for start in range(0, n_blocks, per_chunk):
        part = slice(start, start + per_chunk)
        total += multiply(indices[part], values[part], x[part])
    return total


def _gather_dots(indices: Tensor, values: Tensor, x: Tensor) -> Tensor:
    n_blocks, window, k = indices.shape
    gathered = x.gather(1, indices.reshape(n_blocks, window * k).long()).double()
    return (gathered * values.reshape(n_blocks, window * k)).view(n_blocks, window, k).sum((0, 2))


def _csr_dots(indices: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """The same product by MKL's sparse matrix-vector kernel: 2.5 times faster than gathering."""
    _accept_csr()
    n_blocks, window, k = indices.shape
    block_size = x.shape[1]
    offsets = torch.arange(0, n_blocks * block_size, block_size, dtype=torch.int32)
    columns = (indices.reshape(n_blocks, window * k) + offsets[:, None]).view(-1)
    rows = torch.arange(0, n_blocks * window * k + 1, k, dtype=torch.int32)
    size = (n_blocks * window, n_blocks * block_size)
    matrix = torch.sparse_csr_tensor(rows, columns, values.reshape(-1).double(), size=size, check_invariants=False)
    return torch.mv(matrix, x.reshape(-1).double()).view(n_blocks, window).sum(0)


@functools.cache
def _accept_csr() -> None:
    """Take torch's one-time notice that CSR tensors are in beta, so that no user sees it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()


def window_combine_(out: Tensor, indices: Tensor, values: Tensor, coefficients: Tensor) -> Tensor:
    """Add `Gᵀ coefficients` to `out` in place and return it.

    Args:
        out: (B, block_size) float32.
        indices: (B, m, k) integers, local to their block.
        values: (B, m, k) floating point.
        coefficients: (m,), cast to float32.
    """
    n_blocks, window, k = indices.shape
    per_chunk = max(1, min(n_blocks, _CHUNK // (window * k)))
    weights = coefficients.to(torch.float32)[:, None]
    for start in range(0, n_blocks, per_chunk):
        part = slice(start, start + per_chunk)
        scaled = (values[part] * weights).view(-1, window * k)
        out[part].scatter_add_(1, indices[part].reshape(-1, window * k).long(), scaled)
    return out
