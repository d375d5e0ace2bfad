"""A window optimizer's step in one pass a device to its rows and one from them, where its backend has kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_efcp import ops
from hf_efcp.curvature.window import BlockTopKWindow
from hf_efcp.optim.combination import Combination, Pushed
from hf_efcp.optim.scaling import model_factor, parameter_factors
from hf_efcp.optim.segment import Segment, Segments

if TYPE_CHECKING:
    from hf_efcp.optim.window import WindowOptimizer

_LARGEST = torch.finfo(torch.float32).max


class FusedStep:
    """Sum, momentum or moments, length and weights of a step, as `scaling` and `apply` have them; and what is before.

    With `scaling` `"rms"` and `"layer_rms"` there are two launches, as a length is known when all has been summed.
    An update counts as finite if `Σ|cᵢ|·|gᵢ| + |s|·max|x|`, which bounds its entries, is a float32: the pass that
    sums the update moves the weights too, and cannot ask the update itself.

    Args:
        optimizer: whose options and groups these are.
        segments: of its parameters.
    """

    def __init__(self, optimizer: WindowOptimizer, segments: Segments):
        self._optimizer, self.segments = optimizer, segments
        self._parts = [_Part(segment) for segment in segments]

    def is_possible(self) -> bool:
        """Whether a kernel serves all segments as they are now; elsewhere the caller must do without."""
        if self.segments.sharing.kind == "sharded" or not all(part.has_kernel() for part in self._parts):
            return False  # what a rank updates of sharded weights is not what it owns
        group_of = {p: n for n, group in enumerate(self._optimizer.param_groups) for p in group["params"]}
        if self._optimizer.defaults["cautious"] and not all(part.has_gradients() for part in self._parts):
            return False
        return all(part.has_table(group_of) for part in self._parts)

    def gradients(self, flag: Tensor) -> list[tuple[Tensor, Tensor]] | None:
        """For each segment the pieces of its blocks and a table of their gradients, where `start` serves all of them.

        It takes gradients where they lie: a step then holds no copy of them. `flag` is any of the model's, which the
        host must be able to read.
        """
        optimizer = self._optimizer
        averages = optimizer.defaults.get("beta1")  # GGT's own average of what is preconditioned
        if (
            averages
            or not optimizer._reads(flag)
            or optimizer.defaults["system"] == "layer"
            or self.segments.sharing.kind == "sharded"
        ):
            return None
        tables = [part.gradients() if part.has_kernel() else None for part in self._parts]
        found = [table for table in tables if table is not None]
        return found if len(found) == len(tables) else None

    def start(self, row: Tensor, step: Tensor, gradients: list[tuple[Tensor, Tensor]]) -> Pushed:
        """Push `gradients()` into row `row`, take them into moments, and multiply.

        Args:
            row: () int64.
            step: () int64, steps taken, this one included.
        """
        pushed, keeps = Pushed([], [], [], []), self._optimizer._keeps_gradient
        for part, table in zip(self._parts, gradients, strict=True):
            newest, products, source = part.start(row, step, table, self._mean(part.segment), keeps)
            pushed.newest.append(newest)
            pushed.outs.append(None)
            pushed.sources.append(source)
            if products is not None:
                pushed.products.append(products)
        return pushed if pushed.products else pushed._replace(products=None)

    def _mean(self, segment: Segment) -> ops.Moments | None:
        """Moments that take the gradient before it is preconditioned."""
        options, moments = self._optimizer.defaults, segment.moments
        if options["precondition"] != "momentum" or "exp_avg" not in moments:
            return None
        rates = self._optimizer._momentum, options["adam_beta2"]
        return ops.Moments(moments["exp_avg"], moments.get("exp_avg_sq"), *rates)

    def finish_(self, sums: list[Combination], shared: dict[str, Tensor], accept: Tensor) -> None:
        """Move the weights by what `sums` stand for; their `out`s are lost.

        Args:
            sums: of each segment.
            shared: what the whole model shares; a step that overflows is counted there.
            accept: () bool, whether the gradients are finite.
        """
        optimizer = self._optimizer
        recorded = optimizer._recorded if optimizer.record_metrics else None
        at = shared["step"], self._finite(sums, shared, accept)
        if recorded:  # the same sums in a launch of their own
            recorded.precondition([combination.sum_() for combination in sums])
        pairs = list(zip(self._parts, sums, strict=True))
        if optimizer.defaults["scaling"] in ("rms", "layer_rms"):
            squares = [self._combine_(part, c, at, squares=part.squares(), store=True) for part, c in pairs]
            for (part, c), factors in zip(pairs, self._factors(squares), strict=True):
                part.launch(c, *at, factors=factors, store=bool(recorded), **self._move(part))
        else:
            for part, c in pairs:
                self._combine_(part, c, at, store=bool(recorded), **self._move(part))
        if recorded and not optimizer._rejects(at[1]):
            recorded.update(optimizer._zero_unless_(at[1], [c.out for c in sums]), self.segments)
        for segment in self.segments:
            segment.owned.share(segment.owned.weights())

    def _finite(self, sums: list[Combination], shared: dict[str, Tensor], accept: Tensor) -> Tensor:
        """`accept`, less the case of an update that may overflow."""
        gram = shared["gram"].view(-1, *shared["gram"].shape[-2:])
        lengths = self.segments.scatter(gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt())
        bounds = [(c.coefficients.abs() * length).sum() + c.largest() for c, length in zip(sums, lengths, strict=True)]
        finite = torch.stack([(bound <= _LARGEST).to(accept.device) for bound in bounds]).all()
        finite = self.segments.group.all_(finite)
        shared["skipped"] += accept & ~finite
        return accept & finite

    def _combine_(
        self, part: _Part, c: Combination, at: tuple[Tensor, Tensor], squares: Tensor | None = None, **arguments: Any
    ) -> Tensor | None:
        """Sum, moments and what the arguments name; returns `squares`."""
        rows = None
        if not self._optimizer.record_metrics:
            if c.coefficients.dtype is torch.float32:
                rows = c.rows()
            else:  # terms that cancel, and a host that has looked
                c.sum_()
        part.launch(c, *at, rows=rows, moments=self._moments(part.segment), squares=squares, **arguments)
        return squares

    def _moments(self, segment: Segment) -> ops.Moments | None:
        options, beta1, moments = self._optimizer.defaults, self._optimizer._momentum, segment.moments
        if options["scaling"] == "adam":
            first = None if options["precondition"] == "momentum" else moments["exp_avg"]
            return ops.Moments(first, moments["exp_avg_sq"], beta1, options["adam_beta2"])
        return ops.Moments(moments["momentum"], None, beta1) if "momentum" in moments else None

    def _factors(self, squares: list[Tensor]) -> list[Tensor]:
        """For each segment what its update is multiplied by, (1,) or a number for each piece, float32."""
        target = self._optimizer.defaults["update_rms"]
        if self._optimizer.defaults["scaling"] == "rms":
            factor = model_factor([found.sum() for found in squares], self.segments, target)
            return [factor.to(found.device, torch.float32)[None] for found in squares]
        sums = [part.by_piece(found) for part, found in zip(self._parts, squares, strict=True)]
        return [factors.float() for factors in parameter_factors(sums, self.segments, target)]

    def _move(self, part: _Part) -> dict[str, Any]:
        """The weights, and the gradients that a cautious step of theirs looks at."""
        groups, options = self._optimizer.param_groups, self._optimizer.defaults
        rates = tuple((group["lr"], 1 - group["lr"] * group["weight_decay"]) for group in groups)
        weights = part.weights(rates, options["weight_rounding"] == "stochastic")
        return {"weights": weights, "against": part.gradient_table() if options["cautious"] else None}


class _Part:
    """A segment, the place of its blocks among its pieces, and the addresses of its weights."""

    def __init__(self, segment: Segment):
        self.segment = segment
        self._places: tuple[Tensor, Tensor] | None = None
        self._key: Any = None
        self._table: Tensor | None = None
        self._dtypes: frozenset[torch.dtype] = frozenset()
        self._gradient_key: Any = None
        self._gradients: Tensor | None = None
        self._rates: tuple[Any, Tensor | None] = (None, None)

    def _lie(self) -> tuple[Tensor, Tensor]:
        """How many blocks each piece has, int64, and of which piece each block is, int32; made at the first use."""
        if self._places is None:
            counts = torch.tensor([len(blocks) for blocks in self.segment.layout.blocks], dtype=torch.int64)
            pieces = torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32), counts)
            self._places = counts.to(self.segment.device), pieces.to(self.segment.device)
        return self._places

    def has_kernel(self) -> bool:
        """Whether a kernel knows its rows, on its weights' device."""
        segment = self.segment
        is_known = isinstance(segment.window, BlockTopKWindow) and segment.device == segment.parameter_device
        return is_known and ops.combine_step_for(segment.window.values) is not None

    def has_table(self, group_of: Mapping[Tensor, int]) -> bool:
        """Whether a kernel can write all its weights; their table is kept until they move."""
        segment = self.segment
        params, weights = [segment.params[piece.number] for piece in segment.owned.pieces], segment.owned.weights()
        groups = [group_of[p] if p.grad is not None else -1 for p in params]
        key = [(weight.data_ptr(), group) for weight, group in zip(weights, groups, strict=True)]
        if key != self._key:
            self._key, self._table = key, None
            if all(ops.has_address(w) and p.is_contiguous() for w, p in zip(weights, params, strict=True)):
                moved = [w if group >= 0 else None for w, group in zip(weights, groups, strict=True)]
                self._dtypes = frozenset(w.dtype for w in moved if w is not None)
                self._table = ops.weight_table(moved, segment.layout.blocks, groups, segment.device)
        return self._table is not None

    def gradients(self) -> tuple[Tensor, Tensor] | None:
        """Pieces of the blocks and the table of their gradients, if a kernel takes them."""
        if ops.start_step_for(self.segment.window.values) is None or not self.has_gradients():
            return None
        return self._lie()[1], self.gradient_table()

    def has_gradients(self) -> bool:
        """Whether a kernel can read them where they lie; the part of one that is not contiguous would be a copy."""
        return all(p.grad is None or ops.has_address(p.grad) for p in self.segment.params)

    def gradient_table(self) -> Tensor:
        """Their addresses; made anew where they have moved."""
        grads, blocks = self.segment.owned.gradients(), self.segment.layout.blocks
        key = [None if g is None else (g.data_ptr(), g.dtype) for g in grads]
        if key != self._gradient_key:
            self._gradient_key = key
            self._gradients = ops.weight_table(grads, blocks, [0] * len(grads), self.segment.device)
        return self._gradients

    def start(
        self, row: Tensor, step: Tensor, gradients: tuple[Tensor, Tensor], mean: ops.Moments | None, keeps: bool
    ) -> tuple[Tensor, Tensor | None, ops.Vector | None]:
        """`start_step_` over the whole segment.

        Args:
            mean: moments that take the gradient first.
            keeps: whether their mean, or the gradient, is preconditioned.

        Returns:
            As `Pushed` has them: the newest row's products, those of x, and x.
        """
        window: BlockTopKWindow = self.segment.window
        newest, dots, squares = ops.start_step_for(window.values)(
            *(window.indices, window.values, row, window.residual, gradients, step),
            block_size=self.segment.layout.block_size,
            scales=window.scales,
            grid=window.grid,
            moments=mean,
            keeps=keeps,
        )
        if not keeps:
            return newest[None], None, None
        parts = [squares[blocks.start : blocks.stop].sum() for blocks in self.segment.layout.blocks]
        length = torch.stack(parts).sum() if parts else dots.new_zeros(())
        source = ops.Vector(table=gradients[1])
        if mean is not None:
            source = ops.Vector(flat=mean.first, factor=1 / (1 - mean.beta1 ** int(step)))
        return newest[None], torch.cat([dots, length[None]])[None], source

    def weights(self, rates: tuple[tuple[float, float], ...], stochastic: bool) -> ops.Weights:
        """The table, with what each group does to its weights."""
        if self._rates[0] != rates:
            self._rates = rates, ops.from_host(rates, torch.float32, self.segment.device)
        return ops.Weights(self._lie()[1], self._table, self._rates[1], self._dtypes, stochastic)

    def squares(self) -> Tensor:
        """(blocks,) float64 zeros."""
        return torch.zeros(self.segment.layout.n_blocks, dtype=torch.float64, device=self.segment.device)

    def by_piece(self, squares: Tensor) -> Tensor:
        """(pieces,) sums, in one order, which atomic additions would not have."""
        return torch.segment_reduce(squares, "sum", lengths=self._lie()[0], unsafe=True, initial=0)

    def launch(self, c: Combination, step: Tensor, accept: Tensor, *, store: bool = False, **arguments: Any) -> None:
        """`combine_step_` over the whole segment; x is in `c.out`, or with rows where its source says."""
        size, block_size = self.segment.layout.size, self.segment.layout.block_size
        if c.out is None:
            arguments["source"] = c.source or ops.Vector()
            c.out = ops.empty(size, self.segment.device) if store else None
        out = c.coefficients.new_empty(0) if c.out is None else c.out
        on_device = step.to(out.device), accept.to(out.device)
        kernel = ops.combine_step_for(self.segment.window.values)
        kernel(out.view(-1, block_size), *on_device, pieces=self._lie()[1], store=store, **arguments)
