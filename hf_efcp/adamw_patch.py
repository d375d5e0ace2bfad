"""An optimizer of this package in the place of `torch.optim.AdamW`, for scripts that hard-code it."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch.optim import Optimizer

from hf_efcp.optim.optim_args import parse_optim_args
from hf_efcp.optim.registry import OptimizerSpec, get_spec

logger = logging.getLogger(__name__)

_KEPT = ("params", "lr", "weight_decay")


def patch_adamw(text: str) -> type[Optimizer]:
    """Replace `torch.optim.AdamW` in this process by the optimizer that `NAME:option=value,…` describes.

    Returns:
        The class that was there, for putting it back.

    Raises:
        ValueError, TypeError: no such optimizer or option, a wrong value, or an optimizer that needs the model.
    """
    name, _, options = text.partition(":")
    replaced = torch.optim.AdamW
    torch.optim.AdamW = adamw_replacement(get_spec(name), parse_optim_args(options))
    return replaced


def adamw_replacement(spec: OptimizerSpec, raw: dict[str, Any]) -> type[Optimizer]:
    """A subclass of the optimizer that is constructed as `torch.optim.AdamW` is.

    Learning rate, weight decay, their defaults and parameter groups are AdamW's. Its other arguments have no
    counterpart: those that are given are logged once. `maximize=True` would turn the step round, and is refused.
    """
    if spec.needs_model:
        raise ValueError(f"`{spec.name}` is built over a model, and a script gives AdamW its parameters alone.")
    options = spec.resolve(raw)
    for own in ("lr", "weight_decay"):
        if own in options:
            raise ValueError(f"`{own}` is set by the script, where it builds AdamW; leave it out of the options.")
    signature = inspect.signature(torch.optim.AdamW)
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    told: set[str] = set()

    class AdamW(spec.cls):
        __doc__ = f"`{spec.name}` in the place of `torch.optim.AdamW`."

        def __init__(self, *args: Any, **kwargs: Any):
            given = signature.bind(*args, **kwargs).arguments
            if given.get("maximize"):
                raise NotImplementedError(f"`{spec.name}` minimizes; AdamW was asked to maximize.")
            unused = {k: v for k, v in given.items() if k not in _KEPT and v != defaults[k]}
            if not told:
                logger.info("torch.optim.AdamW is %s here.", spec.name)
            if unused.keys() - told:
                shown = ", ".join(f"{k}={v!r}" for k, v in unused.items())
                logger.warning("%s has no use for these arguments of torch.optim.AdamW: %s.", spec.name, shown)
            told.update(["AdamW", *unused])
            kept = {k: given.get(k, defaults[k]) for k in ("lr", "weight_decay")}
            super().__init__(given["params"], **kept, **options)

    return AdamW
