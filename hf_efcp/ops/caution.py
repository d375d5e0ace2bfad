"""Cautious steps: what goes up the gradient waits."""

from __future__ import annotations

import torch
from torch import Tensor

BOLD = 2**0.5  # where half of the entries agree, a cautious step is as long as before


def cautious(step: Tensor, gradient: Tensor) -> Tensor:
    """The step without what goes up its gradient, the rest of it √2 times as long (after arXiv 2411.16085).

    Entries whose gradient is 0 stay as they are. The factor is fixed, where the paper's is one over the share of
    entries that agree: a step keeps its length if half of them do, and no rank or block need know of another.
    """
    agreement = torch.sign(step).mul_(torch.sign(gradient))
    return torch.where(agreement > 0, step * BOLD, torch.where(agreement < 0, step.new_zeros(()), step))
