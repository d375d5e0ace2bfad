"""Adversarial examples of image batches: FGSM and projected gradient descent."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_efcp.optim.options import refuse_unknown
from hf_efcp.train.sparse_options import parse_settings

Adversary = Callable[[nn.Module, Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class PGD:
    """`x ← Π(x + step_size·sign ∇ₓL)`, `steps` times, inside `‖x − x₀‖∞ ≤ epsilon` (arXiv 1706.06083).

    The model is in evaluation mode meanwhile, so dropout is off and running statistics stay as they are.

    Args:
        epsilon: largest change of an input, in units of the model's inputs: of normalized pixels where it gets those.
        step_size: of one step; by default `2.5·epsilon/steps`.
        steps: number of steps.
        random_start: begin at a random point of the ball.
        low, high: range of the inputs, where they have one.
        key: name of the images among the inputs.
    """

    epsilon: float = 8 / 255
    step_size: float | None = None
    steps: int = 10
    random_start: bool = True
    low: float | None = None
    high: float | None = None
    key: str = "pixel_values"

    def __post_init__(self):
        for name in ("epsilon", "step_size"):
            value = getattr(self, name)
            if not (_is_number(value) and value >= 0) and not (name == "step_size" and value is None):
                raise ValueError(f"`{name}` must be at least 0, got {value!r}.")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {self.steps!r}.")
        if not isinstance(self.random_start, bool):
            raise TypeError(f"`random_start` must be true or false, got {self.random_start!r}.")
        bounds = [bound for bound in (self.low, self.high) if bound is not None]
        if not all(map(_is_number, bounds)) or bounds != sorted(bounds):
            raise ValueError(f"`low` and `high` must be numbers, low ≤ high, got {self.low!r} and {self.high!r}.")
        if not isinstance(self.key, str):
            raise TypeError(f"`key` must be a name, got {self.key!r}.")

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs with adversarial images. Raises `ValueError` where there are no images or no loss."""
        if self.key not in inputs:
            raise ValueError(f"No inputs `{self.key}` to attack; `key` takes one of {', '.join(inputs)}.")
        clean = inputs[self.key].detach()
        step = 2.5 * self.epsilon / self.steps if self.step_size is None else self.step_size
        images = clean.clone()
        if self.random_start:
            images = self._projected(images + (2 * torch.rand_like(images) - 1) * self.epsilon, clean)
        with _evaluating(model):
            for _ in range(self.steps):
                gradient = self._gradient(model, inputs, images)
                images = self._projected(images + step * gradient.sign(), clean)
        return {**inputs, self.key: images}

    def _gradient(self, model: nn.Module, inputs: Mapping[str, Any], images: Tensor) -> Tensor:
        with torch.enable_grad():
            images = images.clone().requires_grad_()
            outputs = model(**{**inputs, self.key: images})
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
            if loss is None:
                raise ValueError("The model returned no loss to attack; give it labels, or an adversary of your own.")
            # A mean over a large batch would underflow in half precision; the sign does not care.
            return torch.autograd.grad(loss * len(images), images)[0]

    def _projected(self, images: Tensor, clean: Tensor) -> Tensor:
        images = torch.clamp(images, clean - self.epsilon, clean + self.epsilon)
        return images if self.low is None and self.high is None else images.clamp(self.low, self.high)


@dataclass(frozen=True)
class FGSM(PGD):
    """`x + epsilon·sign ∇ₓL`: one step of the whole length from the image itself (arXiv 1412.6572)."""

    steps: int = 1
    random_start: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.steps != 1:
            raise ValueError(f"FGSM takes one step; PGD takes {self.steps}.")
        if self.step_size is None:
            object.__setattr__(self, "step_size", self.epsilon)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def make_adversary(text: str) -> Adversary:
    """The adversary that `fgsm` or `pgd:epsilon=0.1,steps=7` describes.

    Raises:
        ValueError, TypeError: no such adversary or option.
    """
    name, _, options = text.partition(":")
    kinds = {"fgsm": FGSM, "pgd": PGD}
    if name not in kinds:
        raise ValueError(f"`adversary` must be one of {', '.join(kinds)}, with options after a colon, got {text!r}.")
    settings = parse_settings(options, "adversary")
    refuse_unknown(name, settings, PGD.__dataclass_fields__)
    return kinds[name](**settings)
