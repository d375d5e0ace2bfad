"""The optimizers that ours are compared with in the quality benchmark, and the learning rates that each is tried at."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bench_singd import FACTORS, tensors
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


class Parts(Optimizer):
    """Several optimizers, each over parameters of its own, as one with one learning rate."""

    def __init__(self, parts: Sequence[Optimizer], lr: float):
        self.parts = tuple(parts)  # their groups are this one's own, which a scheduler writes into
        super().__init__([group for part in self.parts for group in part.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for part in self.parts:
            part.step()
            self.state.update(part.state)


class SingdPackage(Parts):
    """The singd package for linear layers and 2-d convolutions, SGD with momentum for the rest, as its authors train.

    Raises:
        RuntimeError: the package is not installed, with the pip line.
    """

    def __init__(self, model: nn.Module, lr: float):
        try:
            package = importlib.import_module("singd.optim.optimizer")
        except ImportError as error:
            raise RuntimeError("SINGD comes from singd: pip install --no-deps singd einops einconv unfoldNd") from error
        self.singd = package.SINGD(model, lr=lr, warn_unsupported=False)
        its_own = [p for group in self.singd.param_groups for p in group["params"]]
        rest = without([p for p in model.parameters() if p.requires_grad], its_own)
        super().__init__([self.singd, torch.optim.SGD(rest, lr=lr, momentum=0.9)], lr)

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        super().step(closure)
        factors = [tensor for name in FACTORS for tensor in tensors(getattr(self.singd, name))]
        self.state["factors"] = {str(number): factor for number, factor in enumerate(factors)}  # so that they count


def muon(model: nn.Module, lr: float) -> Optimizer:
    """Muon for the matrices between a model's embeddings and its head, AdamW for the rest, as Muon is meant.

    Both take the same learning rate: Muon's updates are scaled to AdamW's root mean square.
    """
    outside = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    outside |= {id(p) for p in head(model).parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim == 2 and id(p) not in outside]
    parts: list[Optimizer] = [torch.optim.AdamW(without(parameters, matrices), lr=lr, weight_decay=0.0)]
    if matrices:
        parts.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return Parts(parts, lr)


def without(parameters: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters that are not among the others."""
    known = {id(p) for p in others}
    return [p for p in parameters if id(p) not in known]


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
    "muon": Rival(muon, (2, 4, 8, 16)),  # its matrices have a root mean square of 0.2, AdamW's first steps 1
    "lion": Rival(lambda model, lr: _peer("Lion")(model.parameters(), lr=lr), (0.1, 0.2, 0.4, 0.8)),
    "soap": Rival(lambda model, lr: _peer("SOAP")(model.parameters(), lr=lr, weight_decay=0.0)),
    "singd_package": Rival(SingdPackage, (20, 60, 180, 540)),
}
