"""Files of sparse training: masks beside the weights, and what resuming needs."""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import cached_file

MASKS_NAME = "sparse_masks.safetensors"
STATE_NAME = "sparse_training.pt"


def random_name(rank: int) -> str:
    """The file of a process's random state at the start of its epoch."""
    return f"sparse_random_{rank}.pt"


def save_masks(packed: dict[str, Tensor], folder: str) -> None:
    """Write masks, eight entries a byte, under the names of the parameters in memory."""
    save_file(packed, os.path.join(folder, MASKS_NAME), metadata={"format": "pt"})


def load_masks(source: str | None) -> dict[str, Tensor] | None:
    """Masks saved with a model, in a local folder or on the Hub; `None` where there are none."""
    if not source:
        return None
    if os.path.isdir(source):
        path = os.path.join(source, MASKS_NAME)
        return load_file(path) if os.path.isfile(path) else None
    try:
        path = cached_file(
            source,
            MASKS_NAME,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # a name that is no repository's
        return None
    return load_file(path) if path else None


def save_state(state: dict[str, Any], folder: str) -> None:
    """Write what `load_state` reads."""
    os.makedirs(folder, exist_ok=True)
    torch.save(state, os.path.join(folder, STATE_NAME))


def load_state(folder: str) -> dict[str, Any] | None:
    """The state in a checkpoint, on the CPU; `None` where there is none."""
    return _load(os.path.join(folder, STATE_NAME))


def save_random(state: dict[str, Any], folder: str, rank: int) -> None:
    """Write a process's random state; it may be here before the first process has made the folder."""
    os.makedirs(folder, exist_ok=True)
    torch.save(state, os.path.join(folder, random_name(rank)))


def load_random(folder: str, rank: int) -> dict[str, Any] | None:
    """A process's random state; `None` where there is none."""
    return _load(os.path.join(folder, random_name(rank)))


def _load(path: str) -> dict[str, Any] | None:
    return torch.load(path, map_location="cpu", weights_only=True) if os.path.isfile(path) else None
