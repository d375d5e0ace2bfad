"""The optimizers that ours are compared with in the quality benchmark, and the learning rates that each is tried at."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

BASELINE = "adamw_torch"


@dataclass(frozen=True)
class Rival:
    """How an optimizer is built, and its learning rates.

    Args:
        new: builds it over a model at a learning rate; `None` for a name that Trainer's `--optim` takes.
        rates: what AdamW's usual learning rate of a task is multiplied with.
    """

    new: Callable[[nn.Module, float], Optimizer] | None = None
    rates: tuple[float, ...] = (0.5, 1, 2, 4)


class MuonWithAdamW(Optimizer):
    """Muon for the matrices between a model's embeddings and its head, AdamW for the rest, as Muon is meant.

    Both take the same learning rate: Muon's updates are scaled to AdamW's root mean square.
    """

    def __init__(self, model: nn.Module, lr: float):
        outside = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
        outside |= {id(p) for p in head(model).parameters()}
        parameters = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in parameters if p.ndim == 2 and id(p) not in outside]
        inside = {id(p) for p in matrices}
        others = [p for p in parameters if id(p) not in inside]
        self.parts = [torch.optim.AdamW(others, lr=lr, weight_decay=0.0)]
        groups = [{"params": others}]
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
            groups.append({"params": matrices})
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups[0]["lr"] = group["lr"]
            part.step()
            self.state.update(part.state)


def head(model: nn.Module) -> nn.Module:
    """What maps the last features to classes or words."""
    return getattr(model, "classifier", None) or getattr(model, "score", None) or model.get_output_embeddings()


def _peer(name: str) -> Callable[..., Optimizer]:
    """An optimizer of `pytorch_optimizer`. Raises `RuntimeError` with the pip line where that is missing."""
    try:
        return getattr(importlib.import_module("pytorch_optimizer"), name)
    except ImportError as error:
        raise RuntimeError(f"{name} comes from pytorch_optimizer: pip install --no-deps pytorch_optimizer") from error


RIVALS = {
    BASELINE: Rival(),
    "sgd": Rival(lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), (20, 60, 180, 540)),
    "muon": Rival(MuonWithAdamW, (2, 4, 8, 16)),  # its matrices have a root mean square of 0.2, AdamW's first steps 1
    "lion": Rival(lambda model, lr: _peer("Lion")(model.parameters(), lr=lr), (0.1, 0.2, 0.4, 0.8)),
    "soap": Rival(lambda model, lr: _peer("SOAP")(model.parameters(), lr=lr, weight_decay=0.0)),
}
