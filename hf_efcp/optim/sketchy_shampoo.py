"""S-Shampoo: Shampoo whose matrices are sketches of a few directions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hf_efcp.ops import cautious
from hf_efcp.optim.grafting import Moments, graft_, graft_norm, graft_state, graft_step, update_moments_
from hf_efcp.optim.momentum import Momentum, momentum_step_, momentum_step_slices_, step_
from hf_efcp.optim.options import check_options
from hf_efcp.optim.parameterwise import ParameterwiseOptimizer
from hf_efcp.optim.partition import Slices, find_slices, long_axes, partition, without_zeros
from hf_efcp.optim.rounding import exactly
from hf_efcp.optim.sketch_state import BlockSketches, compute_dtype, due_update, new_sketches, storage_dtype
from hf_efcp.optim.sketchy_options import SHAMPOO_OPTIONS

_BATCH_NUMEL = 1 << 26  # entries of equal shapes that are stepped together off the CPU: 256 MB a copy
_FLOOR = 1e-8  # of a vector's largest mean square: entries 1e-4 as long as the largest take half a step
_CPU_BATCH_NUMEL = 1 << 17
_SCALE = "update_"  # before the names of what `scaling` remembers


class SketchyShampoo(ParameterwiseOptimizer):
    """Steps along `L̃^{-1/p} G R̃^{-1/p}`, `L̃` and `R̃` sketches of `Σ β₂^{T−t} GGᵀ` and `GᵀG` (arXiv 2302.03764, Alg. 3).

    Each axis of a tensor has a frequent-directions sketch of `rank` directions and the escaped mass ρ, so that
    `C ⪯ M ⪯ C + ρI`; p is twice the number of axes: 2 for vectors, 4 for matrices. An axis no longer than `rank` is
    kept whole, which is Shampoo. With `rank=64` the sketches of a 768×3072 matrix take 0.42 bytes per parameter,
    Shampoo's matrices 34. The rule of a step:

        sketch G, u = L̃^{-1/p} G R̃^{-1/p}, u ← u·‖graft step‖/‖u‖, m ← momentum·m + u (nesterov: u + momentum·m),
        p ← p(1 − lr·weight_decay) − lr·m

    With `grafting="none"`, `momentum=0` and `lr=1` the weights change by minus the preconditioned gradient.

    Args:
        params: parameters or groups; groups may differ in `lr` and `weight_decay`.
        lr: learning rate.
        rank: directions kept of each axis.
        beta2: decay of the sums; 1 sums. There is no factor `1 − β₂`.
        epsilon: ε of `(C + ρI + εI)^{-1/p}`, in units of the largest eigenvalue with `relative_epsilon`.
        update_freq: steps between updates of the sketches; gradients between are preconditioned and not sketched.
        warm_steps: first steps that all update the sketches.
        beta2_per_step: whether an update decays by `β₂^update_freq`, or by β₂ as published.
        sketch_update: `"exact"`, or `"subspace"`: one block power step, an order faster for wide gradients.
        tail_decay: `"linear"` decays ρ by β₂; `"sqrt"`, as one published code does, is for comparison only.
        tail: `"rho"`, the bound, or `"trace"`, the mean eigenvalue of what is not kept.
        grafting: whose step's length a tensor takes: `"none"`, `"sgd"`, `"rmsprop"`, `"adafactor"` (little memory) or
            `"rms"`, a root mean square of 0.25.
        scaling: `"adafactor"` divides a grafted step by the roots of the decayed mean squares that its rows and columns
            have had, which evens out what the sketches do not hold; a vector's step entry by entry.
        momentum, nesterov: heavy ball after grafting; 0.9 makes steps ten times as long as AdamW's at the same rate.
        ema: `m ← momentum·m + (1 − momentum)·u`, corrected for its start at zero, whose steps keep their length.
        cautious: leave out of a step what goes up the gradient, and make the rest √2 times as long.
        weight_decay: decoupled, as AdamW's.
        block_size: cut axes into blocks with sketches of their own; costs memory, unlike in Shampoo.
        max_dim: axes longer than this get no sketch, and their slices have each the length of the graft step's.
        one_sided: sketch only the shortest axis, with p = 2.
        start_preconditioning_step: steps that are the graft step itself.
        sketch_dtype, momentum_dtype: storage; float64 sketches compute in float64, as all is of float64 parameters but
            what is bfloat16.
        shard_state: whether each rank of DDP keeps and steps parameters of its own; `None`: where there are several.
        weight_rounding: of 16-bit weights, `"stochastic"` or to the `"nearest"`, which loses small steps.

    Raises:
        ValueError, TypeError: an option is out of range or of the wrong kind, by name.

    When not to use it: where a tensor is small enough for Shampoo's own matrices, or a step so short that products
    with `rank` columns cost more than the gradient itself; then raise `update_freq` or `one_sided`.
    """

    options = SHAMPOO_OPTIONS

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        rank: int = 64,
        beta2: float = 0.999,
        epsilon: float = 1e-7,
        relative_epsilon: bool = True,
        update_freq: int = 1,
        warm_steps: int = 0,
        beta2_per_step: bool = True,
        sketch_update: str = "exact",
        tail_decay: str = "linear",
        tail: str = "rho",
        grafting: str = "adafactor",
        scaling: str = "none",
        momentum: float = 0.0,
        nesterov: bool = True,
        ema: bool = False,
        cautious: bool = False,
        weight_decay: float = 0.0,
        block_size: int | None = None,
        max_dim: int = 8192,
        one_sided: bool = False,
        start_preconditioning_step: int = 0,
        sketch_dtype: str | torch.dtype = "float32",
        momentum_dtype: str | torch.dtype = "float32",
        shard_state: bool | None = None,
        weight_rounding: str = "stochastic",
    ):
        given = dict(locals())
        super().__init__(params, check_options(self.options, given))

    def _blocks(self, parameter: Tensor) -> list[Any]:
        options = self.defaults
        return partition(tuple(parameter.shape), options["block_size"], options["max_dim"], options["one_sided"])

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = new_sketches(self._blocks(parameter), self.defaults, parameter)
        state.update(graft_state(self.defaults["grafting"], parameter))
        if self.defaults["scaling"] == "adafactor":
            state.update(graft_state("adafactor", parameter, _SCALE))
        if self.param_groups[0]["momentum"]:
            dtype = storage_dtype(self.defaults["momentum_dtype"], parameter)
            state["momentum"] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        return state

    def _accepted_step(self, accept: Tensor) -> None:
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        for params in self._batches():
            there = accept.to(params[0].device)
            slices = self._slices(params, there)
            gradients = self._gradients(params, there, slices)
            directions = self._directions(params, gradients, there)
            updates = self._lengths(params, gradients, directions, there, slices)
            updates = self._scaled(params, updates, there, slices)
            self._apply(params, updates, gradients, group_of, there, slices)

    def _batches(self) -> list[list[Tensor]]:
        """Parameters with a gradient, those of equal shape together where that saves launches."""
        batches: dict[Any, list[list[Tensor]]] = {}
        for p in self._parameters():
            if p.grad is None or not p.numel() or p not in self._owners:
                continue
            room = self._batch_size(p)
            key = (p.device, p.dtype, p.shape, int(self.state[p]["step"]))
            filling = batches.setdefault(key, [[]])
            if len(filling[-1]) == room:
                filling.append([])
            filling[-1].append(p)
        return [batch for filled in batches.values() for batch in filled]

    def _batch_size(self, parameter: Tensor) -> int:
        """On the CPU few entries: a batch's products are a loop there, and what does not fit its cache is slow."""
        room = _CPU_BATCH_NUMEL if parameter.device.type == "cpu" else _BATCH_NUMEL
        return max(1, room // parameter.numel())

    def _slices(self, params: list[Tensor], accept: Tensor) -> Slices | None:
        """What is not zero of a vocabulary: other words need no work. Off the CPU it would wait for the device."""
        options, shape = self.defaults, tuple(params[0].shape)
        axes = long_axes(shape, options["block_size"], options["max_dim"])
        is_first = int(self.state[params[0]]["step"]) < options["start_preconditioning_step"]
        if len(params) > 1 or len(axes) != 1 or is_first or not self._reads(accept) or len(self._blocks(params[0])) > 1:
            return None
        return find_slices(params[0].grad, *axes)

    def _gradients(self, params: list[Tensor], accept: Tensor, slices: Slices | None) -> Tensor:
        """(n, *shape), without what is zero; zero where the step is not accepted. One may be `p.grad` itself."""
        dtype = compute_dtype(self.defaults, params[0])
        if len(params) == 1:
            stacked = without_zeros(params[0].grad[None], slices).to(dtype).contiguous()
        else:
            stacked = torch.stack([p.grad.to(dtype) for p in params]).contiguous()
        return stacked if self._reads(accept) else torch.where(accept, stacked, 0)

    def _directions(self, params: list[Tensor], gradients: Tensor, accept: Tensor) -> Tensor:
        """Preconditioned gradients, of the same shape."""
        options = self.defaults
        states = [self.state[p] for p in params]
        due = due_update(int(states[0]["step"]), options)
        blocks = self._blocks(params[0])
        lengths = [d for d, whole in zip(gradients.shape[1:], params[0].shape, strict=True) if whole != 1]
        squeezed = gradients.view(len(params), *(lengths or [1]))
        parts = []
        for place, block in enumerate(blocks):
            part = squeezed[(slice(None), *block.slices)]
            sketches = BlockSketches(states, place, block, options, self._mask(accept))
            projections = sketches.update(part, due) if due else None
            parts.append(sketches.precondition(part, projections))
        if len(parts) == 1:
            return parts[0].reshape(gradients.shape)
        directions = torch.empty_like(squeezed)
        for part, block in zip(parts, blocks, strict=True):
            directions[(slice(None), *block.slices)] = part
        return directions.view(gradients.shape)

    def _lengths(
        self, params: list[Tensor], gradients: Tensor, directions: Tensor, accept: Tensor, slices: Slices | None
    ) -> Tensor:
        """The directions at the lengths of the graft steps; those steps themselves at first."""
        options, states = self.defaults, [self.state[p] for p in params]
        kind, beta2, count = options["grafting"], options["beta2"], int(states[0]["step"])
        correction = 1.0 if beta2 == 1 else 1 - beta2 ** (count + 1)
        square = None
        if kind in ("rmsprop", "adafactor"):
            square = gradients.square()
            update_moments_(states, square, beta2, self._mask(accept), slices)
        if kind == "none" and count >= options["start_preconditioning_step"]:
            return directions
        moments = Moments.of(states, slices, params[0].shape)
        if count < options["start_preconditioning_step"]:
            return graft_step(kind, moments, gradients, correction)
        each = long_axes(tuple(params[0].shape), options["block_size"], options["max_dim"])
        return graft_(directions, graft_norm(kind, moments, gradients, square, correction, each), each)

    def _scaled(self, params: list[Tensor], updates: Tensor, accept: Tensor, slices: Slices | None) -> Tensor:
        """The updates over the roots of their own rows' and columns' mean squares, with `scaling`."""
        options, count = self.defaults, int(self.state[params[0]]["step"])
        if options["scaling"] == "none" or count < options["start_preconditioning_step"]:
            return updates
        beta2, start = options["beta2"], len(_SCALE)
        states = [{k[start:]: v for k, v in self.state[p].items() if k.startswith(_SCALE)} for p in params]
        square = updates.square()
        finite = square.reshape(len(params), -1).sum(1).isfinite()
        if not (self._reads(finite) and finite.all()):  # what overflowed is no step, and no moment
            square = torch.where(finite.view(-1, *[1] * (square.ndim - 1)), square, 0)
        update_moments_(states, square, beta2, self._mask(accept), slices)
        taken = count - options["start_preconditioning_step"] + 1
        correction = 1.0 if beta2 == 1 else 1 - beta2**taken
        moments = Moments.of(states, slices, params[0].shape)
        return graft_step("adafactor", moments, updates, correction, floor=_FLOOR)

    def _apply(
        self,
        params: list[Tensor],
        updates: Tensor,
        gradients: Tensor,
        group_of: dict[Tensor, dict[str, Any]],
        accept: Tensor,
        slices: Slices | None,
    ) -> None:
        """Momentum, decay and the step; an update that overflowed moves nothing but the decay."""
        finite = updates.reshape(len(params), -1).sum(1).isfinite() & accept
        known = finite.tolist() if self._reads(finite) else None
        count = int(self.state[params[0]]["step"]) + 1
        factor = self.param_groups[0]["momentum"]  # OneCycleLR writes it there
        rule = Momentum.of(factor, self.defaults["nesterov"], self.defaults["ema"], count)
        for i, (p, update) in enumerate(zip(params, updates, strict=True)):
            group, state = group_of[p], self.state[p]
            lr, decay = group["lr"], group["weight_decay"]
            with exactly(p, group["weight_rounding"] if lr else "nearest", int(state["step"])) as weight:
                if lr and decay:
                    weight.mul_(1 - lr * decay * accept.double())
                state["step"] += 1
                if known and not known[i]:
                    continue
                mask = None if known else finite[i]
                against = gradients[i] if self.defaults["cautious"] else None
                if "momentum" not in state:
                    step_(weight, update if against is None else cautious(update, against), lr, mask, slices)
                elif slices is None:
                    momentum_step_(weight, state["momentum"], update, lr, rule, mask, against)
                else:
                    momentum_step_slices_(weight, state["momentum"], update, lr, rule, slices, against)

    def _mask(self, accept: Tensor) -> Tensor | None:
        """`accept`, where the host has not seen already that it is true."""
        return None if self._reads(accept) else accept
