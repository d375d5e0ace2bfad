"""GGT: full-matrix adaptive regularization over a window of gradients, dense or compressed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hf_efcp.curvature.solvers import eigenvectors, mean_eigenvalue, spectral_solve, spectral_weights
from hf_efcp.optim.options import Option
from hf_efcp.optim.segment import Segment
from hf_efcp.optim.window import WindowOptimizer
from hf_efcp.optim.window_options import WINDOW_OPTIONS

_GGT = "GGT, arXiv 1806.02958"


class GGT(WindowOptimizer):
    """Steps along `((G̃ᵀG̃)^½ + εI)⁻¹ x`, `G̃` the last `m` gradients, row i decayed by `β₂^age` (GGT, EFCP).

    With `precondition="compressed"` and `beta1=0` the newest row is preconditioned, by the form free of
    cancellation `u = G̃ᵀ V w(s) Vᵀe_j`. Else `x` is the dense gradient, or with `beta1` the exponential average of
    either, and `u = x/ε + G̃ᵀ V diag((1/(s+ε) − 1/ε)/s²) Vᵀ G̃x`. Ages enter Gram matrix, inner products and weights
    alike. The rule of a step is `MFAC`'s.

    Args:
        params: parameters or groups; groups may differ in `lr` and `weight_decay`.
        lr: learning rate.
        window: rows `m` of `G`.
        eps: ε, in gradient units, or with `eps_mode="relative"` in roots of the mean eigenvalue of `GGᵀ`. There, the
            larger it is, the closer `scaling="adam"` is to AdamW; at 1 it lost 0.7 points to it on digits, at 3 none.
        jitter: added to the diagonal of the Gram matrix before its root, in squared gradient units. Published as
            1e-6; it changes small-gradient steps by as much as 100 %.
        beta1: averaging of `x`, 0 for none; without bias correction, as published.
        beta2: decay of older rows, 1 for none.
        basis_every: steps between eigendecompositions. In between V stands still and `s²` follows as the Rayleigh
            quotients of its columns, (m, m) float64 more state. On CUDA the host waits at an eigendecomposition alone.
        compression, density, selection, block_size, rank, system, precondition, scaling, update_rms, momentum,
        adam_beta2, cautious, weight_decay, value_dtype, residual_dtype, moment_dtype, memory_budget,
        state_device, shard_state, weight_rounding: see `MFAC`.

    Raises:
        ValueError, TypeError: an option is out of range or of the wrong kind, by name.
        NotImplementedError: parameters or combinations that cannot work, with what works instead.

    When not to use it: an m×m eigendecomposition at every step makes windows beyond a few hundred rows slow;
    `basis_every` takes fewer.
    """

    options = (
        *WINDOW_OPTIONS,
        Option("eps", float, "ε added to the root of the curvature", low=0, low_open=True, source=_GGT),
        Option(
            "eps_mode",
            str,
            "ε as it is, or in roots of the mean eigenvalue of GGᵀ",
            choices=("absolute", "relative"),
            source="this package",
        ),
        Option("jitter", float, "added to the Gram matrix's diagonal", low=0, source="EFCP, arXiv 2306.06098"),
        Option("beta1", float, "average of what is preconditioned", low=0, high=1, high_open=True, source=_GGT),
        Option("beta2", float, "decay of a row with each step of age", low=0, low_open=True, high=1, source=_GGT),
        Option(
            "basis_every",
            int,
            "steps between eigendecompositions; in between their vectors are kept",
            low=1,
            source="this package",
        ),
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        window: int = 32,
        eps: float = 3.0,
        eps_mode: str = "relative",
        jitter: float = 0.0,
        beta1: float = 0.0,
        beta2: float = 1.0,
        basis_every: int = 1,
        compression: str = "topk",
        density: float = 0.01,
        selection: str = "block",
        block_size: int | None = 2048,
        rank: int = 4,
        system: str = "model",
        precondition: str = "gradient",
        scaling: str = "adam",
        update_rms: float = 0.25,
        momentum: float = 0.9,
        adam_beta2: float = 0.999,
        cautious: bool = False,
        weight_decay: float = 0.0,
        value_dtype: str | torch.dtype = "float32",
        residual_dtype: str | torch.dtype = "float32",
        moment_dtype: str | torch.dtype = "float32",
        memory_budget: str | int | None = None,
        state_device: str | None = None,
        shard_state: bool | None = None,
        weight_rounding: str = "stochastic",
    ):
        options = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        if beta1 and precondition == "momentum":
            raise ValueError("`beta1` averages what is preconditioned, and so does precondition='momentum': take one.")
        super().__init__(params, options)

    def _moments(self) -> list[str]:
        return super()._moments() + (["average"] if self.defaults["beta1"] else [])

    def _targets(
        self, segments: list[Segment], gradients: list[Tensor], scratch: list[Tensor], taken: Tensor, accept: Tensor
    ) -> list[Tensor] | None:
        if not self.defaults["beta1"]:
            return super()._targets(segments, gradients, scratch, taken, accept)
        row = taken % self.defaults["window"]
        averages = []
        for segment, gradient, newest in zip(segments, gradients, scratch, strict=True):
            if not self._keeps_gradient:
                one = torch.zeros(1, self.defaults["window"], device=segment.device)
                one.index_fill_(1, row.to(segment.device)[None], 1.0)
                segment.window.combine(one.expand(segment.n_systems, -1), newest.zero_())
                gradient = newest
            share = torch.where(accept.to(segment.device), 1 - self.defaults["beta1"], 0.0)
            stored = segment.moments["average"]
            average = stored.float().lerp_(gradient, share.to(gradient.dtype))  # its own memory where that is float32
            stored.copy_(average)
            averages.append(average)
        return averages

    def _decay(self, row: Tensor) -> Tensor:
        """`β₂^age` of each row, (m,) float64; the newest has age 0."""
        m = self.defaults["window"]
        ages = (row - torch.arange(m, device=row.device)) % m
        return torch.full_like(ages, self.defaults["beta2"], dtype=torch.float64) ** ages

    def _shared_state(self, device: torch.device) -> dict[str, Tensor]:
        shared = super()._shared_state(device)
        if self.defaults["basis_every"] > 1:
            shared["basis"] = torch.zeros_like(shared["gram"])
            shared["basis_age"] = torch.zeros((), dtype=torch.int64, device=self._counting_device(device))
        return shared

    def _basis(self, shared: dict[str, Tensor], decayed: Tensor) -> Tensor | None:
        """Eigenvectors that this step takes, (S, m, m); `None` for those of `decayed`, taken anew at every step."""
        every = self.defaults["basis_every"]
        if every == 1:
            return None
        stored, age = shared["basis"].view_as(decayed), shared["basis_age"]
        basis = eigenvectors(decayed) if int(age) % every == 0 else stored
        if any(group["lr"] for group in self.param_groups):  # a step that changes nothing must change nothing here
            stored.copy_(basis)
            age += 1
        return basis

    def _solve(
        self, shared: dict[str, Tensor], gram: Tensor, row: Tensor, dots: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        decay, jitter = self._decay(row), self.defaults["jitter"]
        decayed = decay[:, None] * gram * decay
        eps = self._eps(mean_eigenvalue(decayed) * gram.shape[-1])
        unit = torch.ones_like(eps) if self.defaults["scaling"] == "none" else eps  # εu, as λu in M-FAC
        basis = self._basis(shared, decayed)
        if dots is None:
            return unit[:, None] * decay * spectral_weights(decayed, row, eps, jitter, basis), None
        return unit[:, None] * decay * spectral_solve(decayed, decay * dots, eps, jitter, basis), unit / eps

    def _eps(self, mean_squares: Tensor) -> Tensor:
        """ε of each system from the mean eigenvalue of its `GGᵀ`."""
        eps = torch.full_like(mean_squares, self.defaults["eps"])
        if self.defaults["eps_mode"] == "relative":
            return (eps * mean_squares.sqrt()).clamp_min(1e-30)
        return eps

    def _condition(self, eigenvalues: Tensor) -> Tensor:
        eps, roots = self._eps(eigenvalues.mean(-1)), eigenvalues.sqrt()
        return (roots[..., -1] + eps) / (roots[..., 0] + eps)
