"""Window operations in plain torch: the definition that compiled backends must equal.

A window holds `m` sparse rows of a flat vector cut into `B` blocks of `block_size` entries:
`indices` (B, m, k), local to their block, and `values` (B, m, k) float32, bfloat16 or int8. The order keeps
everything that one block needs contiguous, so a pass reads the window once and its block of the dense vector stays
in cache. Int8 values have `scales` (B/G, m) float32, one for each row and group of G blocks: value·scale.

The residual (B, block_size) is float32 or bfloat16, or 4-bit: two entries a byte, entry i of a block in the low half
of byte i for the first half of the block and in the high half for the second, with `grid` (B, 2) float32, the step
and the zero point of each block: (q − zero)·step. Zero stays exactly zero.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

# Entries per pass of a window: temporaries of a few megabytes stay in the last-level cache and in malloc's
# free list. One call over a whole window of 10M entries is 5 times slower, all of it page faults.
_CHUNK = 1 << 17
_DEVICE_CHUNK = 1 << 26  # elsewhere memory comes from a pool, and launches are what costs


def entries_per_pass(device: torch.device, on_cpu: int) -> int:
    """Entries whose temporaries are made at a time."""
    return on_cpu if device.type == "cpu" else _DEVICE_CHUNK


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
    residual: Tensor,
    gradient: Tensor,
    k: int,
    value_dtype: torch.dtype,
    accept: Tensor,
    *,
    grid: Tensor | None = None,
    group: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`residual += gradient`, then take the `k` largest magnitudes of each block out of it.

    What is taken is what is stored: the rounding of the values to `value_dtype` stays in the residual.

    Args:
        residual: (B, block_size), or (B, block_size/2) uint8 with `grid`; changed in place. Sums are float32.
        gradient: (B, block_size) float32.
        accept: () bool; where false, the gradient is zero and the residual stays as it is.
        grid: (B, 2) float32 of a 4-bit residual, changed in place.
        group: blocks that share a scale of int8 values; divides B.

    Returns:
        `indices` (B, k) int64, `values` (B, k) of `value_dtype`, `scales` (B/group,) float32 for int8, else `None`.
    """
    n_blocks, block_size = gradient.shape
    indices = torch.empty(n_blocks, k, dtype=torch.int64, device=residual.device)
    values = torch.empty(n_blocks, k, dtype=value_dtype, device=residual.device)
    is_int8 = value_dtype is torch.int8
    scales = torch.empty(n_blocks // group, dtype=torch.float32, device=residual.device) if is_int8 else None
    per_chunk = group * max(1, entries_per_pass(residual.device, 2 * _CHUNK) // (block_size * group))
    for start in range(0, n_blocks, per_chunk):
        part = slice(start, start + per_chunk)
        summed = _plus(residual[part], gradient[part], None if grid is None else grid[part])
        chosen = block_topk(summed, k)
        taken = summed.gather(1, chosen)
        if is_int8:
            scale = taken.view(-1, group * k).abs().amax(1) / 127
            scales[start // group : start // group + len(scale)] = scale  # pyright: ignore[reportOptionalSubscript]
            taken = quantize_int8(taken, scale)
            stored = dequantize_int8(taken, scale)
        else:
            taken = taken.to(value_dtype)
            stored = taken.float()
        summed.scatter_add_(1, chosen, stored * -accept.float())
        if grid is not None:
            packed, steps = pack_int4(summed)
            residual[part] = torch.where(accept, packed, residual[part])
            grid[part] = torch.where(accept, steps, grid[part])
        elif residual.dtype is not torch.float32:
            residual[part].copy_(summed)
        indices[part], values[part] = chosen, taken
    return indices, values, scales


def push_topk_(
    indices: Tensor,
    values: Tensor,
    row: Tensor,
    residual: Tensor,
    gradient: Tensor,
    accept: Tensor,
    *,
    scales: Tensor | None = None,
    grid: Tensor | None = None,
) -> None:
    """`accumulate_topk_` into row `row` of a window; nothing changes where `accept` is false.

    Args:
        indices, values, scales: the window, changed in place.
        row: () int64.
        residual, gradient, accept, grid: as in `accumulate_topk_`.
    """
    group = 1 if scales is None or not len(scales) else len(indices) // len(scales)
    k = indices.shape[2]
    newest = accumulate_topk_(residual, gradient, k, values.dtype, accept, grid=grid, group=group)
    for buffer, new in zip((indices, values, scales), newest, strict=True):
        if buffer is not None:
            new = torch.where(accept, new.to(buffer.dtype), take_row(buffer, 1, row))  # pyright: ignore[reportOptionalMemberAccess]
            buffer.index_copy_(1, row[None], new[:, None])


def take_row(x: Tensor, dim: int, row: Tensor) -> Tensor:
    """`x` at the place `row`, () int64, along `dim`. Plain indexing with a tensor would make the host wait for it."""
    return x.index_select(dim, row[None]).squeeze(dim)


def _plus(residual: Tensor, gradient: Tensor, grid: Tensor | None) -> Tensor:
    """Their float32 sum, in place where the residual is float32."""
    if grid is not None:
        return unpack_int4(residual, grid).add_(gradient)
    return (residual if residual.dtype is torch.float32 else residual.float()).add_(gradient)


def quantize_int8(values: Tensor, scales: Tensor) -> Tensor:
    """Nearest int8 of `value/scale`; `values` (B, k), `scales` (B/G,). A group of zeros has scale 0 and stays zero."""
    per_group = values.view(len(scales), -1)
    steps = torch.where(scales > 0, scales, torch.ones_like(scales))[:, None]
    return (per_group / steps).round_().clamp_(-127, 127).to(torch.int8).view_as(values)


def dequantize_int8(values: Tensor, scales: Tensor) -> Tensor:
    """`value·scale` in float32; `values` (B, …) int8, `scales` (B/G,) or, for (B, m, k) values, (B/G, m)."""
    group = len(values) // max(1, len(scales))
    grouped = values.view(len(scales), group, *values.shape[1:]).float()
    shape = (len(scales), 1, *scales.shape[1:], *([1] * (values.dim() - scales.dim())))
    return (grouped * scales.view(shape)).view(values.shape)


def pack_int4(x: Tensor) -> tuple[Tensor, Tensor]:
    """4-bit form of each row of `x`, (B, n) float32 with even n.

    Returns:
        (B, n/2) uint8 and the grid (B, 2) float32, step and zero point. The error is at most one step,
        (max − min)/15 of the row, zero included in its range; half a step but for clipped ends.
    """
    low, high = x.amin(1).clamp_max(0), x.amax(1).clamp_min(0)
    step = (high - low) / 15
    safe = torch.where(step > 0, step, torch.ones_like(step))
    zero = (-low / safe).round()
    levels = (x / safe[:, None]).round_().add_(zero[:, None]).clamp_(0, 15).to(torch.uint8)
    half = x.shape[1] // 2
    return levels[:, :half] | (levels[:, half:] << 4), torch.stack((step, zero), dim=1)


def unpack_int4(packed: Tensor, grid: Tensor) -> Tensor:
    """(B, n) float32 from `pack_int4`."""
    levels = torch.cat((packed & 15, packed >> 4), dim=1).float()
    return levels.sub_(grid[:, 1:]).mul_(grid[:, :1])


def window_dots(indices: Tensor, values: Tensor, x: Tensor, scales: Tensor | None = None) -> Tensor:
    """`G x`: inner products of all rows with a dense vector, products and sums in float64.

    Args:
        indices: (B, m, k) integers, local to their block.
        values: (B, m, k) float32, bfloat16 or int8.
        x: (B, block_size).
        scales: (B/G, m) float32 of int8 values.

    Returns:
        (m,) float64 on the device of `x`. Float64 makes the Gram matrix that of the stored values: a float32
        sum leaves it indefinite once `m·damping` is below 1e-7 of a squared norm.
    """
    total = torch.zeros(indices.shape[1], dtype=torch.float64, device=x.device)
    multiply = _csr_dots if x.device.type == "cpu" and torch.backends.mkl.is_available() else _gather_dots
    for part, stored in _chunks(indices, values, x.shape[1], scales):
        total += multiply(indices[part], stored, x[part])
    return total


def row_dots(indices: Tensor, values: Tensor, row: Tensor, scratch: Tensor, scales: Tensor | None = None) -> Tensor:
    """`window_dots` with row `row` (() int64) of the window itself; what stands in `scratch`, as `x` there, is lost."""
    stored = take_row(values, 1, row)
    if scales is not None:
        stored = dequantize_int8(stored, take_row(scales, 1, row))
    scratch.zero_().scatter_(1, take_row(indices, 1, row).long(), stored.to(scratch.dtype))
    return window_dots(indices, values, scratch, scales)


def _chunks(indices: Tensor, values: Tensor, block_size: int, scales: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Runs of blocks with their values, int8 scaled."""
    n_blocks, window, k = indices.shape
    group = n_blocks // len(scales) if scales is not None and len(scales) else 1
    per_chunk = group * max(1, entries_per_pass(indices.device, _CHUNK) // (max(window * k, block_size) * group))
    for start in range(0, n_blocks, per_chunk):
        part = slice(start, start + per_chunk)
        stored = values[part]
        if scales is not None:
            stored = dequantize_int8(stored, scales[start // group : (start + per_chunk) // group])
        yield part, stored


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


def block_squares(x: Tensor) -> Tensor:
    """(B,) float64 sums of squares of the blocks of `x`, (B, block_size) float32."""
    return torch.linalg.vector_norm(x, dim=1).double().square()


def window_combine_(
    out: Tensor, indices: Tensor, values: Tensor, coefficients: Tensor, scales: Tensor | None = None
) -> Tensor:
    """Add `Gᵀ coefficients` to `out` in place and return it.

    Args:
        out: (B, block_size) float32 or float64; terms and sums are of its dtype.
        indices: (B, m, k) integers, local to their block.
        values: (B, m, k) float32, bfloat16 or int8.
        coefficients: (m,), cast to the dtype of `out`.
        scales: (B/G, m) float32 of int8 values.
    """
    _, window, k = indices.shape
    weights = coefficients.to(out.dtype)[:, None]
    for part, stored in _chunks(indices, values, out.shape[1], scales):
        scaled = (stored.to(out.dtype) * weights).view(-1, window * k)
        out[part].scatter_add_(1, indices[part].reshape(-1, window * k).long(), scaled)
    return out
