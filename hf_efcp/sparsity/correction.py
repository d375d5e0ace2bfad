"""AGENT's corrected gradient `d = g(θ) + c(u − g(θ̃))` for any optimizer, with two copies of the parameters."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_efcp.sparsity.coefficient import AgentCoefficient, linear_decay

COEFFICIENTS = ("loss", "grad", "fixed", "linear")
_GAMMA = {"loss": 0.1, "grad": 1.0}
_SUMS = 0.9  # share of the running sums of inner products that a measurement keeps


@dataclass(frozen=True)
class CorrectionOptions:
    """How a gradient is corrected.

    Args:
        coefficient: `loss`: slope of batch losses (AGENT, as published); `grad`: slope of gradients, from inner
            products at every `measure_every`-th step, which then holds one more gradient; `fixed`: `value`; `linear`:
            `value`, falling to 0 over training.
        gamma: γ of `loss` (by default 0.1) and `grad` (1).
        smoothing, initial, clip: see `AgentCoefficient`; `grad` starts at 0.
        value: of `fixed` and `linear`.
        refresh: when the snapshot and its full gradient are taken: every `epoch`, or a number of steps.
        full_grad_batches: optimizer steps' batches that the full gradient is averaged over; by default a whole epoch.
        measure_every: see `coefficient`.
        correct_grown: correct weights of masked layers that are 0 at the snapshot too, as published. Where a channel
            before a norm is all 0 there, the norm divides by √eps, and the snapshot's gradients of weights that have
            grown in it since are hundreds of times too large; `False` leaves such weights as they are until the next
            snapshot.

    Raises:
        ValueError: a value out of range.
    """

    coefficient: str = "loss"
    gamma: float | None = None
    smoothing: float = 0.3
    initial: float = 0.1
    clip: tuple[float, float] | None = (0.0, 1.0)
    value: float = 0.5
    refresh: int | str = "epoch"
    full_grad_batches: int | None = None
    measure_every: int = 10
    correct_grown: bool = True

    def __post_init__(self):
        if self.coefficient not in COEFFICIENTS:
            raise ValueError(f"`coefficient` must be one of {', '.join(COEFFICIENTS)}, got {self.coefficient!r}.")
        if self.refresh != "epoch" and not _is_count(self.refresh):
            raise ValueError(f"`refresh` must be `epoch` or a number of steps, at least 1, got {self.refresh!r}.")
        if self.full_grad_batches is not None and not _is_count(self.full_grad_batches):
            raise ValueError(f"`full_grad_batches` must be at least 1, or none, got {self.full_grad_batches!r}.")
        if not _is_count(self.measure_every):
            raise ValueError(f"`measure_every` must be at least 1, got {self.measure_every!r}.")
        if not isinstance(self.value, (int, float)) or not math.isfinite(self.value):
            raise ValueError(f"`value` must be a finite number, got {self.value!r}.")
        if not isinstance(self.correct_grown, bool):
            raise TypeError(f"`correct_grown` must be true or false, got {self.correct_grown!r}.")
        self.slope()  # checks the others

    def slope(self) -> AgentCoefficient:
        """A new average of slopes."""
        gamma = _GAMMA.get(self.coefficient, 1.0) if self.gamma is None else self.gamma
        initial = 0.0 if self.coefficient == "grad" else self.initial
        return AgentCoefficient(gamma, self.smoothing, initial, self.clip)


class GradientCorrection:
    """Snapshot weights θ̃, their full gradient u, and the coefficient c, over the parameters of a module.

    A step takes two backward passes into the same gradients: of the loss at θ, and inside `swapped()` of −c times the
    same batch's loss at θ̃; `add_full_gradient_` then makes the gradients `d`. Before the first refresh c is 0.

    Args:
        model: whose trainable parameters are corrected, and whose buffers (running statistics) are kept.
        options: see `CorrectionOptions`.
        masked: names of the parameters that have masks.
    """

    def __init__(self, model: nn.Module, options: CorrectionOptions, masked: Iterable[str] = ()):
        self.options = options
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.slope = options.slope()
        self.snapshot: dict[str, Tensor] = {}  # θ̃
        self.full_gradient: dict[str, Tensor] = {}  # u; parameters without a gradient are missing
        self.last_refresh: int | None = None  # step before which θ̃ was taken
        self.noise: float | None = None  # ‖u − g̃‖ of the step that was measured last
        self._model = model
        self._spared = () if options.correct_grown else tuple(masked)  # whose weights of 0 are left alone
        self._covariance, self._variance = 0.0, 0.0  # running sums of `grad`

    def coefficient(self, progress: float = 0.0) -> float:
        """c, with the share of training that is done; 0 while there is no full gradient."""
        if not self.full_gradient:
            return 0.0
        if self.options.coefficient == "fixed":
            return self.options.value
        if self.options.coefficient == "linear":
            return linear_decay(self.options.value, progress)
        return self.slope.value

    def is_due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether θ̃ is to be replaced before the step with this number, counted from 0."""
        period = steps_per_epoch if self.options.refresh == "epoch" else self.options.refresh
        return step % period == 0 and self.last_refresh != step  # pyright: ignore[reportOperatorIssue]

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """The module holds θ̃ inside, and its own weights and buffers again afterwards, whatever happens.

        Gradients that are taken inside are 0 where `correct_grown` says that nothing is corrected.
        """
        live = {name: p.data for name, p in self.parameters.items()}
        hooks = [self.parameters[n].register_hook(partial(_where_nonzero, self.snapshot[n])) for n in self._spared]
        with preserved_buffers(self._model):
            try:
                for name, p in self.parameters.items():
                    p.data = self.snapshot[name]
                torch.clear_autocast_cache()  # inside a caller's autocast it serves weights that it cast before
                yield
            finally:
                for hook in hooks:
                    hook.remove()
                for name, p in self.parameters.items():
                    p.data = live[name]
                torch.clear_autocast_cache()

    @torch.no_grad()
    def take_snapshot_(self, step: int) -> None:
        """θ̃ ← θ."""
        for name, p in self.parameters.items():
            if name in self.snapshot:
                self.snapshot[name].copy_(p.data)
            else:
                self.snapshot[name] = p.data.clone()
        self.last_refresh = step

    def refresh_(self, step: int, gradient: Mapping[str, Tensor], losses: Tensor, snapshot_losses: Tensor) -> None:
        """θ̃ ← θ and u ← `gradient`, taken at θ; its M batch losses at θ and at the θ̃ of before give a new c."""
        if self.options.coefficient == "loss":
            self.slope.update(losses, snapshot_losses)
        self.take_snapshot_(step)
        self.full_gradient = dict(gradient)
        for name in self._spared:
            if name in self.full_gradient:
                self.full_gradient[name] = _where_nonzero(self.snapshot[name], self.full_gradient[name])

    @torch.no_grad()
    def add_full_gradient_(self, coefficient: float, scale: float = 1.0) -> None:
        """`g ← g + c·scale·u` for every parameter that has a gradient; `scale` is that of a scaled loss."""
        for name, full in self.full_gradient.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                gradient.add_(full, alpha=coefficient * scale)

    @torch.no_grad()
    def combine_(
        self, gradients: Mapping[str, Tensor], at_snapshot: Mapping[str, Tensor], c: float, scale: float
    ) -> None:
        """Put `g + c(scale·u − g̃)`, formed in float32 at least, into the parameters' gradients.

        A parameter that takes part in one of the two alone has a gradient of 0 in the other.

        Args:
            gradients, at_snapshot: g and g̃ of one step, with the loss scaled by `scale`.
            c: the coefficient.
            scale: see above.
        """
        for name, p in self.parameters.items():
            g, old, full = (held.get(name) for held in (gradients, at_snapshot, self.full_gradient))
            if c and full is not None and not (g is None and old is None):
                zero = torch.zeros_like(p)
                g, old = zero if g is None else g, zero if old is None else old
                wide = torch.promote_types(g.dtype, torch.float32)
                g = (g.to(wide) + c * (full.to(wide) * scale - old.to(wide))).to(g.dtype)
            p.grad = g

    @torch.no_grad()
    def measure_(
        self, gradients: Mapping[str, Tensor], at_snapshot: Mapping[str, Tensor], scale: float, masks: Mapping[str, Any]
    ) -> None:
        """Take the inner products of a step into the coefficient `grad`: c → tr Cov(g, g̃)/tr Var(g̃).

        Both are estimated from deviations from u, the mean of g̃: E⟨g − u, g̃ − u⟩ is the covariance whatever the mean
        of g is. Entries that are masked do not count.
        """
        covariance = variance = 0.0
        for name, old in at_snapshot.items():
            full = self.full_gradient.get(name)
            if full is None or name not in gradients:
                continue
            deviation = old.double() / scale - full
            now = gradients[name].double() / scale - full
            if name in masks:
                deviation = deviation * masks[name]
            covariance += float((now * deviation).sum())
            variance += float(deviation.square().sum())
        if math.isfinite(covariance) and math.isfinite(variance):
            self.noise = math.sqrt(variance)
            self._covariance = _SUMS * self._covariance + covariance
            self._variance = _SUMS * self._variance + variance
            self.slope.include(self._covariance, self._variance, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, on the CPU."""
        return {
            "snapshot": {name: value.cpu() for name, value in self.snapshot.items()},
            "full_gradient": {name: value.cpu() for name, value in self.full_gradient.items()},
            "last_refresh": self.last_refresh,
            "sums": [self._covariance, self._variance],
            **self.slope.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned. Raises `ValueError` where it is of other parameters."""
        if state["snapshot"].keys() != self.parameters.keys():
            differing = sorted(state["snapshot"].keys() ^ self.parameters.keys())
            raise ValueError(f"The saved snapshot is of other parameters: {', '.join(differing[:5])} differ.")
        for kind in ("snapshot", "full_gradient"):
            setattr(self, kind, {n: v.to(self.parameters[n].device) for n, v in state[kind].items()})
        self.last_refresh = state["last_refresh"]
        self._covariance, self._variance = state["sums"]
        self.slope.load_state_dict(state)  # pyright: ignore[reportArgumentType]


@contextlib.contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """What happens to a module's buffers inside leaves no trace, in their values or in which tensors they are."""
    held = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in held:
                if buffer is not None:
                    buffer.copy_(value)  # pyright: ignore[reportArgumentType]
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer


def _where_nonzero(weight: Tensor, gradient: Tensor) -> Tensor:
    return gradient * (weight != 0)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
