"""The two factors of a layer: their tensors in `state[weight]`, their update and use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_efcp.curvature.kronecker import Factor, Moment, at_starting_scale, bound_growth, precondition, update_factors
from hf_efcp.curvature.layer_statistics import Sums
from hf_efcp.curvature.layers import Layer
from hf_efcp.curvature.structures import Dense, DenseMetric, Structure

_SIDES = ("input", "output")


def has_directions(options: Mapping[str, Any]) -> bool:
    """Whether a momentum of the factors' directions is kept."""
    return bool(options["alpha1"]) and not options["kfac_like"]


def stores_metric_alone(structure: Structure, options: Mapping[str, Any]) -> bool:
    """Whether a dense factor's update needs no more than KKᵀ: all but momentum, and the largest entry of m, do."""
    return type(structure) is Dense and not has_directions(options) and not options["normalize_lr_cov"]


def factor_name(side: str, structure: Structure) -> str:
    """The key in `state` of what is stored of a factor: of the input's K, or KKᵀ where that is all."""
    return f"{side}_metric" if isinstance(structure, DenseMetric) else f"{side}_factor"


def new_factors(layer: Layer, options: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """K = I and C = I, zero directions, and KKᵀ, CCᵀ where they are kept."""
    state = {}
    words = options["preconditioner_dtype"].split("+")
    for side, structure, word in zip(_SIDES, (layer.inputs, layer.outputs), words, strict=True):
        precise = torch.promote_types(torch.float32, layer.weight.dtype)
        dtype = precise if word == "none" else getattr(torch, word)
        identity = structure.identity(dtype, device)
        state[factor_name(side, structure)] = identity
        if has_directions(options):
            state[f"{side}_direction"] = torch.zeros_like(identity)
        if options["cache_metrics"] and structure.keeps_metric:
            state[f"{side}_metric"] = structure.metric(identity)
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
        self.done: torch.cuda.Event | None = None  # an update on another stream
        sides = zip(_SIDES, (layer.inputs, layer.outputs), strict=True)
        self._names = [(side, structure, factor_name(side, structure)) for side, structure in sides]
        stored = [(name, f"{side}_direction", f"{side}_metric") for side, _, name in self._names]
        self._stored = [name for names in stored for name in dict.fromkeys(names) if name in state]
        self.kind = tuple((type(s).__name__, str(vars(s))) for s in (layer.inputs, layer.outputs))

    @property
    def numel(self) -> int:
        """Stored entries of both factors."""
        return sum(structure.numel for _, structure, _ in self._names)

    def is_of(self, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> bool:
        """Whether these are its state and options, and none that have taken their place since."""
        return self.state is state and self.options is options

    @property
    def dtype(self) -> torch.dtype:
        """In which steps are computed: float32, float64 if a factor or the weight is."""
        dtype = torch.float32
        for tensor in (self.layer.weight, *(self.state[name] for _, _, name in self._names)):
            dtype = dtype if tensor.dtype is dtype else torch.promote_types(dtype, tensor.dtype)
        return dtype

    @property
    def has_statistics(self) -> bool:
        """Whether the factors have ever been updated."""
        return int(self.state["refreshes"]) > 0

    def refresh(self, sums: Sums, loss_terms: Tensor | float | None) -> None:
        """One update of both factors from a step's sums; the caller counts it. What is not finite changes nothing."""
        self.write(self.updated(self.operands(sums, loss_terms), int(self.state["refreshes"])))

    def operands(self, sums: Sums, loss_terms: Tensor | float | None) -> dict[str, Tensor]:
        """All tensors that an update reads, in `dtype`: stored ones by their names, U and V with their scales."""
        dtype = self.dtype
        tensors = {name: self.state[name].to(dtype) for name in self._stored}
        for (side, _, _), moment in zip(self._names, self._curvatures(sums, loss_terms), strict=True):
            scale, like = moment.scale, moment.sums
            is_tensor = isinstance(scale, Tensor)
            tensors[f"{side}_moment"] = like
            tensors[f"{side}_scale"] = scale.to(like) if is_tensor else like.new_full((), scale)
        return tensors

    def updated(self, tensors: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
        """The stored tensors after update number `count` + 1, of `operands`; a function of these alone."""
        options = self.options
        inputs, outputs = self._factors_of(tensors)
        u, v = (Moment(tensors[f"{side}_moment"], tensors[f"{side}_scale"]) for side in _SIDES)
        if options["warm_start"] and count == 0:
            inputs, outputs = at_starting_scale(inputs, outputs, u, v, options)
        else:
            inputs, outputs = update_factors(inputs, outputs, u, v, options, self._lr_cov(count))
        if options["max_growth"] is not None:
            inputs, outputs = bound_growth(inputs, outputs, options["max_growth"])
        new = {}
        for factor, (side, structure, name) in zip((inputs, outputs), self._names, strict=True):
            new[name] = factor.values
            if factor.momentum is not None:
                new[f"{side}_direction"] = factor.momentum
            if f"{side}_metric" in self._stored and not isinstance(structure, DenseMetric):
                rounded = factor.values.to(self.state[name].dtype).to(factor.values.dtype)
                new[f"{side}_metric"] = structure.metric(rounded)
        return new

    def write(self, new: Mapping[str, Tensor]) -> None:
        """Store what `updated` returns, all of it or, where factors are not finite, nothing."""
        finite = torch.stack([new[name].sum() for _, _, name in self._names]).isfinite().all()
        for name, tensor in new.items():
            _copy(self.state[name], tensor, finite)

    def _lr_cov(self, count: int) -> float:
        """β after `count` updates: a mean over the first ones, where they are to be fast.

        1 would take the whole of `limit_lr_cov`'s bound: the direction of the largest curvature, which a first batch
        has for all its gradients, would be left with 0, or less by rounding, and never be stepped along again.
        """
        options = self.options
        beta = options["lr_cov"] * min(1.0, (count + 1) / max(1, options["lr_cov_warmup"]))
        return max(beta, min(0.5, 1 / (count + 1))) if count < options["warm_steps"] else beta

    def _curvatures(self, sums: Sums, loss_terms: Tensor | float | None) -> tuple[Moment, Moment]:
        """U and V; with relative damping in units of their mean eigenvalues."""
        inputs, outputs = sums.inputs.to(self.dtype), sums.outputs.to(self.dtype)
        if self.options["damping_mode"] == "relative":
            tiny = torch.finfo(self.dtype).tiny
            traces = (trace.to(self.dtype).clamp_min(tiny) for trace in (sums.input_trace, sums.output_trace))
            return tuple(Moment(m, trace.reciprocal()) for m, trace in zip((inputs, outputs), traces, strict=True))
        terms = sums.terms if loss_terms is None else loss_terms
        scale = 1 if self.options["loss_average"] is None else terms
        return Moment(inputs, 1 / sums.rows.to(self.dtype).clamp_min(1)), Moment(outputs, scale)

    def directions(self) -> list[Tensor]:
        """`CCᵀ G KKᵀ` of the layer's gradients in `dtype`, shaped as its parameters."""
        self.wait()
        layer, dtype = self.layer, self.dtype
        bias = None if layer.bias is None else layer.bias.grad
        blocks = [block.to(dtype) for block in layer.matrices(layer.weight.grad, bias)]  # pyright: ignore[reportArgumentType]
        parts = [p.new_empty(p.shape, dtype=dtype) for p in layer.parameters]
        precondition(blocks, *self._factors(), layer.matrices(*parts, *([None] if len(parts) == 1 else [])))
        return parts

    def wait(self) -> None:
        """Let the current stream come after an update on another one; the host goes on."""
        if self.done is not None:
            torch.cuda.current_stream(self.layer.weight.device).wait_event(self.done)
            self.done = None

    def growth(self) -> Tensor:
        """() `τ(KKᵀ)·τ(CCᵀ)`: how much longer a mean step is than SGD's."""
        traces = [f.structure.mean_square(f.values) for f in self._factors()]
        return traces[0] * traces[1]

    def _factors(self) -> list[Factor]:
        dtype = self.dtype
        tensors = {name: self.state[name] for name in self._stored}
        return self._factors_of({name: t if t.dtype is dtype else t.to(dtype) for name, t in tensors.items()})

    def _factors_of(self, tensors: Mapping[str, Tensor]) -> list[Factor]:
        return [
            Factor(structure, tensors[name], tensors.get(f"{side}_direction"), tensors.get(f"{side}_metric"))
            for side, structure, name in self._names
        ]


def _copy(old: Tensor, value: Tensor, where: Tensor) -> None:
    if where.device.type == "cpu":  # where the host may look
        old.copy_(value if where else old)
    else:
        old.copy_(torch.where(where, value.to(old.dtype), old))


def factors_for_statistics(layer: Layer) -> dict[str, Structure]:
    """The keys in `state` of the factors that a layer's rows pass through before they are summed, on every rank."""
    sides = zip(_SIDES, (layer.inputs, layer.outputs), strict=True)
    return {factor_name(side, s): s for side, s in sides if not s.sums_raw}


def finite_layers(directions: Mapping[Layer, Sequence[Tensor]], accept: Tensor) -> dict[Layer, Tensor]:
    """() bool for each layer, on its device: whether the step counts and its direction is finite."""
    by_device: dict[torch.device, list[tuple[Layer, Tensor]]] = {}
    for layer, parts in directions.items():
        total = parts[0].sum() if len(parts) == 1 else parts[0].sum() + parts[1].sum()
        by_device.setdefault(total.device, []).append((layer, total))
    finite: dict[Layer, Tensor] = {}
    for device, sums in by_device.items():
        flags = torch.stack([total for _, total in sums]).isfinite() & accept.to(device)
        finite.update(zip((layer for layer, _ in sums), flags.unbind(), strict=True))
    return finite


def clip_scale(
    directions: Mapping[Layer, Sequence[Tensor]],
    lr: float,
    options: Mapping[str, Any],
    total: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """() factor by which all preconditioned gradients are shortened, or `None` without clipping.

    `max_update_norm`: to that norm. `kl_clip`: by `ν = √(κ/(lr²·Σ⟨u, g⟩))`, so that twice the step's divergence,
    `(lr·ν)² uᵀFu` with `Fu ≈ g`, is at most κ.

    Args:
        directions: of the parameters of the layers that this rank owns.
        total: sums (2,) numbers over the ranks.
    """
    limit, kappa = options["max_update_norm"], options["kl_clip"]
    if limit is None and kappa is None:
        return None
    square, inner = total(_clip_sums(directions))
    scale = torch.ones_like(square)
    if limit is not None:
        scale = (limit / square.sqrt()).clamp_max(1)
    if kappa is not None and lr:
        scale = torch.minimum(scale, (kappa / (lr**2 * inner.clamp_min(0))).sqrt())
    return scale


def _clip_sums(directions: Mapping[Layer, Sequence[Tensor]]) -> Tensor:
    """(2,) float64 `Σ|u|²` and `Σ⟨u, g⟩`."""
    sums = []
    for layer, parts in directions.items():
        for p, u in zip(layer.parameters, parts, strict=True):
            inner = u.new_zeros(()) if p.grad is None else (u * p.grad).sum()
            sums.append(torch.stack([torch.linalg.vector_norm(u, dtype=torch.float64).square(), inner.double()]))
    device = sums[0].device if sums else None
    return sum((part.to(device) for part in sums), torch.zeros(2, dtype=torch.float64, device=device))
