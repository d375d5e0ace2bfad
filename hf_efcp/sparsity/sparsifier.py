"""A model's masks over training: made, kept, and changed by a published rule."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_efcp.sparsity.distribution import nonzero_counts
from hf_efcp.sparsity.maskable import Maskable, entries_of, maskable_parameters
from hf_efcp.sparsity.masks import grown, largest, pack, pruned, random_scores, unpack
from hf_efcp.sparsity.methods import SparseMethod, sparse_method
from hf_efcp.sparsity.redistribution import momentum_sizes, redistributed

logger = logging.getLogger(__name__)

# State of optimizers with an entry for each weight: sums and averages of gradients and of their squares, and of the
# weights themselves (`z` and `ax`), which would bring masked ones back.
_FIRST = ("exp_avg", "momentum_buffer", "momentum", "residual", "grad_avg", "prev", "grok_ema", "compensation")
_SECOND = ("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "mean_square", "sum", "acc_delta")
MOMENTS = (*_FIRST, *_SECOND, "z", "ax")
INITIAL = ("random", "magnitude", "zeros")
_MOMENTUM = 0.9  # of the dense gradients that `snfs` grows by


class Sparsifier:
    """Keeps `θ = θ ⊙ m` while any optimizer trains θ, and changes the masks m by a rule of `METHODS`.

    For each step of the optimizer, in this order: `observe_` with the dense gradients in place, `mask_gradients_`,
    clipping and the optimizer's step, unless `replaces_step`, then `finish_step_`. Nothing here waits for another
    process: with gradients averaged over the processes all of them end with the same masks.

    Args:
        model: whose `maskable_parameters` are masked.
        sparsity: share of their weights that is 0, in [0, 1); with `gmp` at the end.
        method: a name of `METHODS`.
        total_steps, steps_per_epoch: of the training, for the schedules.
        seed: of the first masks and of random growth.
        initial: first masks: `random`, `magnitude` (largest weights of each layer; for pretrained models), `zeros`
            (those of a model that is sparse already).
        include, exclude, densities: see `maskable_parameters` and `nonzero_counts`.
        settings: of the method, see `SparseMethod`.

    Raises:
        ValueError, TypeError: a setting that does not exist or cannot work.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        method: str = "rigl",
        *,
        total_steps: int = 1,
        steps_per_epoch: int | None = None,
        seed: int = 0,
        initial: str = "random",
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        densities: Mapping[str, float] | None = None,
        **settings: Any,
    ):
        if isinstance(sparsity, bool) or not isinstance(sparsity, Real) or not 0 <= sparsity < 1:
            raise ValueError(f"`sparsity` must be in [0, 1), got {sparsity!r}.")
        if initial not in INITIAL:
            raise ValueError(f"`initial` must be one of {', '.join(INITIAL)}, got {initial!r}.")
        self.method: SparseMethod = sparse_method(method, **settings)
        self.sparsity, self.seed = sparsity, seed
        self._run = total_steps, steps_per_epoch or total_steps
        if not settings.keys() & {"interval", "begin", "stop", "stop_epochs"}:
            self.method = self._fitted()
        self.last = self.method.last_step(*self._run)
        self.layers = maskable_parameters(model, include, exclude)
        self.size = sum(layer.size for layer in self.layers)
        self.step = 0  # steps of the optimizer that were taken
        self.changes = 0  # times that the topology changed
        self._scores: dict[str, Tensor] = {}
        self._momentum: dict[str, Tensor] = {}
        density = 1.0 if self.method.gradual else 1 - sparsity
        self.counts = nonzero_counts(
            self.layers, density, self.method.distribution, densities=densities, first_dense=self.method.first_dense
        )
        self._adopt(self._first_masks(initial))
        if self.method.gradual and self.method.begin >= self.last > 0:
            raise ValueError(
                f"`{method}` prunes from step {self.method.begin} (`begin`) to step {self.last} (`stop`) of "
                f"{total_steps}, which leaves no step; make `begin` smaller, or train longer."
            )
        if initial == "zeros" and abs(self.density() - density) > 0.005:
            raise ValueError(
                f"`initial=zeros`: the model has sparsity {1 - self.density():.4f}, not {1 - density:.4f}; say so with "
                "`sparsity`, or begin with other masks."
            )

    def _adopt(self, masks: dict[str, Tensor]) -> None:
        self.masks = masks
        self.fired = {name: mask.clone() for name, mask in masks.items()}

    def _fitted(self) -> SparseMethod:
        if (fitted := self.method.fitted(*self._run)) != self.method:
            logger.warning(
                "`%s` changes masks every %s steps from step %d on, never in these %d steps; here it is every %d "
                "steps. Set `interval` to choose.",
                *(fitted.name, self.method.interval, self.method.begin, self._run[0], fitted.interval),
            )
        return fitted

    @torch.no_grad()
    def _first_masks(self, initial: str) -> dict[str, Tensor]:
        masks = {}
        for number, layer in enumerate(self.layers):
            weight = layer.parameter
            if initial == "zeros":
                masks[layer.name] = weight != 0
                continue
            scores = random_scores(weight.shape, self.seed, 0, number) if initial == "random" else weight.abs()
            everywhere = torch.ones_like(weight, dtype=torch.bool)
            masks[layer.name] = largest(scores.to(weight.device), everywhere, self.counts[layer.name])
        return masks

    # ---- a step of the optimizer

    @property
    def is_due(self) -> bool:
        """Whether the topology changes at the step that is being taken."""
        return self.method.is_due(self.step + 1, *self._run)

    @property
    def replaces_step(self) -> bool:
        """Whether the change takes the place of the optimizer's step."""
        return self.is_due and self.method.order == "replace"

    @property
    def needs_gradients(self) -> bool:
        """Whether `observe_` looks at the dense gradients of this step: at due ones alone, with momentum at all."""
        return self.method.grow == "momentum" or (self.is_due and self.method.grow == "gradient")

    @torch.no_grad()
    def observe_(self, gradients: Mapping[str, Tensor] | None = None, scale: float = 1.0) -> None:
        """Take from the dense gradients, by default those of the parameters, what growth will need.

        `scale` is what a scaled loss has multiplied them by.
        """
        if not self.needs_gradients:
            return
        for layer in self.layers:
            if (gradient := layer.parameter.grad if gradients is None else gradients.get(layer.name)) is None:
                continue
            if self.method.grow == "gradient":
                self._scores[layer.name] = gradient.abs()
                continue
            gradient = torch.nan_to_num(gradient.float() / scale, posinf=0.0, neginf=0.0)
            buffer = self._momentum.setdefault(layer.name, torch.zeros_like(gradient))
            buffer.mul_(_MOMENTUM).add_(gradient)

    @torch.no_grad()
    def mask_gradients_(self) -> None:
        """`g ← g ⊙ m`, before anything takes a norm of the gradients."""
        for layer in self.layers:
            if layer.parameter.grad is not None:
                layer.parameter.grad.mul_(self.masks[layer.name])

    @torch.no_grad()
    def finish_step_(self, optimizer: Optimizer | None = None, *, skipped: bool = False) -> bool:
        """After the optimizer's step: change the topology where that is due, and mask weights and moments.

        A step that was skipped (fp16) counts for no schedule. Returns whether the topology changed.
        """
        due = self.is_due and not skipped
        born = self._change_() if due else {}
        self._scores.clear()
        self.step += not skipped
        self.changes += due
        self.apply_(optimizer, born)
        return due

    @torch.no_grad()
    def apply_(self, optimizer: Optimizer | None = None, born: Mapping[str, Tensor] | None = None) -> None:
        """`θ ← θ ⊙ m`, and the same for the optimizer's moments, whose newly grown entries start at 0."""
        for layer in self.layers:
            mask = self.masks[layer.name]
            layer.parameter.mul_(mask)
            if optimizer is None:
                continue
            kept = mask & ~born[layer.name] if born and layer.name in born else mask
            there = entries_of(optimizer, layer.parameter, kept)
            for name, value in optimizer.state.get(layer.parameter, {}).items():
                if name in MOMENTS and isinstance(value, Tensor) and value.shape == there.shape:
                    value.mul_(there.to(value.device))

    # ---- a change of the topology

    def _change_(self) -> dict[str, Tensor]:
        """New masks; weights that must start anew are set to 0. Returns where weights were grown, by layer."""
        if self.method.gradual:
            self._prune_gradually_()
            return {}
        moves = self.method.grow == "momentum"
        sizes = momentum_sizes(self.masks, self._momentum) if moves else {}
        kept = {layer.name: self._pruned(layer, sizes) for layer in self.layers}
        removed = {name: int(self.masks[name].sum() - mask.sum()) for name, mask in kept.items()}
        adding = redistributed(kept, removed, sizes) if moves else removed
        born = {}
        for number, layer in enumerate(self.layers):
            name, before = layer.name, kept[layer.name]
            mask = grown(self._growth_scores(number), before, adding[name])
            stays = self.masks[name] if self.method.regrow_keep_value else before
            layer.parameter.mul_(stays & mask)
            born[name] = mask & ~stays
            self.masks[name] = mask
            self.fired[name] |= mask
        return born

    def _pruned(self, layer: Maskable, sizes: Mapping[str, float]) -> Tensor:
        """The layer's mask less ⌈ρk⌉ of its k weights; a dense layer is left alone, it has no room to explore."""
        mask = self.masks[layer.name]
        active = int(mask.sum())
        if active == layer.size:
            return mask.clone()
        rate = self.method.exchange_rate(self.step + 1, self.last)
        sparsity = 1 - active / layer.size
        if sparsity < 0.2 and sizes and sizes[layer.name] * len(sizes) > sum(sizes.values()):
            rate = min(sparsity, rate)  # SNFS's guard: such a layer will gain weights and has little room
        count = min(active, math.ceil(rate * active))
        return pruned(layer.parameter, mask, count)

    def _growth_scores(self, number: int) -> Tensor:
        layer = self.layers[number]
        weight = layer.parameter
        if self.method.grow == "random":
            return random_scores(weight.shape, self.seed, self.step + 1, number + 1).to(weight.device)
        scores = self._scores if self.method.grow == "gradient" else self._momentum
        return scores.get(layer.name, torch.zeros_like(weight)).abs()

    def _prune_gradually_(self) -> None:
        """Keep the largest weights of the whole model; the number that the schedule says."""
        sparsity = self.method.gradual_sparsity(self.step + 1, self.last, self.sparsity)
        active = torch.cat([mask.flatten() for mask in self.masks.values()])
        weights = torch.cat([layer.parameter.abs().flatten() for layer in self.layers])
        count = min(int(active.sum()), round((1 - sparsity) * self.size))
        parts = largest(weights, active, count).split([layer.size for layer in self.layers])
        for layer, part in zip(self.layers, parts, strict=True):
            self.masks[layer.name] = part.view(layer.parameter.shape).clone()

    # ---- figures and state

    def density(self) -> float:
        """Share of the masked layers' weights that is active. Waits for the device."""
        return sum(int(mask.sum()) for mask in self.masks.values()) / self.size

    def exploration(self) -> float:
        """Share of the weights that were ever active (In-Time Over-Parameterization, arXiv 2102.02887)."""
        return sum(int(mask.sum()) for mask in self.fired.values()) / self.size

    def packed_masks(self) -> dict[str, Tensor]:
        """The masks, eight entries a byte, by the parameters' names."""
        return {name: pack(mask) for name, mask in self.masks.items()}

    def load_masks(self, packed: Mapping[str, Tensor]) -> None:
        """Take over masks that `packed_masks` returned; what was ever active starts anew.

        Raises:
            ValueError: they are of other layers, or of other sizes.
        """
        self._adopt(self._unpacked(packed))

    def _unpacked(self, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        wanted = {layer.name: layer for layer in self.layers}
        if wanted.keys() != packed.keys():
            differing = sorted(wanted.keys() ^ packed.keys())
            raise ValueError(
                f"The saved masks are not of the layers that are masked here: {', '.join(differing[:5])} in one of "
                "them alone. Mask the same model with the same `include` and `exclude`."
            )
        for name, layer in wanted.items():
            if len(packed[name]) != -(-layer.size // 8):
                raise ValueError(f"The saved mask of {name} is not one of shape {tuple(layer.parameter.shape)}.")
        return {n: unpack(packed[n], x.parameter.shape).to(x.parameter.device) for n, x in wanted.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs besides the weights, on the CPU."""
        return {
            "step": self.step,
            "changes": self.changes,
            "masks": self.packed_masks(),
            "fired": {name: pack(mask) for name, mask in self.fired.items()},
            "momentum": {name: value.cpu() for name, value in self._momentum.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned. Raises `ValueError` as `load_masks`."""
        self.masks, self.fired = self._unpacked(state["masks"]), self._unpacked(state["fired"])
        self.step, self.changes = state["step"], state["changes"]
        self._momentum = {name: value.to(self.masks[name].device) for name, value in state["momentum"].items()}
