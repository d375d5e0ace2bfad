"""Which implementation of the window operations serves a tensor.

Tensors on a CUDA device go to Triton where it is installed (it comes with torch's CUDA builds for Linux), those on the
CPU to numba where it is (`pip install hf-efcp[cpu]`), all others to torch. The environment variable `HF_EFCP_BACKEND`
overrides that: `torch` everywhere, `numba` on the CPU, `triton` on CUDA devices, and in Triton's interpreter
(`TRITON_INTERPRET=1`) on the CPU. It is read at the first use.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar, cast

from torch import Tensor

from hf_efcp.ops import torch_ops

logger = logging.getLogger(__name__)

VARIABLE = "HF_EFCP_BACKEND"
_ALLOWED = ("torch", "numba", "triton")

Function = TypeVar("Function", bound=Callable[..., Any])


def on_backend(function: Function) -> Function:
    """A function in plain torch, or its namesake of the backend that serves its first tensor and has one."""

    @functools.wraps(function)
    def call(tensor, *args, **kwargs):
        return getattr(backend_of(tensor), function.__name__, function)(tensor, *args, **kwargs)

    return cast("Function", call)


def backend_of(tensor: Tensor) -> ModuleType:
    """The module whose functions take this tensor."""
    if type(tensor) is not Tensor:  # a subclass may have no memory to compute on
        return torch_ops
    if tensor.device.type == "cuda":
        return cuda_backend()
    return cpu_backend() if tensor.device.type == "cpu" else torch_ops


@functools.cache
def cpu_backend() -> ModuleType:
    """The module for tensors on the CPU, chosen once; `cpu_backend.cache_clear()` makes it choose again.

    Raises:
        ValueError: `HF_EFCP_BACKEND` names no backend.
        ImportError: it asks for one that cannot be imported.
        RuntimeError: it asks for Triton, outside of its interpreter.
    """
    wanted = _wanted()
    if wanted == "triton":
        backend = _imported("triton", required=True)
        if not getattr(backend, "INTERPRETED", False):
            raise RuntimeError(
                f"`{VARIABLE}=triton` needs tensors on a CUDA device, and these are on the CPU. Leave the variable "
                "unset, or set TRITON_INTERPRET=1 before Triton is imported to run its kernels in the interpreter."
            )
    else:
        backend = _imported("numba", required=wanted == "numba") if wanted != "torch" else None
    backend = backend or torch_ops
    logger.debug("Window operations on the CPU run on %s.", _name(backend))
    return backend


@functools.cache
def cuda_backend() -> ModuleType:
    """The module for tensors on CUDA devices, chosen once. Raises as `cpu_backend`."""
    wanted = _wanted()
    backend = torch_ops if wanted == "torch" else _imported("triton", required=wanted == "triton") or torch_ops
    logger.debug("Window operations on CUDA devices run on %s.", _name(backend))
    return backend


def _wanted() -> str:
    wanted = os.environ.get(VARIABLE, "")
    if wanted and wanted not in _ALLOWED:
        raise ValueError(f"`{VARIABLE}` must be one of {', '.join(map(repr, _ALLOWED))}, got {wanted!r}.")
    return wanted


def _imported(name: str, required: bool) -> ModuleType | None:
    try:
        return importlib.import_module(f"hf_efcp.ops.{name}_ops")
    except ImportError as error:
        if required:
            pip = {"numba": "hf-efcp[cpu]", "triton": "triton"}[name]
            raise ImportError(f"`{VARIABLE}={name}` needs {name}: pip install {pip} ({error}).") from error
        if name == "triton":
            logger.warning("Triton cannot be used (%s); steps on CUDA devices are slower on torch.", error)
        elif getattr(error, "name", None) != name:  # it is there, but not for this Python or numpy
            logger.warning("%s cannot be used (%s); the CPU runs slower on torch.", name, error)
        return None


def _name(backend: ModuleType) -> str:
    return backend.__name__.rpartition(".")[2].removesuffix("_ops")
