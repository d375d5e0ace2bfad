"""Options that M-FAC and GGT share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_efcp.optim.options import SHARD_STATE, Option
from hf_efcp.optim.rounding import WEIGHT_ROUNDING

_EFCP = "EFCP, arXiv 2306.06098"
_HERE = "this package"

WINDOW_OPTIONS = (
    Option("lr", float, "learning rate", low=0, high_open=True),
    Option("window", int, "rows m of the ring of gradients", low=1, high=65536, source="M-FAC, arXiv 2107.03356"),
    Option(
        "compression",
        str,
        "how a row is stored: its largest entries, or whole",
        choices=("topk", "lowrank", "none"),
        source=_EFCP,
    ),
    Option("density", float, "share of entries that a row keeps", low=0, low_open=True, high=1, source=_EFCP),
    Option(
        "selection",
        str,
        "largest entries of each block or of the whole model",
        choices=("block", "global"),
        source=_EFCP,
    ),
    Option("rank", int, "columns of a matrix's factors, with compression=lowrank", low=1, high=4096, source=_EFCP),
    Option(
        "system",
        str,
        "one m×m system for the model, or one for each parameter",
        choices=("model", "layer"),
        source=_EFCP,
    ),
    Option(
        "block_size",
        int,
        "entries per block; none for the largest of 2048, 1024, 512, 256 that pads the model by 5 % at most, or 256",
        low=1,
        high=32768,
        optional=True,
        source="ISTA-DASLab-Optimizers",
    ),
    Option(
        "precondition",
        str,
        "the newest compressed row, the dense gradient, or the mean of gradients that `momentum` is the decay of",
        choices=("compressed", "gradient", "momentum"),
        source=_EFCP,
    ),
    Option(
        "scaling",
        str,
        "length of the update: as computed, fixed per model, fixed per parameter, or Adam's moments of it",
        choices=("none", "rms", "layer_rms", "adam"),
        source=_HERE,
    ),
    Option("update_rms", float, "root mean square of the update before lr", low=0, low_open=True, source=_HERE),
    Option(
        "momentum",
        float,
        "heavy-ball factor; with scaling=adam Adam's beta1; decay of the mean with precondition=momentum",
        low=0,
        high=1,
        high_open=True,
        source=_EFCP,
    ),
    Option("adam_beta2", float, "decay of Adam's second moment, with scaling=adam", low=0, high=1, high_open=True),
    Option("cautious", bool, "steps without what goes up the gradient", source="arXiv 2411.16085"),
    Option("weight_decay", float, "decoupled weight decay, times lr", low=0, source="AdamW, arXiv 1711.05101"),
    Option("value_dtype", str, "dtype of the stored values", choices=("float32", "bfloat16", "int8"), source=_EFCP),
    Option(
        "residual_dtype",
        str,
        "dtype of the error-feedback residual",
        choices=("float32", "bfloat16", "int4"),
        source="MicroAdam, arXiv 2405.15593",
    ),
    Option(
        "moment_dtype",
        str,
        "dtype of momentum and of Adam's moments; the second moment is rounded stochastically",
        choices=("float32", "bfloat16"),
        source=_HERE,
    ),
    Option(
        "memory_budget",
        str,
        "bytes (8GB, 500MiB) or adamw: picks window, density, block size and dtypes that fit, and logs them",
        optional=True,
        source=_HERE,
    ),
    Option(
        "state_device",
        str,
        "device that keeps window, residual and moments, such as cpu; none for the parameters' own",
        optional=True,
        source=_HERE,
    ),
    SHARD_STATE,
    WEIGHT_ROUNDING,
)


def check_combinations(options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for options that are valid one by one and not together."""
    if options["selection"] == "global":
        if options["compression"] != "topk":
            raise ValueError("selection='global' is a choice of compression='topk'; leave it at 'block'.")
        if options["shard_state"]:
            raise ValueError("selection='global' has rows over the whole model; shard_state=True needs 'block'.")
        if options["system"] == "layer":
            raise ValueError("selection='global' mixes the layers' entries in each row; system='layer' needs 'block'.")
    small = options["compression"] == "topk" and options["selection"] == "block"
    for name, dtype in (("value_dtype", "int8"), ("residual_dtype", "int4")):
        if options[name] == dtype and not small:
            raise ValueError(
                f"{name}={dtype!r} is a format of block-wise top-k rows (compression='topk', selection='block'); "
                "use 'bfloat16' or 'float32' here."
            )
    size = options["block_size"] or 256  # whatever is chosen is a power of two
    if options["residual_dtype"] == "int4" and size % 2:
        raise ValueError(f"residual_dtype='int4' needs an even `block_size`, got {size}.")
    if options["value_dtype"] == "int8" and size < 4096 and 4096 % size:
        raise ValueError(f"value_dtype='int8' needs a `block_size` that divides 4096, got {size}.")
