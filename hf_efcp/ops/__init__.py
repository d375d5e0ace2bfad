"""The hot loops: block top-k with error feedback, window dots, window combine.

`torch_ops` is the definition; every other backend must equal it to rounding.
"""

from hf_efcp.ops.torch_ops import (
    accumulate_topk_,
    dequantize_int8,
    unpack_int4,
    window_combine_,
    window_dots,
)

__all__ = ["accumulate_topk_", "dequantize_int8", "unpack_int4", "window_combine_", "window_dots"]
