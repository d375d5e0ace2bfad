"""Which implementation of the window operations serves a tensor.

Tensors on the CPU go to numba where it is installed (`pip install hf-efcp[cpu]`), all others to torch. The environment
variable `HF_EFCP_BACKEND`, `torch` or `numba`, overrides that for the CPU; it is read at the first use.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

from torch import Tensor

from hf_efcp.ops import torch_ops

logger = logging.getLogger(__name__)

VARIABLE = "HF_EFCP_BACKEND"
_ALLOWED = ("torch", "numba")

Function = TypeVar("Function", bound=Callable)


def on_backend(function: Function) -> Function:
    """A function of `torch_ops`, or its namesake of the backend that serves its first tensor."""

    @functools.wraps(function)
    def call(tensor, *args, **kwargs):
        return getattr(backend_of(tensor), function.__name__)(tensor, *args, **kwargs)

    return call


def backend_of(tensor: Tensor) -> ModuleType:
    """The module whose functions take this tensor."""
    if tensor.device.type != "cpu" or type(tensor) is not Tensor:  # a subclass may have no memory to compute on
        return torch_ops
    return cpu_backend()


@functools.cache
def cpu_backend() -> ModuleType:
    """The module for tensors on the CPU, chosen once; `cpu_backend.cache_clear()` makes it choose again.

    Raises:
        ValueError: `HF_EFCP_BACKEND` names no backend.
        ImportError: it asks for numba, which cannot be imported.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted and wanted not in _ALLOWED:
        raise ValueError(f"`{VARIABLE}` must be one of {', '.join(map(repr, _ALLOWED))}, got {wanted!r}.")
    backend = torch_ops
    if wanted != "torch":
        backend = _numba_ops(required=wanted == "numba") or torch_ops
    logger.debug("Window operations on the CPU run on %s.", backend.__name__.rpartition(".")[2].removesuffix("_ops"))
    return backend


def _numba_ops(required: bool) -> ModuleType | None:
    try:
        from hf_efcp.ops import numba_ops
    except ImportError as error:
        if required:
            raise ImportError(f"`{VARIABLE}=numba` needs numba: pip install hf-efcp[cpu] ({error}).") from error
        if getattr(error, "name", None) != "numba":  # it is there, but not for this Python or numpy
            logger.warning("numba cannot be used (%s); the CPU runs slower on torch.", error)
        return None
    return numba_ops
