"""The step that M-FAC and GGT share: push, dots, solve, combine, scale, apply."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hf_efcp.curvature.layout import fitting_block_size
from hf_efcp.curvature.solvers import cancels, length_ratio
from hf_efcp.ops import take_row
from hf_efcp.optim.acceptance import acceptable, finite
from hf_efcp.optim.apply import apply_
from hf_efcp.optim.base import EfcpOptimizer, fill_, flat_parameters
from hf_efcp.optim.budget import fit_budget
from hf_efcp.optim.combination import Combination, Pushed
from hf_efcp.optim.diagnostics import Recorded, basic_figures, shape_figures
from hf_efcp.optim.fused_step import FusedStep
from hf_efcp.optim.options import check_options
from hf_efcp.optim.scaling import average_, scale_
from hf_efcp.optim.segment import Segments
from hf_efcp.optim.window_options import check_combinations
from hf_efcp.optim.window_state import filled_states, find_window_sharing, whole_states
from hf_efcp.parallel import check_replicas


class WindowOptimizer(EfcpOptimizer):
    """An optimizer over a ring of compressed gradients `G`; subclasses say which m×m function it is.

    State of each parameter: views of the flat buffers of its device (`residual`, `indices`, `values`, `momentum`, …),
    of blocks that this rank owns. Of the first besides, and on its device: `gram` (m, m) float64, or one for each
    parameter with `system="layer"`, `step` and `skipped`, what the whole model shares.
    """

    record_metrics = False  # whether a step keeps the norms of its gradient and update for `metrics()`

    _segments: Segments | None = None
    _recorded: Recorded | None = None
    _fused: FusedStep | None = None

    def __init__(self, params: Iterable[Any], options: dict[str, Any]):
        options = check_options(self.options, options)
        if options["memory_budget"] is not None:
            params = list(params)
            options = fit_budget(type(self), flat_parameters(params), options)
        check_combinations(options)
        super().__init__(params, options)
        if options["block_size"] is None:  # and stays what it is now if parameters are added
            size = fitting_block_size([p.numel() for p in self._parameters()])
            for known in (self.defaults, *self.param_groups):
                known["block_size"] = size

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
        if self.defaults["precondition"] == "momentum":
            return ["exp_avg"] if self._momentum else []
        return ["momentum"] if self._momentum else []

    @property
    def _momentum(self) -> float:
        """The first group's: `OneCycleLR` and `CyclicLR` write it there."""
        return self.param_groups[0]["momentum"]

    def _segment_key(self, parameter: Tensor) -> Any:
        return parameter.device

    def _state_device(self, parameter: Tensor) -> torch.device:
        return torch.device(self.defaults["state_device"] or parameter.device)

    def _adopt_state(self) -> None:
        """Make buffers for today's parameters, fill them from `self.state`, and put their views there."""
        params = self._parameters()
        saved = self._join_state(keeps=True) if self._is_divided else self.state
        sharing = find_window_sharing(params, self.defaults)
        segments = Segments(params, self.defaults, self._moments(), self._segment_key, sharing)
        states = filled_states(segments, params, saved)
        shared = self._shared_state(self._state_device(params[0]))
        for segment in segments:
            shared.update(segment.window.shared_buffers())
        fill_(shared, saved.get(params[0], {}))
        states[params[0]].update(shared)
        self.state.update((parameter, states[parameter]) for parameter in params)
        self._segments = segments

    @property
    def _is_divided(self) -> bool:
        return self._segments is not None and self._segments.sharing.kind == "replicated"

    def own_entries(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """What a tensor of a parameter's shape has for the entries of its moments in `state[parameter]`."""
        for segment in self._segments or ():
            for piece in segment.owned.pieces:
                if segment.params[piece.number] is parameter and not piece.whole:
                    return tensor.reshape(-1)[piece.start : piece.stop]
        return tensor

    def _join_state(self, keeps: bool) -> dict[Tensor, dict[str, Tensor]] | None:
        first = self._parameters()[0]
        whole = whole_states(self._segments, self._state_device(first), keeps)
        if whole is not None:
            shared = self._shared_state(torch.device("meta"))
            whole[first].update({name: self.state[first][name].to("cpu", copy=True) for name in shared})
        return whole

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

    def materialize_state(self) -> None:
        """See `EfcpOptimizer.materialize_state`."""
        self._current_segments()

    def _current_segments(self) -> Segments:
        if self._segments is None or not self._segments.fits(self._parameters()):
            self._adopt_state()
            if self._is_divided and not self._parameters()[0].is_meta:
                check_replicas(self._parameters(), self._segments.group)
        return self._segments

    def _take_step(self) -> None:
        segments = self._current_segments()
        shared = self.state[self._parameters()[0]]
        if self._fused is None or self._fused.segments is not segments:
            self._fused = FusedStep(self, segments)
        tables = self._fused.gradients(shared["skipped"])
        gradients = [s.flat_gradient() for s in segments] if tables is None or self.record_metrics else []
        ours = gradients or [g for s in segments for g in s.owned.gradients() if g is not None]
        # What another rank owns may be broken here alone; then no rank steps.
        seen = [p.grad for p in self._parameters() if p.grad is not None] if self._is_divided else ours
        moves = any(group["lr"] for group in self.param_groups)
        accept = acceptable(seen, ours, shared, segments.group, moves)
        if self.record_metrics:
            self._recorded = Recorded(gradients, accept.device, segments.group)
        if self._rejects(accept):
            return
        row = shared["step"] % self.defaults["window"]
        if tables is None:
            pushed = self._push(segments, self._zero_unless_(accept, gradients), row, shared["step"], accept)
        else:
            pushed = self._fused.start(row, shared["step"] + 1, tables)
        sums = self._precondition(segments, shared, pushed, row, accept)
        shared["step"] += accept
        if self._fused.is_possible():
            self._fused.finish_(sums, shared, accept)
            return
        updates = [combination.sum_() for combination in sums]
        if self.record_metrics:
            self._recorded.precondition(updates)
        accept = finite(updates, accept, shared, segments.group)
        if not self._rejects(accept):
            self._zero_unless_(accept, updates)
            scale_(updates, segments, self.defaults, self._momentum, shared["step"], accept)
            if self.record_metrics:
                self._recorded.update(updates, segments)
            apply_(self.param_groups, updates, segments, accept, shared["step"])

    def _rejects(self, accept: Tensor) -> bool:
        return self._reads(accept) and not accept

    def _zero_unless_(self, accept: Tensor, vectors: list[Tensor]) -> list[Tensor]:
        if not self._reads(accept):
            for vector in vectors:  # a NaN that is multiplied away stays NaN; it must be replaced
                torch.where(accept.to(vector.device), vector, vector.new_zeros(()), out=vector)
        return vectors

    def _push(self, segments: Segments, gradients: list[Tensor], row: Tensor, taken: Tensor, accept: Tensor) -> Pushed:
        """Write the newest rows, and multiply with what is preconditioned. `taken` counts earlier steps."""
        scratch = [torch.empty_like(x) for x in gradients] if self._keeps_gradient else gradients
        newest = [
            segment.window.push(gradient, row.to(segment.device), accept.to(segment.device), out)
            for segment, gradient, out in zip(segments, gradients, scratch, strict=True)
        ]
        targets = self._targets(segments, gradients, scratch, taken, accept)
        nowhere: list[Any] = [None] * len(segments)
        if targets is None:
            return Pushed(newest, None, scratch, nowhere)
        products = [segment.products(x) for segment, x in zip(segments, targets, strict=True)]
        return Pushed(newest, products, self._own(targets, gradients, scratch), nowhere)

    def _precondition(
        self, segments: Segments, shared: dict[str, Tensor], pushed: Pushed, row: Tensor, accept: Tensor
    ) -> list[Combination]:
        device = accept.device
        gram = shared["gram"].view(-1, *shared["gram"].shape[-2:])
        before = take_row(gram, 1, row)
        newest = torch.where(accept, segments.gather(pushed.newest, device), before)
        change = newest - before
        gram.index_copy_(1, row[None], newest[:, None, :])
        gram.index_copy_(2, row[None], newest[:, :, None])
        self._follow_gram(shared, row, change)
        dots = squares = length = None
        if pushed.products is not None:
            dots = segments.gather(pushed.products, device)
            dots, squares = dots[:, :-1], dots[:, -1]
            length = squares.sum().sqrt()
        coefficients, weight = self._solve(shared, gram, row, dots)
        if self._keeps_length:
            weight = length_ratio(gram, coefficients, dots, squares)
            coefficients = coefficients * weight[:, None]
        # Beyond 50, a sum in float32 would lose 1e-5 of the update; elsewhere than on the CPU the host cannot look.
        if not (self._reads(accept) and cancels(gram, coefficients, row, 50)):
            coefficients = coefficients.float()
        own: list[Any] = [None] * len(segments)
        if dots is not None:  # other scalings see x itself
            scales = self.defaults["scaling"] == "none" or self._keeps_length
            own = segments.scatter(weight) if scales else [1.0] * len(segments)
        parts = zip(segments, segments.scatter(coefficients), own, pushed.outs, pushed.sources, strict=True)
        return [Combination(*part, length=length) for part in parts]

    def _own(self, targets: list[Tensor], gradients: list[Tensor], scratch: list[Tensor]) -> list[Tensor]:
        """The targets, to be written over: the step's copy of the gradient itself, but a copy of what is state."""
        return targets if targets is gradients else [x.copy_(y) for x, y in zip(scratch, targets, strict=True)]

    @property
    def _keeps_gradient(self) -> bool:
        """Whether it is preconditioned, or its mean is; without compression the gradient is the newest row."""
        return self.defaults["precondition"] != "compressed" and self.defaults["compression"] != "none"

    @property
    def _keeps_length(self) -> bool:
        """Whether the update is as long as the mean: where all gradients agree, Adam's step is left as it is."""
        return self.defaults["precondition"] == "momentum" and self.defaults["scaling"] == "adam"

    def _targets(
        self, segments: Segments, gradients: list[Tensor], scratch: list[Tensor], taken: Tensor, accept: Tensor
    ) -> list[Tensor] | None:
        """What is preconditioned, a flat vector a segment; `None` for the newest row. `taken` counts earlier steps."""
        if self.defaults["precondition"] == "momentum":
            if "exp_avg" in self._moments():
                rates = {"beta1": self._momentum, "beta2": self.defaults["adam_beta2"]}
                average_(gradients, segments, taken + 1, accept, **rates)
            return gradients
        return gradients if self._keeps_gradient else None

    def _condition(self, eigenvalues: Tensor) -> Tensor:
        """Condition numbers of the systems that `_solve` solves, from the (…, m) eigenvalues of `GGᵀ`, ascending."""
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        """`EfcpOptimizer.metrics`, the systems' condition, and norms at the last step with `record_metrics` true."""
        return {**super().metrics(), **self._figures(basic_figures)}

    def diagnostics(self) -> dict[str, float]:
        """How the curvature shapes the steps, see `hf_efcp.optim.diagnostics`. Waits for the device."""
        return self._figures(shape_figures)

    def _figures(self, figures_of: Callable[..., dict[str, Tensor]]) -> dict[str, float]:
        if self._segments is None:
            return {}
        gram = self.state[self._parameters()[0]]["gram"]
        figures = figures_of(gram, self._condition, self._segments, self._recorded)
        return {name: float(value) for name, value in figures.items()}
