"""States of every random generator that a model or its data may draw from."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The generators' states, in types that `torch.load(weights_only=True)` reads."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),  # pyright: ignore[reportAttributeAccessIssue]
        "cpu": torch.random.get_rng_state(),
        "devices": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the generators back to where `random_state` found them."""
    kind, keys, *rest = state["numpy"]
    random.setstate(_tuples(state["python"]))
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.random.set_rng_state(state["cpu"])
    if state["devices"]:
        torch.cuda.set_rng_state_all(state["devices"])


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Whatever draws inside leaves no trace."""
    state = random_state()
    try:
        yield
    finally:
        restore_random_state(state)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
