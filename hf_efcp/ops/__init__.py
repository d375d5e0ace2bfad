"""The hot loops: block top-k with error feedback, window dots, window combine, Adam's moments.

`torch_ops` and `torch_moments` are the definition; every other backend must equal it to rounding. `backend` chooses.
"""

from hf_efcp.ops import torch_moments, torch_ops
from hf_efcp.ops.backend import on_backend
from hf_efcp.ops.caution import cautious
from hf_efcp.ops.fused import (
    Moments,
    Rows,
    Vector,
    Weights,
    combine_step_for,
    from_host,
    has_address,
    start_step_for,
    weight_table,
)
from hf_efcp.ops.scratch import empty
from hf_efcp.ops.torch_ops import dequantize_int8, entries_per_pass, take_row, unpack_int4

accumulate_topk_ = on_backend(torch_ops.accumulate_topk_)
adam_ = on_backend(torch_moments.adam_)
adam_direction_ = on_backend(torch_moments.adam_direction_)
adam_mean_ = on_backend(torch_moments.adam_mean_)
block_squares = on_backend(torch_ops.block_squares)
push_topk_ = on_backend(torch_ops.push_topk_)
row_dots = on_backend(torch_ops.row_dots)
window_combine_ = on_backend(torch_ops.window_combine_)
window_dots = on_backend(torch_ops.window_dots)

__all__ = [
    "Moments",
    "Rows",
    "Vector",
    "Weights",
    "accumulate_topk_",
    "adam_",
    "adam_direction_",
    "adam_mean_",
    "block_squares",
    "cautious",
    "combine_step_for",
    "dequantize_int8",
    "empty",
    "entries_per_pass",
    "from_host",
    "has_address",
    "push_topk_",
    "row_dots",
    "start_step_for",
    "take_row",
    "unpack_int4",
    "weight_table",
    "window_combine_",
    "window_dots",
]
