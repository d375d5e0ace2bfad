"""Large vectors that live for one step."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import numpy as np
except ImportError:  # torch works without
    np = None


def empty(size: int, device: torch.device, serves: torch.device | None = None) -> Tensor:
    """(size,) float32 with any content.

    On the CPU the memory is numpy's, which asks Linux for huge pages: the first write to 90 MB, an encoder's gradient,
    takes 15 ms there and 42 ms in torch's own memory, most of it page faults. What goes to and from a GPU, the device
    that it `serves`, is pinned.
    """
    if device.type == "cpu" and serves is not None and serves.type == "cuda" and torch.cuda.is_available():
        return torch.empty(size, dtype=torch.float32, pin_memory=True)
    if device.type == "cpu" and np is not None:
        return torch.from_numpy(np.empty(size, np.float32))
    return torch.empty(size, dtype=torch.float32, device=device)
