"""SINGD: natural gradient with structured Kronecker factors and no inverse."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hf_efcp.curvature.layer_statistics import Sums
from hf_efcp.curvature.layers import Layer
from hf_efcp.optim.adamw import adam_direction, adam_state, can_fuse, fused_step_
from hf_efcp.optim.apply import move_
from hf_efcp.optim.options import check_options
from hf_efcp.optim.singd_batches import refresh_together
from hf_efcp.optim.singd_layers import SingdLayers
from hf_efcp.optim.singd_options import SINGD_OPTIONS
from hf_efcp.optim.singd_state import clip_scale, factors_for_statistics, finite_layers, new_factors

logger = logging.getLogger(__name__)


class SINGD(SingdLayers):
    """Steps along `CCᵀ G KKᵀ`, where `(KKᵀ) ⊗ (CCᵀ)` learns the inverse curvature (arXiv 2312.05705).

    Each `nn.Linear`, `nn.Conv1d` to `nn.Conv3d` and transformers' `Conv1D` has a factor K over its inputs (bias
    included) and C over its outputs; all other parameters, and those of a layer that is never called, are AdamW's, in
    this same optimizer: `explain_parameters()` says which and why. The keywords are those of the singd package. What
    differs: weight decay is decoupled, factors are float32 in a bfloat16 model, statistics are sums over all backward
    passes of a step, tokens without a gradient count nowhere, each group of a convolution counts for itself.

        m ← momentum·m + CCᵀ G KKᵀ,   p ← p(1 − lr·weight_decay) − lr·m

    `scaling="layer_rms"` gives a layer's m a fixed root mean square; `"adam"` steps along Adam's two moments of
    `CCᵀ G KKᵀ` instead (`beta1`, `beta2`, `eps`; `momentum` is not used). With either AdamW's learning rates fit.

    fp16: the loss is scaled when statistics are taken, so call `use_scaler(scaler)`; hf_efcp's callback does it under
    Trainer. Clipping raw gradients shortens the step and not the curvature: prefer `max_update_norm` or `kl_clip`.

    Args:
        model: whose layers are watched, wrapped (DDP) or not.
        lr: learning rate.
        momentum: α₂.
        damping: λ.
        alpha1: α₁, Riemannian momentum; with `kfac_like` there is none.
        weight_decay: decoupled, as AdamW's.
        T: steps between updates of the factors; a step left out does not count.
        loss_average: `"batch"`: the loss is a mean over samples; `"batch+sequence"`: over tokens, counted as those
            with a gradient, or as `set_loss_terms` says; `None`: a sum.
        lr_cov: β₁, or a function of the steps taken; a checkpoint holds its last value alone.
        structures: of K and C: `dense`, `diagonal`, `block30diagonal`, `hierarchical15_15`, `triltoeplitz`, ….
        kfac_approx: `"expand"` or `"reduce"`, for weights used at many tokens or positions.
        kfac_like: IKFAC.
        preconditioner_dtype: of K and C; `None` is float32. Updates of 1 % stall in bfloat16.
        normalize_lr_cov: divide `lr_cov` by the direction's largest entry.
        damping_mode: `"relative"`: U and V are measured in units of their mean eigenvalues, and λ with them.
        limit_lr_cov: divide `lr_cov` by the direction's spectral radius, where above 1.
        warm_steps: first steps that all update the factors, the n-th with `lr_cov` of at least 1/n, the first of 1/2.
        lr_cov_warmup: updates over which `lr_cov` rises.
        warm_start: start at the scale of the first statistics, where the published rule starts at I and grows.
        max_growth: bound on `τ(KKᵀ)·τ(CCᵀ)`.
        scaling, rms: see above.
        max_update_norm, kl_clip: clip the preconditioned gradient.
        max_dense_dim: dense factors wider than this, as a vocabulary's, are diagonal.
        cache_metrics: keep KKᵀ and CCᵀ of dense, hierarchical and block-diagonal factors.
        fallback_lr: AdamW's rate while `lr` is at its first value; follows `lr`'s schedule.
        moment_dtype: of Adam's moments; bfloat16 is rounded stochastically.
        beta1, beta2, eps: AdamW's.
        shard_state: whether each rank of DDP keeps and steps layers of its own; `None`: where there are several.
            Statistics are those of all ranks either way.
        weight_rounding: of 16-bit weights, `"stochastic"` or to the `"nearest"`.
        warn_unsupported: log what AdamW optimizes.
        init_grad_scale: of the loss, where no scaler is known.
        params: parameters or groups; all trainable ones by default. Weight and bias may be in different groups.

    Raises:
        ValueError, TypeError: an option is out of range or of the wrong kind, by name.

    When not to use it: with FSDP2, as a layer's factors need its whole gradient.
    """

    options = SINGD_OPTIONS

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        momentum: float = 0.9,
        damping: float = 1e-3,
        alpha1: float = 0.5,
        weight_decay: float = 0.0,
        T: int = 10,
        loss_average: str | None = "batch",
        lr_cov: float | Callable[[int], float] = 1e-2,
        structures: str | tuple[str, str] = ("dense", "dense"),
        kfac_approx: str = "expand",
        warn_unsupported: bool = False,
        kfac_like: bool = False,
        preconditioner_dtype: Any = (None, None),
        init_grad_scale: float = 1.0,
        normalize_lr_cov: bool = False,
        params: Iterable[Any] | None = None,
        *,
        damping_mode: str = "absolute",
        limit_lr_cov: bool = False,
        warm_steps: int = 0,
        lr_cov_warmup: int = 0,
        warm_start: bool = False,
        max_growth: float | None = None,
        scaling: str = "none",
        rms: float = 0.2,
        max_update_norm: float | None = None,
        kl_clip: float | None = None,
        max_dense_dim: int = 4096,
        cache_metrics: bool = True,
        fallback_lr: float | None = None,
        moment_dtype: str = "float32",
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        shard_state: bool | None = None,
        weight_rounding: str = "stochastic",
    ):
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        if not isinstance(model, nn.Module):
            raise TypeError(f"SINGD is built over a module, whose layers it watches, got {type(model).__name__}.")
        schedule = lr_cov if callable(lr_cov) else None
        given["lr_cov"] = schedule(0) if schedule else lr_cov
        super().__init__(model, params, check_options(self.options, given), schedule)

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return self._state_of(parameter, like=parameter)

    def _cost(self, parameter: Tensor) -> int:
        return sum(t.nbytes for t in self._state_of(parameter, like=parameter.detach().to("meta")).values())

    def _known_to_all(self, parameter: Tensor) -> list[str]:
        layer = self._layer_of(parameter)
        if layer is None or parameter is not layer.weight:
            return []
        return ["refreshes", *factors_for_statistics(layer)]

    def _state_of(self, parameter: Tensor, like: Tensor) -> dict[str, Tensor]:
        """New state of a parameter on the device of `like`."""
        layer = self._layer_of(parameter)
        state: dict[str, Tensor] = {}
        if layer is None or self.defaults["scaling"] == "adam" or "exp_avg" in self.state.get(parameter, {}):
            state.update(self._new_moments(like))
        elif self.param_groups[0]["momentum"]:
            dtype = torch.promote_types(torch.float32, like.dtype)
            state["momentum"] = torch.zeros(like.shape, dtype=dtype, device=like.device)
        if layer is not None and parameter is layer.weight:
            state.update(new_factors(layer, self.defaults, like.device), refreshes=self._zero(like))
        return state

    def _new_moments(self, parameter: Tensor) -> dict[str, Tensor]:
        dtype = getattr(torch, self.defaults["moment_dtype"])
        return {**adam_state(parameter, dtype), "adam_step": self._zero(parameter)}

    def _zero(self, parameter: Tensor) -> Tensor:
        return torch.zeros((), dtype=torch.int64, device=self._counting_device(parameter.device))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure` returns. A step whose gradients are not finite is left out.

        When the factors are due, the host reads whether the step counts; at all other steps it waits for nothing.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            if self._has_gradients():
                self.materialize_state()
                accept = self._acceptable()
                if not (self._reads(accept) or self._is_due()) or bool(accept):
                    with _in_full_precision(accept.device.type):
                        self._accepted_step(accept)
                    self._owners.share()
        finally:
            self._forget_statistics()
        return loss

    def _accepted_step(self, accept: Tensor) -> None:
        self._schedule_lr_cov()
        statistics = self._statistics()  # kept until the factors are done
        self._refresh(statistics)
        directions = self._directions()
        scale = clip_scale(directions, self.param_groups[0]["lr"], self.defaults, self._owners.group.sum_)
        if scale is not None:
            directions = {layer: [part * scale.to(part) for part in parts] for layer, parts in directions.items()}
        moved: dict[Tensor, Tensor | None] = {}
        adams: dict[Tensor, tuple[Tensor, Tensor]] = {}
        for layer, finite in finite_layers(directions, accept).items():
            parts = directions.pop(layer)
            if self.defaults["scaling"] != "adam":
                moved.update(self._momentum_of_layer(layer, parts, finite))
                continue
            is_lost = self._reads(finite) and not finite  # a direction that overflowed leaves its layer as it is
            for p, part in zip(layer.parameters, parts, strict=True):
                moved[p] = None
                if p.grad is not None and not is_lost:
                    adams[p] = part, finite
        stepped = [p for p in self._parameters() if p.grad is not None and p in self._owners]
        others = {p: (p.grad, accept) for p in stepped if p not in moved}
        for group in self.param_groups:
            params = [p for p in group["params"] if moved.get(p) is not None]
            move_(params, [moved[p] for p in params], group, accept, self._count(params))
            self._step_adam(adams, group, group["lr"], accept)
            self._step_adam(others, group, group["lr"] * self._fallback_ratio(), accept)
        if stepped:
            torch._foreach_add_([self.state[p]["step"] for p in stepped], 1)
        self._count_step()

    def _refresh(self, statistics: Mapping[Layer, Sums]) -> None:
        """Update the factors of the layers with statistics, each by its owner."""
        mine = {self._pair(layer): sums for layer, sums in statistics.items() if layer.weight in self._owners}
        refresh_together(mine, self._loss_terms)
        for layer in statistics:
            self.state[layer.weight]["refreshes"] += 1
        for pair in mine if self._is_divided else ():
            pair.wait()
        self._share_factors(statistics)

    def _directions(self) -> dict[Layer, list[Tensor]]:
        """What the gradients of this rank's layers are preconditioned to."""
        directions = {}
        for layer, pair in [(layer, self._pair(layer)) for layer in self._own_layers()]:
            if layer.weight.grad is not None and pair.has_statistics:
                directions[layer] = pair.directions()
            pair.wait()
        return directions

    def _momentum_of_layer(self, layer: Layer, parts: list[Tensor], finite: Tensor) -> dict[Tensor, Tensor]:
        """Momentum and length of a layer's step; one whose direction overflowed stays, but for its decay."""
        is_lost = self._reads(finite) and not finite
        factor = self.param_groups[0]["momentum"]  # OneCycleLR writes it there
        updates = {}
        for p, part in zip(layer.parameters, parts, strict=True):
            if p.grad is None:
                continue
            if self._reads(finite):
                part = torch.zeros_like(part) if is_lost else part
            else:
                part = torch.where(finite, part, 0)
            buffer = self.state[p].get("momentum")
            if buffer is not None and not is_lost:
                moved = buffer * factor + part
                buffer.copy_(torch.where(finite, moved, buffer))
                part = torch.where(finite, moved, 0)
            updates[p] = part
        if self.defaults["scaling"] == "layer_rms":
            norm = torch.stack([torch.linalg.vector_norm(part) for part in updates.values()]).norm()
            length = self.defaults["rms"] * sum(part.numel() for part in updates.values()) ** 0.5
            scale = torch.where(norm > 0, length / norm, 0)
            updates = {p: part * scale for p, part in updates.items()}
        return updates

    def _step_adam(
        self, gradients: dict[Tensor, tuple[Tensor, Tensor]], group: dict[str, Any], lr: float, accept: Tensor
    ) -> None:
        """AdamW's step of a group's parameters among `gradients`, each with () bool whether it counts."""
        rules = {"betas": (self.defaults["beta1"], self.defaults["beta2"]), "eps": self.defaults["eps"]}
        params = [p for p in group["params"] if p in gradients]
        if not params:
            return
        for p in params:
            if "exp_avg" not in self.state[p]:
                logger.warning("A layer of shape %s has a gradient and never ran: AdamW optimizes it.", tuple(p.shape))
                self.state[p].update(self._new_moments(p))
        torch._foreach_add_([self.state[p]["adam_step"] for p in params], 1)
        fused = [p for p in params if self._reads(accept) and can_fuse(p, self.state[p])]
        if fused:
            parts, states = [gradients[p][0] for p in fused], [self.state[p] for p in fused]
            fused_step_(fused, parts, states, lr=lr, weight_decay=group["weight_decay"], **rules)
        single, updates = [p for p in params if len(fused) < len(params) and p not in set(fused)], []
        for p in single:
            # The count is the host's: filled in, not copied, for which the host would wait.
            count = torch.full((), int(self.state[p]["adam_step"]), dtype=torch.int64, device=p.device)
            updates.append(adam_direction(self.state[p], gradients[p][0], count, gradients[p][1].to(p.device), **rules))
        move_(single, updates, group, accept, self._count(single), lr=lr)

    def _count(self, params: list[Tensor]) -> int:
        """Steps that the first of the parameters has taken, on the host: what the rounding of weights is drawn by."""
        return int(self.state[params[0]]["step"]) if params else 0


def _in_full_precision(device_type: str) -> AbstractContextManager:
    """A step inside of autocast would multiply in 16 bits."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
