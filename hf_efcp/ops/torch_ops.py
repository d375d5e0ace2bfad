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
_CHUNK = 1 << 17


def block_topk(x: Tensor, k: int) -> Tensor:
    """Indices of the `k` largest magnitudes of each row of `x`, exactly.

    Args:
        x: (B, block_size) float32, finite.
        k: entries kept, 1 ≤ k ≤ block_size.

    Returns:
        (B, k) int64, unordered; among equal magnitudes any may be chosen.
    """
    # The bits of non-negative floats order as the floats do, and integers compare without a test for NaN.
    return _largest(x.abs().view(torch.int32), k)


def _largest(keys: Tensor, k: int) -> Tensor:
    """Top-k of each row by stages: the `k` largest entries lie in the `k` groups with the largest maxima."""
    n_rows, n = keys.shape
    group = 16 if n >= 32 * k and n % 16 == 0 else 4
    n_groups = n // group
    selects_few = n < 1024 and n >= 64 * k  # there torch's partial sort wins
    if n % group or n_groups < 2 * k or selects_few:
        return keys.topk(k, dim=1, sorted=False).indices
    maxima = keys.view(n_rows, group, n_groups).amax(1)  # group i holds entries i, i + n_groups, …
    groups = maxima.topk(k, dim=1, sorted=False).indices
    stride = torch.arange(0, n, n_groups, device=keys.device)
    candidates = (groups[:, None, :] + stride[None, :, None]).view(n_rows, group * k)
    return candidates.gather(1, _largest(keys.gather(1, candidates), k))


def accumulate_topk_(
    residual: Tensor, gradient: Tensor, k: int, value_dtype: torch.dtype, accept: Tensor
) -> tuple[Tensor, Tensor]:
    """`residual += gradient`, then take the `k` largest magnitudes of each block out of it.

    What is taken is what is stored: the rounding of the values to `value_dtype` stays in the residual.

    Args:
        residual: (B, block_size), changed in place; sums are float32 whatever its dtype.
        gradient: (B, block_size) float32.
        accept: () bool; where false, the gradient is zero and the residual stays as it is.

    Returns:
        `indices` (B, k) int64 and `values` (B, k) of `value_dtype`.
    """
    n_blocks, block_size = residual.shape
    indices = torch.empty(n_blocks, k, dtype=torch.int64, device=residual.device)
    values = torch.empty(n_blocks, k, dtype=value_dtype, device=residual.device)
    per_chunk = max(1, _CHUNK // block_size)
    for start in range(0, n_blocks, per_chunk):
        part = slice(start, start + per_chunk)
        if residual.dtype is torch.float32:
            summed = residual[part].add_(gradient[part])
        else:
            summed = residual[part].float().add_(gradient[part])
        chosen = block_topk(summed, k)
        taken = summed.gather(1, chosen).to(value_dtype)
        summed.scatter_add_(1, chosen, taken.float() * -accept.float())
        if residual.dtype is not torch.float32:
            residual[part].copy_(summed)
        indices[part], values[part] = chosen, taken
    return indices, values


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
    per_chunk = max(1, _CHUNK // max(window * k, x.shape[1]))
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
    per_chunk = max(1, _CHUNK // max(window * k, out.shape[1]))
    weights = coefficients.to(torch.float32)[:, None]
    for start in range(0, n_blocks, per_chunk):
        part = slice(start, start + per_chunk)
        scaled = (values[part] * weights).view(-1, window * k)
        out[part].scatter_add_(1, indices[part].reshape(-1, window * k).long(), scaled)
    return out
