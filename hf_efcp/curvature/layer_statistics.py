"""Second moments of a layer's inputs and output gradients, summed by hooks over the backward passes of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from hf_efcp.curvature.layers import Layer, gradient_rows, input_rows
from hf_efcp.curvature.structures import Structure


@dataclass
class Sums:
    """Raw sums: nothing is divided before the step, when all micro-batches have been seen."""

    inputs: Tensor  # Σ aaᵀ over rows a, as the structure sums it
    outputs: Tensor  # Σ ggᵀ over rows g of the unscaled loss's gradient
    input_trace: Tensor  # () Σ |a|²/d
    output_trace: Tensor  # () Σ |g|²/d
    rows: Tensor  # () number of rows a
    terms: Tensor | int  # number of loss terms, by the layer's own count

    def __add__(self, other: Sums) -> Sums:
        mine, theirs = ([getattr(sums, f.name) for f in fields(Sums)] for sums in (self, other))
        return Sums(*(a + b for a, b in zip(mine, theirs, strict=True)))


def used_tokens(module: nn.Module, x: Tensor, g: Tensor) -> Tensor | None:
    """(b, t) which tokens play a part in the loss: those with a gradient; `None` where all rows count.

    A token without gradient is padding or masked: its input counts nowhere, so that padding a batch further changes
    nothing. Samples without tokens, and positions of images, count always: there a gradient vanishes with its unit.

    Args:
        x: the layer's input.
        g: (b, t, d_o) rows of its output's gradient.
    """
    has_tokens = isinstance(module, nn.Conv1d) or (x.ndim > 2 and not isinstance(module, (nn.Conv2d, nn.Conv3d)))
    if not has_tokens or (g.device.type == "cpu" and g.shape[2] and g[..., 0].all()):
        return None
    return g.ne(0).any(-1)


def kfac_rows(a: Tensor, used: Tensor | None, *, approx: str, has_bias: bool) -> tuple[Tensor, Tensor]:
    """(n, d_i) input rows of one batch, and their number.

    `expand` takes each token as a row; `reduce` the mean of a sample's inputs and the sum of its gradients (K-FAC for
    weight-sharing layers, arXiv 2311.00636).

    Args:
        a: (b, t, groups, d); groups are further rows, weighed so that all groups of a token together count once.
        used: see `used_tokens`.
    """
    groups, counted = a.shape[2], counted_rows(used, approx)
    if approx == "expand":
        a = a.flatten(0, 1)
    elif used is None:
        a = a.mean(1)
    else:
        a = torch.einsum("bt,btgd->bgd", (used / used.sum(1, keepdim=True).clamp_min(1)).to(a.dtype), a)
    if counted is None or _may_pick(a):
        a = a if counted is None else a[counted]
        n_rows, present = a.new_full((), len(a)), a.new_ones(()).expand(len(a))
    else:
        n_rows, present = counted.sum(), counted.to(a.dtype)
        a = torch.where(counted[:, None, None], a, 0)
    if has_bias:
        a = torch.cat([a, present[:, None, None].expand(-1, groups, 1)], -1)
    return (a.flatten(0, 1) / groups**0.5 if groups > 1 else a[:, 0]), n_rows


def kfac_gradients(g: Tensor, used: Tensor | None, approx: str) -> Tensor:
    """(n, d_o) gradient rows of one batch, from (b, t, d_o)."""
    counted = counted_rows(used, approx)
    g = g.sum(1) if approx == "reduce" else g.flatten(0, 1)
    return g[counted] if counted is not None and _may_pick(g) else g


def counted_rows(used: Tensor | None, approx: str) -> Tensor | None:
    """(n,) which rows count, of tokens or of samples."""
    return None if used is None else used.any(1) if approx == "reduce" else used.flatten()


def _may_pick(rows: Tensor) -> bool:
    """Elsewhere the host would wait for the number of rows, and rows of zeros do as well."""
    return rows.device.type == "cpu"


class _Keep(torch.autograd.Function):
    """Saves a tensor for backward and nothing else.

    What a hook's closure holds would stay alive under activation checkpointing, whose point is to drop it. What a
    graph's node saves is dropped and recomputed like all other activations, and only the graph that is run counts.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Hook:
    """A forward hook that copies and pickles as one that does nothing: a saved model carries no optimizer."""

    def __init__(self, collector: Collector, layer: Layer):
        self.collector, self.layer = collector, layer
        self._watch = torch.compiler.disable(self._watch_eagerly)  # a compiled model breaks its graph here

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        self._watch(module, args, kwargs, output)

    def _watch_eagerly(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not (module.training and torch.is_grad_enabled() and self.collector.is_due(self.layer)):
            return
        if torch._C._are_functorch_transforms_active():  # gradients of single samples are no training step
            return
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not (tensors and isinstance(output, Tensor) and output.requires_grad and self.layer.weight.requires_grad):
            return
        self.collector.check(output.device.type)
        self.collector.forget_what_was_zeroed(self.layer)
        anchor = torch.zeros((), requires_grad=True, device=output.device)
        keep = _Keep.apply(anchor, tensors[0].detach()).grad_fn

        def record(gradient: Tensor) -> None:
            (x,) = keep.saved_tensors
            self.collector.record(self.layer, module, x, gradient)

        output.register_hook(record)

    def __reduce__(self) -> tuple[Any, ...]:
        # `nullcontext().__exit__` takes any arguments and returns None; it loads where this package is missing.
        return getattr, (contextlib.nullcontext(), "__exit__")


class Collector:
    """Hooks on layers, and what they have summed since the last `clear`.

    Args:
        layers: whose statistics are wanted.
        approx: `"expand"` or `"reduce"`.
        count: `"batch"` or `"batch+sequence"`: what the loss is a mean of.
        is_due: whether the running step wants a layer's statistics.
        check: raises where a forward pass on a type of device cannot lead to correct ones.
        factors: the layer's stored factors (inputs, outputs), or `None` while they are I.
        scale: what the loss is multiplied by (fp16).
        restart: called where gradients were zeroed without a step, as after one that a GradScaler left out.
    """

    def __init__(
        self,
        layers: list[Layer],
        *,
        approx: str,
        count: str,
        is_due: Callable[[Layer], bool],
        check: Callable[[str], None],
        factors: Callable[[Layer], tuple[Tensor, Tensor] | None],
        scale: Callable[[], float],
        restart: Callable[[], None],
    ):
        self.is_due, self.check, self._restart = is_due, check, restart
        self._approx, self._count, self._factors, self._scale = approx, count, factors, scale
        self._sums: dict[Layer, Sums] = {}
        self._last: tuple[Any, ...] = ()
        self._handles = [
            module.register_forward_hook(_Hook(self, layer), with_kwargs=True)
            for layer in layers
            for module in layer.modules
        ]

    def sums(self, layer: Layer) -> Sums | None:
        """What was summed, or `None` if the layer has not run."""
        return self._sums.get(layer)

    def forget_what_was_zeroed(self, layer: Layer) -> None:
        """Restart where the layer has sums of a gradient that is gone.

        A forward pass inside a backward pass recomputes activations, while its gradients are still on their way.
        """
        is_recomputing = torch._C._current_graph_task_id() != -1
        if layer in self._sums and layer.weight.grad is None and not is_recomputing:
            self._restart()

    def clear(self) -> None:
        """Forget all sums."""
        self._sums, self._last = {}, ()

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()

    @torch.no_grad()
    def record(self, layer: Layer, module: nn.Module, x: Tensor, gradient: Tensor) -> None:
        """Add one backward pass of one module."""
        with torch.autocast(x.device.type, enabled=False):
            factors = self._factors(layer)
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            if factors is None:
                factors = tuple(s.identity(dtype, x.device) for s in (layer.inputs, layer.outputs))
            dtype = torch.promote_types(dtype, factors[0].dtype)
            g = gradient_rows(module, gradient).to(dtype)
            g = g if self._scale() == 1 else g / self._scale()
            used = used_tokens(module, x, g)
            moment, trace, rows = self._input_moment(layer, module, x, used, factors[0].to(dtype))
            samples, tokens = g.shape[0], g.shape[:2].numel() if used is None else used.sum()
            g = kfac_gradients(g, used, self._approx)
            output_moment = layer.outputs.moment(factors[1].to(dtype), g)
            terms = tokens if self._count == "batch+sequence" else samples
            new = Sums(moment, output_moment, trace, _trace(layer.outputs, output_moment, g), rows, terms)
            self._sums[layer] = self._sums[layer] + new if layer in self._sums else new

    def _input_moment(
        self, layer: Layer, module: nn.Module, x: Tensor, used: Tensor | None, factor: Tensor
    ) -> tuple[Tensor, ...]:
        """Σ aaᵀ, shared by the layers that read the same tensor one after the other: query, key and value."""
        key = (x.data_ptr(), x._version, x.shape, x.stride(), x.dtype, layer.bias is None, factor.dtype)
        key = (*key, type(module), type(layer.inputs), layer.inputs.numel)
        if self._last and self._last[0] == key and _are_equal(self._last[2], used):
            return self._last[3:]
        a = input_rows(module, x).to(factor.dtype)
        a, rows = kfac_rows(a, used, approx=self._approx, has_bias=layer.bias is not None)
        moment = layer.inputs.moment(factor, a)
        trace = _trace(layer.inputs, moment, a)
        may_share = layer.inputs.sums_raw and isinstance(module, nn.Linear) and x.device.type == "cpu"
        # `x` itself is kept until the next layer, or another tensor could come to lie at its address.
        self._last = (key, x, used, moment, trace, rows) if may_share else ()
        return moment, trace, rows


def _are_equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def _trace(structure: Structure, moment: Tensor, rows: Tensor) -> Tensor:
    """() Σ |a|²/d over rows a, from their moment where that is Σ aaᵀ itself."""
    return structure.moment_trace(moment) if structure.sums_raw else rows.square().sum() / structure.dim
