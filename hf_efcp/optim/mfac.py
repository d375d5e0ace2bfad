"""M-FAC: natural gradient with the matrix of the last `m` gradients, dense or compressed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hf_efcp.curvature.solvers import SlidingInverse, mean_eigenvalue, woodbury_solve
from hf_efcp.optim.options import Option
from hf_efcp.optim.window import WindowOptimizer
from hf_efcp.optim.window_options import WINDOW_OPTIONS

_EFCP = "EFCP, arXiv 2306.06098"
_MFAC = "M-FAC, arXiv 2107.03356"


class MFAC(WindowOptimizer):
    """Steps along `(λI + GᵀG/m)⁻¹ x`, `G` the last `m` gradients (M-FAC), each compressed with error feedback (EFCP).

    With `precondition="compressed"` the newest row is preconditioned, as published, by the form free of
    cancellation `u = m·Gᵀ(mλI + GGᵀ)⁻¹e_j`. With `"gradient"` it is the dense gradient:
    `u = (x − Gᵀ(mλI + GGᵀ)⁻¹Gx)/λ`. `m` is the window's size from the first step on. The rule of a step:

        row j ← compress(residual + g), u as above, v ← momentum·v + u, p ← p(1 − lr·weight_decay) − lr·scale(v)

    With `"momentum"` it is the mean of gradients `x ← momentum·x + (1 − momentum)·g`, its start at zero corrected for,
    and `v` is `u` itself. With `"adam"` it is made as long as `x`, so that the step is AdamW's where all gradients
    agree, and divided by the root of Adam's second moment of `g`. The mean lies largely in what the rows span, so
    there the curvature tells, where it turns a single gradient little.

    Every `scaling` but `"none"` sees `λu`, which is `x` where the window holds nothing, so that its length does not
    jump while the window fills; with `"adam"` and λ → ∞ the rule is AdamW. Clip gradients before the step as with any
    optimizer; the window then holds clipped gradients.

    Args:
        params: parameters or groups; groups may differ in `lr` and `weight_decay`.
        lr: learning rate.
        window: rows `m` of `G`.
        damping: λ, in squared gradient units, or with `damping_mode="relative"` in mean eigenvalues of `GGᵀ/m`.
        damping_warmup: step t takes `λ(1 + damping_warmup/t)`: at first gradients all point the same way, and a small
            λ would hold back just that.
        compression: `"topk"`, `"lowrank"` or `"none"` (dense rows).
        density: share of entries that a row keeps.
        selection: top-k of each `"block"`, or `"global"` over the whole model as first published.
        block_size: entries per block; `None` for the largest up to 2048 that pads the model by 5 % at most, or 256.
        rank: columns of the factors of each matrix with `compression="lowrank"`.
        system: one m×m system for the `"model"`, or one per `"layer"`, a block-diagonal curvature.
        precondition: `"compressed"`, `"gradient"` or `"momentum"`.
        scaling: `"none"`, `"rms"` and `"layer_rms"` fix the root mean square of the update, of the model or of each
            parameter, to `update_rms`; `"adam"` takes Adam's two moments of `u` (β₁ is `momentum`).
        momentum: heavy ball.
        cautious: leave out of a step what goes up the gradient, and make the rest √2 times as long.
        weight_decay: decoupled, as AdamW's.
        adam_beta2: decay of Adam's second moment.
        value_dtype, residual_dtype, moment_dtype: storage of rows, residual and moments.
        memory_budget: bytes (`"8GB"`) or `"adamw"`; picks window, density, block size and dtypes that fit.
        state_device: device that keeps all of these, such as `"cpu"`; gradient and update cross to it and back.
        shard_state: whether each rank of DDP keeps blocks of its own of all of these; `None`: where there are several.
        weight_rounding: of bfloat16 and float16 weights, `"stochastic"` or to the `"nearest"`, which loses small steps.

    Raises:
        ValueError, TypeError: an option is out of range or of the wrong kind, by name.
        NotImplementedError: parameters or combinations that cannot work, with what works instead.

    When not to use it: with damping far below the squared gradient and `scaling="none"` the published rule is as
    sensitive to `lr` as SGD.
    """

    options = (
        *WINDOW_OPTIONS,
        Option("damping", float, "λ added to the curvature's eigenvalues", low=0, low_open=True, source=_MFAC),
        Option(
            "damping_mode",
            str,
            "λ as it is, or in mean eigenvalues of GGᵀ/m",
            choices=("absolute", "relative"),
            source="this package",
        ),
        Option("damping_warmup", int, "step t takes λ·(1 + damping_warmup/t)", low=0, source="this package"),
    )

    cpu_state = ("inverse",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        window: int = 32,
        damping: float = 1.0,
        damping_mode: str = "relative",
        damping_warmup: int = 0,
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
        super().__init__(params, options)

    @property
    def _slides(self) -> bool:
        """Whether an inverse is kept between steps: worth it where a fresh factor is dear and λ stands still."""
        options = self.defaults
        fixed = options["damping_mode"] == "absolute" and not options["damping_warmup"]
        return options["window"] >= 128 and fixed and options["system"] == "model"

    def _shared_state(self, device: torch.device) -> dict[str, Tensor]:
        shared = super()._shared_state(device)
        if self._slides and device.type in ("cpu", "meta"):  # a model on meta is counted as it will be on the CPU
            window, damping = self.defaults["window"], self.defaults["damping"]
            shared["inverse"] = torch.eye(window, dtype=torch.float64, device=device) / (window * damping)
        return shared

    def _follow_gram(self, shared: dict[str, Tensor], row: Tensor, change: Tensor) -> None:
        if "inverse" in shared:
            SlidingInverse(shared["inverse"], self.defaults["damping"]).replace_row(row, change[0])

    def _solve(
        self, shared: dict[str, Tensor], gram: Tensor, row: Tensor, dots: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        rhs = torch.zeros_like(gram[:, 0]).index_fill_(1, row, float(gram.shape[-1])) if dots is None else dots
        damping = self._damping(mean_eigenvalue(gram), shared["step"] + 1)
        if "inverse" in shared:
            only = row if dots is None else None
            solution = SlidingInverse(shared["inverse"], self.defaults["damping"]).solve(gram[0], rhs[0], only)[None]
        else:
            solution = woodbury_solve(gram, rhs, damping)
        if self.defaults["scaling"] != "none":
            # λF⁻¹ instead of F⁻¹: moments mix the updates of many steps, whose λ differ while the window fills.
            return (solution * damping[:, None], None) if dots is None else (-solution, torch.ones_like(damping))
        return (solution, None) if dots is None else (-solution / damping[:, None], 1 / damping)

    def _damping(self, mean_eigenvalues: Tensor, step: Tensor) -> Tensor:
        damping = torch.full_like(mean_eigenvalues, self.defaults["damping"])
        if self.defaults["damping_warmup"]:
            damping = damping * (1 + self.defaults["damping_warmup"] / step.to(damping.device))
        if self.defaults["damping_mode"] == "relative":
            # An empty window has no eigenvalue to be relative to; its gradient is zero, and so is the update,
            # as long as 1/λ is a finite float32.
            return (damping * mean_eigenvalues).clamp_min(1e-36)
        return damping

    def _condition(self, eigenvalues: Tensor) -> Tensor:
        m = eigenvalues.shape[-1]
        step = self.state[self._parameters()[0]]["step"].clamp_min(1)
        shift = m * self._damping(eigenvalues.mean(-1) / m, step)
        return (eigenvalues[..., -1] + shift) / (eigenvalues[..., 0] + shift)
