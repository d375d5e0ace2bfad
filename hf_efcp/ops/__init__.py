"""The hot loops: block top-k with error feedback, window dots, window combine, Adam's moments.

`torch_ops` and `torch_moments` are the definition; every other backend must equal it to rounding. `backend` chooses.
"""

from hf_efcp.ops import torch_moments, torch_ops
from hf_efcp.ops.backend import on_backend
from hf_efcp.ops.fused import Moments, Rows, Weights, can_be_written, combine_step_for, from_host, weight_table
from hf_efcp.ops.scratch import empty
from hf_efcp.ops.torch_ops import dequantize_int8, entries_per_pass, take_row, unpack_int4

accumulate_topk_ = on_backend(torch_ops.accumulate_topk_)
adam_ = on_backend(torch_moments.adam_)
adam_direction_ = on_backend(torch_moments.adam_direction_)
adam_mean_ = on_backend(torch_moments.adam_mean_)
push_topk_ = on_backend(torch_ops.push_topk_)
row_dots = on_backend(torch_ops.row_dots)
window_combine_ = on_backend(torch_ops.window_combine_)
window_dots = on_backend(torch_ops.window_dots)

__all__ = [
    "Moments",
    "Rows",
    "Weights",
    "accumulate_topk_",
    "adam_",
    "adam_direction_",
    "adam_mean_",
    "can_be_written",
    "combine_step_for",
    "dequantize_int8",
    "empty",
    "entries_per_pass",
    "from_host",
    "push_topk_",
    "row_dots",
    "take_row",
    "unpack_int4",
    "weight_table",
    "window_combine_",
    "window_dots",
]
