"""Window operations for CUDA devices, as Triton kernels: the functions of `torch_ops`, to rounding.

The kernels run in Triton's interpreter too, on the CPU and slowly, where `TRITON_INTERPRET=1` was set before Triton's
import; that is how they are tested without a device.
"""

from __future__ import annotations

# pyright: reportArgumentType=false, reportCallIssue=false
# Numbers stand for `tl.constexpr` at a launch, whose own options no signature has.
from typing import Any

import torch
import triton
from torch import Tensor

from hf_efcp.ops import torch_ops
from hf_efcp.ops import triton_kernels as kernels
from hf_efcp.ops.triton_moments import adam_, adam_direction_, adam_mean_  # noqa: F401  this backend's
from hf_efcp.ops.triton_step import combine_step_  # noqa: F401  this backend's
from hf_efcp.ops.triton_topk import push_topk

if not hasattr(triton.language, "gather"):
    raise ImportError(f"Triton 3.3 or newer is needed, this is {triton.__version__}")

INTERPRETED = not isinstance(push_topk, triton.runtime.JITFunction)
_PROGRAMS = 1024  # of a sum over blocks: fixed, so that the order of the sum is no matter of the device
_SPAN = 1024  # rows of the window for one program
_TILE = 4096  # entries that a program holds in registers at a time
_STAGED = 8192  # entries of a block that fit into any device's shared memory, twice


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
    """See `torch_ops.accumulate_topk_`."""
    if gradient.shape[1] > _STAGED:  # a block does not fit into shared memory
        return torch_ops.accumulate_topk_(residual, gradient, k, value_dtype, accept, grid=grid, group=group)
    n_blocks = len(gradient)
    indices = torch.empty(n_blocks, 1, k, dtype=torch.int64, device=gradient.device)
    values = torch.empty(n_blocks, 1, k, dtype=value_dtype, device=gradient.device)
    scales = None
    if value_dtype is torch.int8:
        scales = torch.empty(n_blocks // group, 1, dtype=torch.float32, device=gradient.device)
    _push((indices, values, scales), None, residual, gradient, accept, grid)
    return indices[:, 0], values[:, 0], None if scales is None else scales[:, 0]


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
    """See `torch_ops.push_topk_`."""
    if gradient.shape[1] > _STAGED:
        torch_ops.push_topk_(indices, values, row, residual, gradient, accept, scales=scales, grid=grid)
        return
    _push((indices, values, scales), row, residual, gradient, accept, grid)


def _push(
    rows: tuple[Tensor, Tensor, Tensor | None],
    row: Tensor | None,
    residual: Tensor,
    gradient: Tensor,
    accept: Tensor,
    grid: Tensor | None,
) -> None:
    """Into row `row` of a window, or with `None` into the only row of new memory."""
    indices, values, scales = rows
    n_blocks, window, k = indices.shape
    if not n_blocks:
        return
    _contiguous(indices, values, scales, residual, gradient, grid)
    block_size = gradient.shape[1]
    parts = 1 if grid is None else 2
    columns = parts * triton.next_power_of_2(block_size // parts)
    per_program = max(1, 2048 // columns) if scales is None else _group(indices, scales)
    padded = triton.next_power_of_2(per_program)
    with torch.cuda.device_of(gradient):
        push_topk[(-(-n_blocks // per_program),)](
            *(residual, grid, gradient, indices, values, scales, row, accept.view(torch.uint8), n_blocks, window),
            BLOCK_SIZE=block_size,
            K=k,
            BLOCKS=per_program,
            ROWS=padded,
            COLUMNS=columns,
            GROUPS=max(1, columns // 16),
            PARTS=parts,
            INT8=scales is not None,
            FRESH=row is None,
            **_launch(2 * padded * columns),  # 8 a thread: 64 registers, where 16 take 122
        )


def window_dots(indices: Tensor, values: Tensor, x: Tensor, scales: Tensor | None = None) -> Tensor:
    """See `torch_ops.window_dots`."""
    return _dots(indices, values, None, x, scales)


def row_dots(indices: Tensor, values: Tensor, row: Tensor, scratch: Tensor, scales: Tensor | None = None) -> Tensor:
    """See `torch_ops.row_dots`."""
    return _dots(indices, values, row, scratch, scales)


def _dots(indices: Tensor, values: Tensor, row: Tensor | None, x: Tensor, scales: Tensor | None) -> Tensor:
    _contiguous(indices, values, x, scales)
    n_blocks, window, k = indices.shape
    block_size = x.shape[1]
    width = min(triton.next_power_of_2(k), _TILE)
    span = min(triton.next_power_of_2(window), _SPAN)
    n_spans = -(-window // span)
    programs = max(1, min(_PROGRAMS, n_blocks // n_spans))
    if row is not None and (n_blocks < programs * n_spans or x.dtype is not torch.float32):
        x = torch.empty(programs * n_spans, block_size, device=x.device)
    parts = torch.empty(programs, window, dtype=torch.float64, device=x.device)
    with torch.cuda.device_of(x):
        kernels.window_dots[(programs, n_spans)](
            *(x, row, indices, values, scales, parts, n_blocks),
            BLOCK_SIZE=block_size,
            WINDOW=window,
            K=k,
            GROUP=_group(indices, scales),
            COLUMNS=triton.next_power_of_2(block_size),
            SPAN=span,
            TILE=min(span, max(1, _TILE // width)),
            WIDTH=width,
            INT8=scales is not None,
            OF_ROW=row is not None,
            STAGED=block_size <= _STAGED,
            **_launch(_TILE),
        )
    return parts.sum(0)


def window_combine_(
    out: Tensor, indices: Tensor, values: Tensor, coefficients: Tensor, scales: Tensor | None = None
) -> Tensor:
    """See `torch_ops.window_combine_`."""
    _contiguous(out, indices, values, scales)
    n_blocks, window, k = indices.shape
    if n_blocks:
        width = triton.next_power_of_2(k)
        with torch.cuda.device_of(out):
            kernels.window_combine[(n_blocks,)](
                *(out, indices, values, scales, coefficients.to(out.dtype).contiguous()),
                WINDOW=window,
                BLOCK_SIZE=out.shape[1],
                K=k,
                GROUP=_group(indices, scales),
                WIDTH=width,
                INT8=scales is not None,
                **_launch(8 * width),
            )
    return out


def _contiguous(*tensors: Tensor | None) -> None:
    """Raise for memory that the kernels would misread."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"The Triton kernels need contiguous tensors, got strides {tensor.stride()}.")


def _group(indices: Tensor, scales: Tensor | None) -> int:
    """Blocks that share a scale."""
    return 1 if scales is None or not len(scales) else len(indices) // len(scales)


def _launch(entries: int) -> dict[str, Any]:
    """Launch options: 16 `entries` a thread, and each product rounded as torch rounds it."""
    return {"num_warps": min(32, max(1, entries // 512)), "enable_fp_fusion": False}
