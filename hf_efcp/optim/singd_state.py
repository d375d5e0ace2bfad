"""The two factors of a layer: their tensors in `state[weight]`, their update and use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_efcp.curvature.kronecker import Factor, bound_growth, precondition, starting_scale, update_factors
from hf_efcp.curvature.layer_statistics import Sums
from hf_efcp.curvature.layers import Layer
from hf_efcp.curvature.structures import Dense

_SIDES = ("input", "output")


def new_factors(layer: Layer, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """K = I and C = I, zero directions, and KKᵀ, CCᵀ where they are kept."""
    state = {}
    words = options["preconditioner_dtype"].split("+")
    for side, structure, word in zip(_SIDES, (layer.inputs, layer.outputs), words, strict=True):
        precise = torch.promote_types(torch.float32, layer.weight.dtype)
        dtype = precise if word == "none" else getattr(torch, word)
        identity = structure.identity(dtype, layer.weight.device)
        state[f"{side}_factor"] = identity
        if options["alpha1"] and not options["kfac_like"]:
            state[f"{side}_direction"] = torch.zeros_like(identity)
        if options["cache_metrics"] and isinstance(structure, Dense):
            state[f"{side}_metric"] = identity.clone()
    return state


class FactorPair:
    """K and C of one layer.

    Args:
        layer: whose they are.
        state: of its weight; written in place.
        options: the optimizer's.
    """

    def __init__(self, layer: Layer, state: dict[str, Tensor], options: Mapping[str, Any]):
        self.layer, self.state, self.options = layer, state, options

    @property
    def dtype(self) -> torch.dtype:
        """In which steps are computed: float32, float64 if a factor or the weight is."""
        dtypes = [self.state[f"{side}_factor"].dtype for side in _SIDES]
        return torch.promote_types(
            torch.promote_types(*dtypes), torch.promote_types(torch.float32, self.layer.weight.dtype)
        )

    @property
    def has_statistics(self) -> bool:
        """Whether the factors have ever been updated."""
        return int(self.state["refreshes"]) > 0

    def refresh(self, sums: Sums, loss_terms: Tensor | float | None) -> None:
        """One update of both factors from a step's sums; statistics that are not finite change nothing."""
        options, inputs, outputs = self.options, *self._factors()
        terms = sums.terms if loss_terms is None else loss_terms
        if options["loss_average"] is None:
            terms = 1
        u = sums.inputs.to(self.dtype) / sums.rows.clamp_min(1)
        v = sums.outputs.to(self.dtype) * terms
        count = int(self.state["refreshes"])
        h_k = inputs.structure.finish(inputs.values, u)
        h_c = outputs.structure.finish(outputs.values, v)
        if options["warm_start"] and count == 0:
            scales = starting_scale(inputs.structure, h_k, outputs.structure, h_c, options)
            inputs, outputs = (
                factor._replace(values=factor.values * scale)
                for factor, scale in zip((inputs, outputs), scales, strict=True)
            )
        else:
            warmth = min(1.0, (count + 1) / max(1, options["lr_cov_warmup"]))
            inputs, outputs = update_factors(inputs, outputs, h_k, h_c, options, options["lr_cov"] * warmth)
        if options["max_growth"] is not None:
            inputs, outputs = bound_growth(inputs, outputs, options["max_growth"])
        self._write(inputs, outputs)
        self.state["refreshes"] += 1

    def precondition(self, gradient: Tensor) -> Tensor:
        """`CCᵀ G KKᵀ` of a (d_o, d_i) gradient in `dtype`."""
        metrics = [self.state.get(f"{side}_metric") for side in _SIDES]
        inputs, outputs = self._factors()
        return precondition(gradient, inputs, outputs, tuple(m if m is None else m.to(self.dtype) for m in metrics))

    def growth(self) -> Tensor:
        """() `τ(KKᵀ)·τ(CCᵀ)`: how much longer a mean step is than SGD's."""
        traces = [f.structure.mean_trace(f.structure.gram(f.values)) for f in self._factors()]
        return traces[0] * traces[1]

    def _factors(self) -> list[Factor]:
        factors = []
        for side, structure in zip(_SIDES, (self.layer.inputs, self.layer.outputs), strict=True):
            direction = self.state.get(f"{side}_direction")
            direction = None if direction is None else direction.to(self.dtype)
            factors.append(Factor(structure, self.state[f"{side}_factor"].to(self.dtype), direction))
        return factors

    def _write(self, *factors: Factor) -> None:
        finite = torch.stack([f.values.isfinite().all() for f in factors]).all()
        for side, factor in zip(_SIDES, factors, strict=True):
            self._copy(f"{side}_factor", factor.values, finite)
            if factor.momentum is not None:
                self._copy(f"{side}_direction", factor.momentum, finite)
            if f"{side}_metric" in self.state:
                stored = self.state[f"{side}_factor"].to(self.dtype).view(factor.structure.dim, -1)
                self.state[f"{side}_metric"].copy_((stored @ stored.T).flatten())

    def _copy(self, name: str, value: Tensor, finite: Tensor) -> None:
        old = self.state[name]
        old.copy_(torch.where(finite, value.to(old.dtype), old))


def clip_scale(
    directions: Mapping[Layer, Tensor], gradients: Mapping[Layer, Tensor], lr: float, options: Mapping[str, Any]
) -> Tensor | None:
    """() factor by which all preconditioned gradients are shortened, or `None` without clipping.

    `max_update_norm`: to that norm. `kl_clip`: by `ν = √(κ/(lr²·Σ⟨u, g⟩))`, so that twice the step's divergence,
    `(lr·ν)² uᵀFu` with `Fu ≈ g`, is at most κ.
    """
    limit, kappa = options["max_update_norm"], options["kl_clip"]
    if not directions or (limit is None and kappa is None):
        return None
    device = next(iter(directions.values())).device
    scale = torch.ones((), dtype=torch.float64, device=device)
    if limit is not None:
        norms = [torch.linalg.vector_norm(u, dtype=torch.float64).to(device) for u in directions.values()]
        scale = (limit / torch.stack(norms).norm()).clamp_max(1)
    if kappa is not None and lr:
        inner = sum((u * gradients[layer]).sum().double().to(device) for layer, u in directions.items())
        scale = torch.minimum(scale, (kappa / (lr**2 * inner.clamp_min(0))).sqrt())
    return scale
