"""The step that M-FAC and GGT share: push, dots, solve, combine, scale, apply."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hf_efcp.optim.base import EfcpOptimizer
from hf_efcp.optim.scaling import adam_, layer_rms_, rms_
from hf_efcp.optim.segment import Segment


class WindowOptimizer(EfcpOptimizer):
    """An optimizer over a ring of compressed gradients `G`; subclasses say which m×m function it is.

    State of each parameter: its views of the flat buffers of its device (`residual`, `indices`, `values`,
    `momentum`, …). State of the first parameter besides: `gram` (m, m) float64, or one for each parameter with
    `system="layer"`, `step` and `skipped`, what the whole model shares. The first parameter's device holds these.
    """

    record_metrics = False  # whether a step keeps the norms of its gradient and update for `metrics()`

    _segments: list[Segment] | None = None
    _norms: dict[str, Tensor] | None = None

    def _solve(
        self, shared: dict[str, Tensor], gram: Tensor, row: Tensor, dots: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Weights of the rows and of `x` itself in the preconditioned gradient.

        Args:
            shared: the first parameter's state.
            gram: `GGᵀ` of each system, (S, m, m) float64, up to date.
            row: () int64, the newest row.
            dots: `G x` (S, m) float64, or `None` where `x` is the newest row.

        Returns:
            (S, m) float64 coefficients `c` and (S,) float64 `s` (or `None` for 0) with update `Gᵀc + s·x`.
        """
        raise NotImplementedError

    def _follow_gram(self, shared: dict[str, Tensor], row: Tensor, change: Tensor) -> None:
        """Bring what a subclass derives from the Gram matrix up to date; its row `row` changed by (S, m)."""

    def _shared_state(self, device: torch.device) -> dict[str, Tensor]:
        """New tensors of what the whole model shares."""
        window = self.defaults["window"]
        systems = (len(self._parameters()),) if self.defaults["system"] == "layer" else ()
        return {
            "gram": torch.zeros(*systems, window, window, dtype=torch.float64, device=device),
            "step": torch.zeros((), dtype=torch.int64, device=device),
            "skipped": torch.zeros((), dtype=torch.int64, device=device),
        }

    def _moments(self) -> list[str]:
        if self.defaults["scaling"] == "adam":
            return ["exp_avg", "exp_avg_sq"]
        return ["momentum"] if self._momentum else []

    @property
    def _momentum(self) -> float:
        """The first group's: `OneCycleLR` and `CyclicLR` write it there."""
        return self.param_groups[0]["momentum"]

    # ------------------------------------------------------------------ state

    def _segment_key(self, parameter: Tensor) -> Any:
        return parameter.device

    def _adopt_state(self) -> None:
        """Make buffers for today's parameters, fill them from `self.state`, and put their views there."""
        params = self._parameters()
        by_key: dict[Any, list[Tensor]] = {}
        for parameter in params:
            by_key.setdefault(self._segment_key(parameter), []).append(parameter)
        if self.defaults["compression"] == "topk" and self.defaults["selection"] == "global" and len(by_key) > 1:
            raise NotImplementedError(
                f"selection='global' ranks all entries of a model on one device; this one is spread over "
                f"{sorted(map(str, by_key))}. Use selection='block'."
            )
        segments = [Segment(part, self.defaults, self._moments()) for part in by_key.values()]
        states = {p: views for segment in segments for p, views in zip(segment.params, segment.views(), strict=True)}
        first = states[params[0]]
        first.update(self._shared_state(params[0].device))
        for segment in segments:
            first.update(segment.window.shared_buffers())
        for parameter, views in states.items():
            self._fill(views, self.state.get(parameter, {}))
            self.state[parameter] = views
        self._segments = segments

    def _fill(self, views: dict[str, Tensor], saved: dict[str, Any]) -> None:
        for name, view in views.items():
            if name not in saved:
                continue
            if saved[name].shape != view.shape:
                raise ValueError(
                    f"The saved `{name}` has shape {tuple(saved[name].shape)}; this model and these options need "
                    f"{tuple(view.shape)}."
                )
            view.copy_(saved[name])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `EfcpOptimizer.add_param_group`."""
        options = self.defaults
        ranks_all = options["compression"] == "topk" and options["selection"] == "global"
        if self.state and (ranks_all or options["system"] == "layer"):
            raise NotImplementedError(
                "Parameters cannot be added after the first step with selection='global' or system='layer', whose "
                "state has the whole model's shape. Add them before, or use selection='block' and system='model'."
            )
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `EfcpOptimizer.load_state_dict`."""
        self._segments = None
        super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._segments = None

    def _current_segments(self) -> list[Segment]:
        params = self._parameters()
        held = list(chain.from_iterable(segment.params for segment in self._segments or []))
        # Another parameter, device or placement since the last step: accelerate swaps and moves parameters.
        if self._segments is None or len(held) != len(params) or not self._all_fit(params):
            self._adopt_state()
        return self._segments

    def _all_fit(self, params: list[Tensor]) -> bool:
        by_key: dict[Any, list[Tensor]] = {}
        for parameter in params:
            by_key.setdefault(self._segment_key(parameter), []).append(parameter)
        return len(by_key) == len(self._segments) and all(
            segment.fits(part) for segment, part in zip(self._segments, by_key.values(), strict=True)
        )

    # ------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure` returns. A step whose gradients are not finite is left out."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._has_gradients():
            return loss
        segments = self._current_segments()
        shared = self.state[self._parameters()[0]]
        gradients = [segment.flat_gradient() for segment in segments]
        accept = self._acceptable(gradients, shared)
        if self.record_metrics:
            self._norms = {"gradient_norm": _norm(gradients, accept.device)}
        if self._rejects(accept):
            return loss
        updates = self._precondition(segments, shared, self._zero_unless_(accept, gradients), accept)
        shared["step"] += accept
        accept = self._finite(updates, accept, shared)
        if not self._rejects(accept):
            updates = self._scaled(updates, segments, shared, accept)
            self._apply(updates, segments, accept)
        if self.record_metrics:
            self._norms["update_norm"] = _norm(updates, accept.device)
        return loss

    def _reads_flags(self, device: torch.device) -> bool:
        """Whether the host may branch on a flag of the device: elsewhere it would wait, and masks do the work."""
        return device.type == "cpu"

    def _rejects(self, accept: Tensor) -> bool:
        return self._reads_flags(accept.device) and not accept

    def _zero_unless_(self, accept: Tensor, vectors: list[Tensor]) -> list[Tensor]:
        if not self._reads_flags(accept.device):
            for vector in vectors:  # a NaN that is multiplied away stays NaN; it must be replaced
                torch.where(accept.to(vector.device), vector, vector.new_zeros(()), out=vector)
        return vectors

    def _has_gradients(self) -> bool:
        found = False
        for parameter in self._parameters():
            if parameter.grad is None:
                continue
            found = True
            if parameter.grad.is_sparse:
                raise NotImplementedError(
                    f"{type(self).__name__} needs dense gradients; build the embedding with sparse=False."
                )
        return found

    def _acceptable(self, gradients: list[Tensor], shared: dict[str, Tensor]) -> Tensor:
        """() bool: the gradients are finite, and are not the zeros by which checkpointing materialises state."""
        device = shared["step"].device
        finite = torch.stack([gradient.sum().isfinite().to(device) for gradient in gradients]).all()
        shared["skipped"] += ~finite
        if any(group["lr"] for group in self.param_groups):
            return finite
        return finite & torch.stack([gradient.any().to(device) for gradient in gradients]).any()

    def _precondition(
        self, segments: list[Segment], shared: dict[str, Tensor], gradients: list[Tensor], accept: Tensor
    ) -> list[Tensor]:
        device = accept.device
        row = shared["step"] % self.defaults["window"]
        scratch = [torch.empty_like(x) for x in gradients] if self._keeps_gradient else gradients
        parts = [
            segment.window.push(gradient, row.to(segment.device), accept.to(segment.device), out).to(device)
            for segment, gradient, out in zip(segments, gradients, scratch, strict=True)
        ]
        gram = shared["gram"].view(-1, *shared["gram"].shape[-2:])
        products = torch.where(accept, self._gather_systems(parts), gram[:, row])
        change = products - gram[:, row]
        gram.index_copy_(1, row[None], products[:, None, :])
        gram.index_copy_(2, row[None], products[:, :, None])
        self._follow_gram(shared, row, change)
        targets = self._targets(segments, gradients, scratch, row, accept)
        dots = None
        if targets is not None:
            parts = [s.window.dots(x).to(device) for s, x in zip(segments, targets, strict=True)]
            dots = self._gather_systems(parts)
        coefficients, weight = self._solve(shared, gram, row, dots)
        for i, (segment, update) in enumerate(zip(segments, scratch, strict=True)):
            segment.window.combine(self._systems_of(segment, coefficients).to(segment.device), update)
            if targets is not None:
                self._add_(update, targets[i], self._systems_of(segment, weight), segment)
        return scratch

    @property
    def _keeps_gradient(self) -> bool:
        """Whether the dense gradient is preconditioned; without compression it is the newest row."""
        return self.defaults["precondition"] == "gradient" and self.defaults["compression"] != "none"

    def _targets(
        self, segments: list[Segment], gradients: list[Tensor], scratch: list[Tensor], row: Tensor, accept: Tensor
    ) -> list[Tensor] | None:
        """What is preconditioned, a flat vector a segment; `None` for the newest row."""
        return gradients if self._keeps_gradient else None

    def _gather_systems(self, parts: list[Tensor]) -> Tensor:
        """(S, m) products of the model from those of its segments."""
        return torch.cat(parts) if self.defaults["system"] == "layer" else sum(parts)

    def _systems_of(self, segment: Segment, values: Tensor) -> Tensor:
        """The rows of `values` (S, …) that belong to a segment."""
        if self.defaults["system"] == "model":
            return values
        before = self._segments[: self._segments.index(segment)]
        start = sum(len(other.params) for other in before)
        return values[start : start + len(segment.params)]

    def _add_(self, update: Tensor, gradient: Tensor, weights: Tensor, segment: Segment) -> None:
        """`update += weight·gradient`, with one weight or one for each parameter."""
        weights = weights.to(segment.device, update.dtype)
        if len(weights) == 1:
            update.addcmul_(gradient, weights)
            return
        for part, x, weight in zip(segment.layout.split(update), segment.layout.split(gradient), weights, strict=True):
            part.addcmul_(x, weight)

    def _finite(self, updates: list[Tensor], accept: Tensor, shared: dict[str, Tensor]) -> Tensor:
        """`accept`, less the case of an update that overflowed."""
        finite = torch.stack([update.sum().isfinite().to(accept.device) for update in updates]).all()
        shared["skipped"] += accept & ~finite
        return accept & finite

    def _scaled(
        self, updates: list[Tensor], segments: list[Segment], shared: dict[str, Tensor], accept: Tensor
    ) -> list[Tensor]:
        """Momentum and scaling: the updates as they are applied. Zero where the step is not accepted."""
        options = self.defaults
        self._zero_unless_(accept, updates)
        if options["scaling"] == "adam":
            adam_(updates, segments, shared["step"], accept, beta1=self._momentum, beta2=options["adam_beta2"])
        elif "momentum" in segments[0].moments:
            for i, segment in enumerate(segments):
                keep = accept.to(segment.device)
                buffer = segment.moments["momentum"]
                buffer.mul_(torch.where(keep, self._momentum, 1.0).to(buffer.dtype)).add_(updates[i])
                torch.where(keep, buffer, buffer.new_zeros(()), out=updates[i])
        if options["scaling"] == "rms":
            rms_(updates, segments, options["update_rms"])
        elif options["scaling"] == "layer_rms":
            layer_rms_(updates, segments, options["update_rms"])
        return updates

    def _apply(self, updates: list[Tensor], segments: list[Segment], accept: Tensor) -> None:
        """`p ← p(1 − lr·weight_decay) − lr·update`, nothing where the step is not accepted.

        A parameter without a gradient stays as it is: it may be frozen, and decay or momentum must not move it.
        """
        update_of = {}
        for segment, update in zip(segments, updates, strict=True):
            update_of.update(zip(segment.params, segment.layout.split(update), strict=True))
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            lr, decay = group["lr"], group["weight_decay"]
            if lr and decay:
                factor = 1 - lr * decay * accept.double()
                for parameter in params:
                    parameter.mul_(factor.to(parameter.device))
            torch._foreach_add_(params, [update_of[p] for p in params], alpha=-lr)

    # ---------------------------------------------------------------- metrics

    def _condition(self, eigenvalues: Tensor) -> Tensor:
        """Condition numbers of the systems that `_solve` solves, from the (…, m) eigenvalues of `GGᵀ`, ascending."""
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        """`EfcpOptimizer.metrics`, with norms of residual, gradient and update, and the system's condition.

        Norms of gradient and update are those of the last step taken with `record_metrics` true.
        """
        figures = super().metrics()
        if not self._segments:
            return figures
        shared = self.state[self._parameters()[0]]
        residuals = [part.float() for segment in self._segments for part in segment.window.residuals()]
        tensors = dict(self._norms or {})
        if residuals:
            tensors["residual_norm"] = _norm(residuals, shared["gram"].device)
        tensors["system_condition"] = self._condition(torch.linalg.eigvalsh(shared["gram"]).clamp_min(0)).max()
        return {**figures, **{name: float(value) for name, value in tensors.items()}}


def _norm(vectors: list[Tensor], device: torch.device) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(v, dtype=torch.float64).to(device) for v in vectors]).norm()
