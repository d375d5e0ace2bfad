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


def kfac_rows(a: Tensor, g: Tensor, *, approx: str, has_bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of both factors for one batch: (n, d_i), (n', d_o), their number, and the tokens with a gradient.

    `expand` takes each token as a row; `reduce` the mean of a sample's inputs and the sum of its gradients (K-FAC for
    weight-sharing layers, arXiv 2311.00636). A token without gradient is padding or plays no part in the loss: its
    input counts nowhere, so that padding a batch further changes nothing.

    Args:
        a: (b, t, groups, d); groups are further rows, weighed so that all groups of a token together count once.
        g: (b, t, d_o).
    """
    used = g.ne(0).any(-1)
    groups = a.shape[2]
    if approx == "reduce":
        share = (used / used.sum(1, keepdim=True).clamp_min(1)).to(a.dtype)
        a, g = torch.einsum("bt,btgd->bgd", share, a), g.sum(1)
        present = used.any(1)[:, None].expand(-1, groups)
    else:
        present = used[:, :, None].expand(-1, -1, groups)
    ones = present.to(a.dtype).unsqueeze(-1)
    # Multiplying leaves the shape alone; picking rows would make the host wait for their number.
    a = torch.where(ones.bool(), a, 0) if approx == "expand" else a
    a = torch.cat([a, ones], -1) if has_bias else a
    n_rows = present.sum() / groups
    return a.flatten(0, -2) / groups**0.5, g.flatten(0, -2), n_rows, used.sum()


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
            g = gradient_rows(module, gradient).to(dtype) / self._scale()
            inputs, outputs = (factor.to(dtype) for factor in factors)
            moment, trace, g, rows, tokens = self._input_moment(layer, module, x, g, inputs)
            terms = tokens if self._count == "batch+sequence" else len(gradient_rows(module, gradient))
            output_moment = layer.outputs.moment(outputs, g)
            new = Sums(moment, output_moment, trace, _trace(layer.outputs, output_moment, g), rows, terms)
            self._sums[layer] = self._sums[layer] + new if layer in self._sums else new

    def _input_moment(
        self, layer: Layer, module: nn.Module, x: Tensor, g: Tensor, factor: Tensor
    ) -> tuple[Tensor, ...]:
        """Σ aaᵀ, shared by the layers that read the same tensor one after the other: query, key and value."""
        used = g.ne(0).any(-1)
        key = (x.data_ptr(), x._version, x.shape, x.stride(), x.dtype, layer.bias is None, g.shape[:2], g.dtype)
        key = (*key, type(module), type(layer.inputs), layer.inputs.numel)
        if self._last and self._last[0] == key and torch.equal(self._last[2], used):
            g = g.sum(1) if self._approx == "reduce" else g.flatten(0, 1)
            return *self._last[3:5], g, *self._last[5:]
        a = input_rows(module, x).to(g.dtype)
        a, g, rows, tokens = kfac_rows(a, g, approx=self._approx, has_bias=layer.bias is not None)
        moment = layer.inputs.moment(factor, a)
        may_share = layer.inputs.sums_raw and isinstance(module, nn.Linear) and x.device.type == "cpu"
        # `x` itself is kept until the next layer, or another tensor could come to lie at its address.
        trace = _trace(layer.inputs, moment, a)
        self._last = (key, x, used, moment, trace, rows, tokens) if may_share else ()
        return moment, trace, g, rows, tokens


def _trace(structure: Structure, moment: Tensor, rows: Tensor) -> Tensor:
    """() Σ |a|²/d over rows a, from their moment where that is Σ aaᵀ itself."""
    return structure.mean_trace(moment) if structure.sums_raw else rows.square().sum() / structure.dim
