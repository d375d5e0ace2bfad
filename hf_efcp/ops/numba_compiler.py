"""How kernels are compiled: at their first call, without the GIL, cached on disk where that is possible."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba

logger = logging.getLogger(__name__)


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`numba.njit` for kernels, cached beside their file or, where that is read-only, in the user's cache directory.

    The cache of a kernel is as old as its file: kernels that call each other stand in one file, and who changes
    `numba_formats` touches the files that import it.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(nogil=True, error_model="numpy", cache=True, **options)(function)
        except RuntimeError as error:  # no directory is writable
            logger.debug("%s is compiled anew in every process: %s", function.__name__, error)
            return numba.njit(nogil=True, error_model="numpy", **options)(function)

    return decorate
