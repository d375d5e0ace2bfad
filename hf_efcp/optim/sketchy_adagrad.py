"""S-AdaGrad: full-matrix AdaGrad whose matrix is a sketch of a few directions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hf_efcp.curvature.ball import ball_shrinkage
from hf_efcp.curvature.sketch import deflate, top_eigenpairs
from hf_efcp.optim.options import SHARD_STATE, Option, check_options
from hf_efcp.optim.parameterwise import ParameterwiseOptimizer
from hf_efcp.optim.rounding import WEIGHT_ROUNDING

_SKETCHY = "Sketchy, arXiv 2302.03764"


def _precision(parameter: Tensor) -> torch.dtype:
    """float32, or float64 where the parameter is."""
    return torch.promote_types(parameter.dtype, torch.float32)


class SketchyAdaGrad(ParameterwiseOptimizer):
    """Steps along `G̃^{-1/2} g`, `G̃ = C + ρI` a sketch of `δI + Σ ggᵀ` (arXiv 2302.03764, Alg. 2).

    The sketch takes `g` first; then `y = x − lr·G̃^{-1/2} g`, and with `radius` the point of the ball `‖x‖ ≤ radius`
    that is nearest to `y` in the norm of `G̃^{1/2}`. `G̃` is never less than the sum it stands for. Memory and time
    are those of `rank` vectors of the size of the parameters.

    Args:
        params: parameters or groups; groups may differ in `lr` and `weight_decay`.
        lr: learning rate; in theory the diameter of the ball over √2.
        rank: directions k kept (the paper's ℓ is k + 1).
        delta: δ, the first ρ, in units of squared gradient. 0 drops what is outside of the sketch until ρ > 0.
        radius: of the l2 ball around zero, or `None` for the whole space.
        system: one sketch for each `"parameter"`, or one for the `"model"` as a single vector; the ball is of the same.
        weight_decay: decoupled, as AdamW's.
        shard_state: whether each rank of DDP keeps the sketches of parameters of its own; `None`: where there are
            several.
        weight_rounding: of 16-bit weights, `"stochastic"` or to the `"nearest"`; the point of a ball is the nearest.

    Raises:
        ValueError, TypeError: an option is out of range or of the wrong kind, by name.

    When not to use it: deep networks, where sums without decay forget nothing; there take `SketchyShampoo`.
    """

    options = (
        Option("lr", float, "learning rate", low=0),
        Option("rank", int, "directions k kept", low=1, high=65536, source=_SKETCHY),
        Option(
            "delta", float, "δ, the escaped mass at the start, in units of squared gradient", low=0, source=_SKETCHY
        ),
        Option(
            "radius",
            float,
            "of the l2 ball that the weights stay in",
            low=0,
            low_open=True,
            optional=True,
            source=_SKETCHY,
        ),
        Option(
            "system",
            str,
            "one sketch for each parameter, or one for the model as a vector",
            choices=("parameter", "model"),
            source=_SKETCHY,
        ),
        Option("weight_decay", float, "decoupled weight decay, times lr", low=0, source="AdamW, arXiv 1711.05101"),
        SHARD_STATE,
        WEIGHT_ROUNDING,
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        rank: int = 16,
        delta: float = 1e-8,
        radius: float | None = None,
        system: str = "parameter",
        weight_decay: float = 0.0,
        shard_state: bool | None = None,
        weight_rounding: str = "stochastic",
    ):
        given = dict(locals())
        super().__init__(params, check_options(self.options, given))

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        rank, device = self.defaults["rank"], parameter.device
        state = {"basis": torch.zeros(*parameter.shape, rank, dtype=_precision(parameter), device=device)}
        if self.defaults["system"] == "parameter":
            state.update(self._new_spectrum(device))
        return state

    def _shared_state(self, device: torch.device) -> dict[str, Tensor]:
        shared = super()._shared_state(device)
        if self.defaults["system"] == "model":
            shared.update(self._new_spectrum(device))
        return shared

    def _new_spectrum(self, device: torch.device) -> dict[str, Tensor]:
        scalar = {"dtype": torch.float64, "device": device}
        return {
            "singular_values": torch.zeros(self.defaults["rank"], **scalar),
            "tail": torch.full((), self.defaults["delta"], **scalar),
        }

    def _accepted_step(self, accept: Tensor) -> None:
        groups = {p: group for group in self.param_groups for p in group["params"]}
        params = [p for p in self._with_gradients() if p.numel() and p in self._owners]
        systems = [params] if self.defaults["system"] == "model" else [[p] for p in params]
        for system in systems:
            self._step_system(system, groups, accept)

    def _step_system(self, params: list[Tensor], groups: dict[Tensor, dict[str, Any]], accept: Tensor) -> None:
        """Sketch, step and projection of the parameters of one sketch."""
        owner = self._parameters()[0] if self.defaults["system"] == "model" else params[0]
        spectrum = self.state[owner]
        device = spectrum["tail"].device
        keep = accept.to(device)
        gradients = [torch.where(accept.to(p.device), p.grad.to(_precision(p)), 0).reshape(-1) for p in params]
        self._sketch(params, gradients, spectrum, keep)
        inside, outside = self._roots(spectrum)
        bases = [self.state[p]["basis"].view(p.numel(), -1) for p in params]
        dots, total = self._sums(bases, gradients, device)
        # `g − UUᵀg` below the rounding of `U` is none: times 1/√δ it would be a step.
        rounding = 4 * len(dots) * max((torch.finfo(u.dtype).eps for u in bases), default=0.0) ** 2
        outside = torch.where(total - dots.square().sum() > rounding * total, outside, 0)
        weights = (inside - outside) * dots
        for p, u, g in zip(params, bases, gradients, strict=True):
            update = g * outside.to(g.device, g.dtype) + u @ weights.to(u.device, u.dtype)
            self._move(p, update.view(p.shape), groups[p], groups[p]["lr"], accept)
            self.state[p]["step"] += 1
        if self.defaults["radius"] is not None and any(group["lr"] for group in groups.values()):
            self._project(params, bases, *self._roots(spectrum), keep)

    def _sketch(self, params: list[Tensor], gradients: list[Tensor], spectrum: dict[str, Tensor], keep: Tensor) -> None:
        """Frequent directions of `[U diag(s), g]`, its Gram matrix summed over the parameters."""
        s, tail = spectrum["singular_values"], spectrum["tail"]
        columns = []
        for p, g in zip(params, gradients, strict=True):
            basis = self.state[p]["basis"].view(p.numel(), -1).double()
            columns.append(torch.cat([basis * s.to(p.device), g.double()[:, None]], 1))
        gram = torch.zeros(len(s) + 1, len(s) + 1, dtype=torch.float64, device=tail.device)
        gram = self._summed(sum(((x.mT @ x).to(tail.device) for x in columns), gram))
        values, vectors = top_eigenpairs(gram, len(s))
        size = sum(p.numel() for p in (params if self.defaults["system"] == "parameter" else self._with_gradients()))
        coarsest = max((g.dtype for g in gradients), key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
        kept, cut, positive = deflate(values, len(s), size, coarsest)
        keep = keep & kept.isfinite().all() & vectors.isfinite().all()
        turn = vectors * torch.where(positive, values[: len(s)].rsqrt(), 0)
        for p, x in zip(params, columns, strict=True):
            basis = self.state[p]["basis"]
            basis.copy_(torch.where(keep.to(p.device), (x @ turn.to(p.device)).view(basis.shape), basis))
        s.copy_(torch.where(keep, kept, s))
        tail.copy_(torch.where(keep, tail + cut, tail))

    def _sums(self, bases: list[Tensor], vectors: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """`Uᵀx` and `‖x‖²` of a system, whose parameters may be those of several ranks."""
        sums = torch.zeros(self.defaults["rank"] + 1, dtype=torch.float64, device=device)
        for u, x in zip(bases, vectors, strict=True):
            sums[:-1] += (u.mT @ x).double().to(device)
            sums[-1] += torch.linalg.vector_norm(x).double().square().to(device)
        sums = self._summed(sums)
        return sums[:-1], sums[-1]

    def _summed(self, part: Tensor) -> Tensor:
        return self._owners.group.sum_(part) if self.defaults["system"] == "model" else part

    def _with_gradients(self) -> list[Tensor]:
        return [p for p in self._parameters() if p.grad is not None]

    def _roots(self, spectrum: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Eigenvalues of the pseudo-inverse of `G̃^{1/2}`: in the kept directions and outside."""
        values = torch.cat([spectrum["singular_values"].square() + spectrum["tail"], spectrum["tail"][None]])
        roots = torch.where(values > 0, values.rsqrt(), 0)
        return roots[:-1], roots[-1]

    def _project(
        self, params: list[Tensor], bases: list[Tensor], inside: Tensor, outside: Tensor, keep: Tensor
    ) -> None:
        """The nearest point of the ball in the norm of `G̃^{1/2}`."""
        points = [p.to(_precision(p)).reshape(-1) for p in params]
        device = inside.device
        dots, total = self._sums(bases, points, device)
        shrink_in, shrink_out, is_outside = ball_shrinkage(inside, outside, dots, total, self.defaults["radius"])
        weights = (shrink_in - shrink_out) * dots
        for p, u, y in zip(params, bases, points, strict=True):
            nearest = y * shrink_out.to(y.device, y.dtype) + u @ weights.to(u.device, u.dtype)
            p.copy_(torch.where((is_outside & keep).to(p.device), nearest.view(p.shape), p))
