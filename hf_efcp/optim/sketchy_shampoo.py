"""S-Shampoo: Shampoo whose matrices are sketches of a few directions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hf_efcp.optim.grafting import graft_, graft_norm, graft_state, graft_step, update_moments_
from hf_efcp.optim.options import check_options
from hf_efcp.optim.parameterwise import ParameterwiseOptimizer
from hf_efcp.optim.partition import long_axes, partition, squeeze
from hf_efcp.optim.sketch_state import BlockSketches, compute_dtype, new_sketches
from hf_efcp.optim.sketchy_options import SHAMPOO_OPTIONS

_BATCH_NUMEL = 1 << 26  # entries of equal shapes that are preconditioned together off the CPU: 256 MB a copy


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
        beta2_per_step: whether an update decays by `β₂^update_freq`, or by β₂ as published.
        sketch_update: `"exact"`, or `"subspace"`: one block power step, an order faster for wide gradients.
        tail_decay: `"linear"` decays ρ by β₂; `"sqrt"`, as one published code does, is for comparison only.
        tail: `"rho"`, the bound, or `"trace"`, the mean eigenvalue of what is not kept.
        grafting: whose step's length a tensor takes: `"none"`, `"sgd"`, `"rmsprop"`, `"adafactor"` (little memory) or
            `"rms"`, a root mean square of 0.25.
        momentum, nesterov: heavy ball after grafting; 0.9 makes steps ten times as long as AdamW's at the same rate.
        ema: `m ← momentum·m + (1 − momentum)·u`, whose steps keep their length.
        weight_decay: decoupled, as AdamW's.
        block_size: cut axes into blocks with sketches of their own; costs memory, unlike in Shampoo.
        max_dim: axes longer than this get no sketch, and their slices have each the length of the graft step's.
        one_sided: sketch only the shortest axis, with p = 2.
        start_preconditioning_step: steps that are the graft step itself.
        sketch_dtype, momentum_dtype: storage; float64 sketches compute in float64.
        shard_state: whether each rank of DDP keeps and steps parameters of its own; `None`: where there are several.

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
        beta2_per_step: bool = True,
        sketch_update: str = "exact",
        tail_decay: str = "linear",
        tail: str = "rho",
        grafting: str = "adafactor",
        momentum: float = 0.0,
        nesterov: bool = True,
        ema: bool = False,
        weight_decay: float = 0.0,
        block_size: int | None = None,
        max_dim: int = 8192,
        one_sided: bool = False,
        start_preconditioning_step: int = 0,
        sketch_dtype: str | torch.dtype = "float32",
        momentum_dtype: str | torch.dtype = "float32",
        shard_state: bool | None = None,
    ):
        given = dict(locals())
        super().__init__(params, check_options(self.options, given))

    def _blocks(self, parameter: Tensor) -> list[Any]:
        options = self.defaults
        return partition(tuple(parameter.shape), options["block_size"], options["max_dim"], options["one_sided"])

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = new_sketches(self._blocks(parameter), self.defaults, parameter.device)
        state.update(graft_state(self.defaults["grafting"], parameter))
        if self.param_groups[0]["momentum"]:
            dtype = getattr(torch, self.defaults["momentum_dtype"])
            state["momentum"] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        return state

    def _accepted_step(self, accept: Tensor) -> None:
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        for params in self._batches():
            there = accept.to(params[0].device)
            gradients = self._gradients(params, there)
            directions = self._directions(params, gradients, there)
            for p, gradient, direction in zip(params, gradients, directions, strict=True):
                self._apply(p, self._length(p, gradient, direction, there), group_of[p], there)
                self.state[p]["step"] += 1

    def _batches(self) -> list[list[Tensor]]:
        """Parameters with a gradient, those of equal shape together where that saves launches."""
        batches: dict[Any, list[list[Tensor]]] = {}
        for p in self._parameters():
            if p.grad is None or not p.numel() or p not in self._owners:
                continue
            room = self._batch_size(p)
            key = (p.device, squeeze(tuple(p.shape)), int(self.state[p]["step"]))
            filling = batches.setdefault(key, [[]])
            if len(filling[-1]) == room:
                filling.append([])
            filling[-1].append(p)
        return [batch for filled in batches.values() for batch in filled]

    def _batch_size(self, parameter: Tensor) -> int:
        """On the CPU one: a batch there is a loop, and a copy of the gradients."""
        return 1 if parameter.device.type == "cpu" else max(1, _BATCH_NUMEL // parameter.numel())

    def _gradients(self, params: list[Tensor], accept: Tensor) -> Tensor:
        """(n, *shape without axes of length 1); zero where the step is not accepted. One may be `p.grad` itself."""
        dtype = compute_dtype(self.defaults)
        shape = squeeze(tuple(params[0].shape))
        gradients = [p.grad.to(dtype).contiguous().view(shape) for p in params]
        stacked = gradients[0][None] if len(params) == 1 else torch.stack(gradients)
        return stacked if self._reads(accept) else torch.where(accept, stacked, 0)

    def _directions(self, params: list[Tensor], gradients: Tensor, accept: Tensor) -> Tensor:
        options = self.defaults
        states = [self.state[p] for p in params]
        count = int(states[0]["step"])
        blocks = self._blocks(params[0])
        parts = []
        for number, block in enumerate(blocks):
            part = gradients[(slice(None), *block.slices)]
            sketches = BlockSketches(states, number, block, options, self._mask(accept))
            projections = sketches.update(part, seed=count) if count % options["update_freq"] == 0 else None
            parts.append(sketches.precondition(part, projections))
        if len(parts) == 1:
            return parts[0]
        directions = torch.empty_like(gradients)
        for part, block in zip(parts, blocks, strict=True):
            directions[(slice(None), *block.slices)] = part
        return directions

    def _length(self, p: Tensor, gradient: Tensor, direction: Tensor, accept: Tensor) -> Tensor:
        """The direction at the length of the graft step; that step itself at first."""
        options, state = self.defaults, self.state[p]
        kind, beta2, count = options["grafting"], options["beta2"], int(state["step"])
        gradient, update = gradient.view(p.shape), direction.reshape(p.shape)
        correction = 1.0 if beta2 == 1 else 1 - beta2 ** (count + 1)
        square = None
        if kind in ("rmsprop", "adafactor"):
            square = gradient.square()
            update_moments_(state, square, beta2, self._mask(accept))
        if count < options["start_preconditioning_step"]:
            return graft_step(kind, state, gradient, correction)
        if kind == "none":
            return update
        each = long_axes(tuple(p.shape), options["block_size"], options["max_dim"])
        return graft_(update, graft_norm(kind, state, gradient, square, correction, each), each)

    def _apply(self, p: Tensor, update: Tensor, group: dict[str, Any], accept: Tensor) -> None:
        """Momentum, decay and the step; an update that overflowed moves nothing but the decay."""
        lr, decay, state = group["lr"], group["weight_decay"], self.state[p]
        if lr and decay:
            p.mul_(1 - lr * decay * accept.double())
        finite = update.sum().isfinite() & accept
        if self._reads(finite) and not finite:
            return
        factor = self.param_groups[0]["momentum"]  # OneCycleLR writes it there
        if "momentum" in state:
            buffer = state["momentum"]
            update = update * (1 - factor) if self.defaults["ema"] else update
            moved = buffer.to(update.dtype).mul(factor).add_(update)
            update = update.add(moved, alpha=factor) if self.defaults["nesterov"] else moved
            buffer.copy_(self._unless(finite, moved, buffer))
        p.add_(self._unless(finite, update, update.new_zeros(())), alpha=-lr)

    def _mask(self, accept: Tensor) -> Tensor | None:
        """`accept`, where the host has not seen already that it is true."""
        return None if self._reads(accept) else accept

    def _unless(self, accept: Tensor, new: Tensor, old: Tensor) -> Tensor:
        return new if self._reads(accept) else torch.where(accept, new, old)
