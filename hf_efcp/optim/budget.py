"""The largest window that fits into a number of bytes."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

logger = logging.getLogger(__name__)

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_WINDOWS = (1024, 512, 256, 128, 64, 32, 16, 8)
_WORTHWHILE = 32  # rows for which full precision is worth more than another row

# From the most precise to the smallest, with the block whose indices go with it.
_FORMATS = (
    {"value_dtype": "float32", "residual_dtype": "float32", "moment_dtype": "float32", "block_size": 4096},
    {"value_dtype": "bfloat16", "residual_dtype": "bfloat16", "moment_dtype": "bfloat16", "block_size": 4096},
    {"value_dtype": "int8", "residual_dtype": "int4", "moment_dtype": "bfloat16", "block_size": 256},
)

PICKED = ("window", "density", *_FORMATS[0])  # the options that a budget sets


def parse_bytes(text: str | int, params: Iterable[Tensor]) -> int:
    """A number of bytes: `8000000`, `"8GB"`, `"500MiB"`, or `"adamw"`, what AdamW's two moments of `params` take.

    Raises:
        ValueError: none of these.
    """
    word = str(text).strip().upper().replace(" ", "")
    if word == "ADAMW":
        return sum(2 * p.numel() * p.element_size() for p in params)
    match = re.fullmatch(r"([0-9.]+)([KMG]?I?B?)", word)
    if match and match[2] in _UNITS and match[1].count(".") <= 1 and match[1] != ".":
        return int(float(match[1]) * _UNITS[match[2]])
    raise ValueError(f"`memory_budget` must be bytes, such as 8000000 or 8GB or 500MiB, or adamw, got {text!r}.")


def fit_budget(cls: type[Optimizer], params: list[Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with the window and the formats that fit `options["memory_budget"]`.

    The most precise format in which 32 rows fit gets the largest window of 8, 16, … 1024 rows; else the smallest
    format does. Density stays 1 %, the published one. What is picked is logged.

    Args:
        cls: an optimizer with `options` and `materialize_state`.
        params: the parameters, on any device.
        options: checked options.

    Raises:
        ValueError: not even 8 rows fit, or the optimizer's rows are no block-wise top-k ones.
    """
    if options["compression"] != "topk" or options["selection"] != "block":
        raise ValueError(
            "`memory_budget` chooses a format of block-wise top-k rows: compression='topk', selection='block'."
        )
    budget = parse_bytes(options["memory_budget"], params)
    shadows = [torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta")) for p in params]
    best: dict[str, Any] = {}
    size = smallest = 0
    for formats in _FORMATS:
        for window in _WINDOWS:
            picked = {**options, **formats, "window": window, "density": 0.01, "memory_budget": None}
            smallest = count_bytes(cls, shadows, picked)
            if smallest <= budget:
                if not best or window >= _WORTHWHILE > best["window"]:
                    best = {**picked, "memory_budget": options["memory_budget"]}
                    size = smallest
                break
        if best and best["window"] >= _WORTHWHILE:
            break
    if not best:
        raise ValueError(
            f"`memory_budget` {options['memory_budget']} is {budget:,} bytes; the smallest window, of {_WINDOWS[-1]} "
            f"rows, takes {smallest:,} with scaling={options['scaling']!r}."
        )
    shown = ", ".join(f"{name}={best[name]}" for name in PICKED)
    logger.warning(
        "memory_budget=%s picked %s: %s of %s bytes.", options["memory_budget"], shown, f"{size:,}", f"{budget:,}"
    )
    return best


def count_bytes(cls: type[Optimizer], params: Sequence[Tensor], options: Mapping[str, Any]) -> int:
    """Bytes of all that lives between steps, counted on the meta device; `params` must be there."""
    optimizer = cls(params, **{**options, "state_device": None})  # which would be a real device, with real tensors
    optimizer.materialize_state()  # pyright: ignore[reportAttributeAccessIssue]
    return optimizer.state_bytes()  # pyright: ignore[reportAttributeAccessIssue]
