"""How SINGD is tied to a model: its layers, their hooks, the loss scale, and when statistics are due."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_efcp.curvature.layer_statistics import Collector, Sums
from hf_efcp.curvature.layers import Layer, Plan, find_layers
from hf_efcp.curvature.structures import DenseMetric, Diagonal, Structure
from hf_efcp.optim.parameterwise import ParameterwiseOptimizer
from hf_efcp.optim.singd_ranks import summed_over_ranks
from hf_efcp.optim.singd_state import FactorPair, factor_name, factors_for_statistics, stores_metric_alone
from hf_efcp.parallel import Group, world

logger = logging.getLogger(__name__)

# Options that layers or hooks depend on.
_PLANNING = (
    *("structures", "max_dense_dim", "kfac_approx", "loss_average"),
    *("kfac_like", "alpha1", "normalize_lr_cov"),
)


class SingdLayers(ParameterwiseOptimizer):
    """A `ParameterwiseOptimizer` over a module, with hooks on its layers.

    Layers belong to parameters, never to addresses of memory. The plan follows the options, which loading may change.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None,
        defaults: dict[str, Any],
        lr_cov: Callable[[int], float] | None = None,
    ):
        self._model, self._lr_cov_of_step = model, lr_cov
        self._start()
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
        super().__init__(params, defaults)
        self._is_built = True
        self._planned()
        if self.defaults["warn_unsupported"]:
            for name, treatment in self.explain_parameters().items():
                if treatment.startswith("AdamW"):
                    logger.warning("%s: %s", name, treatment)
        if self.defaults["kfac_like"] and self.defaults["alpha1"]:
            logger.info("IKFAC has no momentum of directions: alpha1 = %s is not used.", self.defaults["alpha1"])

    def _start(self) -> None:
        self._is_built = False  # groups are added one by one in the constructor
        self._plan, self._collector, self._plan_key, self._scaler = Plan(), None, None, None
        self._of_parameter: dict[Tensor, Layer] = {}
        self._pairs: dict[Layer, FactorPair] = {}
        self._forget()

    def _forget(self) -> None:
        self._loss_terms: Tensor | float | None = None
        self._restart()

    def _restart(self) -> None:
        """Drop what was summed: its gradients have been dropped too."""
        self._known_scale: float | None = None
        if self._collector is not None:
            self._collector.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients and what the hooks have summed with them."""
        super().zero_grad(set_to_none)
        self._restart()

    def use_scaler(self, scaler: Any) -> None:
        """Tell which `GradScaler` scales the loss; statistics, taken before `unscale_`, are divided by its scale."""
        self._scaler = scaler

    def set_loss_terms(self, count: Tensor | float) -> None:
        """Of how many terms this step's loss is the mean, over all its micro-batches (`num_items_in_batch`).

        Holds until the next step. Without it each layer counts samples, or tokens with a gradient.
        """
        self._loss_terms = count

    def close(self) -> None:
        """Take the hooks off the model. Factors stay as they are from then on."""
        if self._collector is not None:
            self._collector.detach()

    def explain_parameters(self) -> dict[str, str]:
        """What becomes of each parameter of the model, by name, and why."""
        trained, told = set(self._parameters()), {}
        self._planned()
        for name, p in self._model.named_parameters():
            layer = self._layer_of(p)
            if p not in trained:
                told[name] = "not trained"
            elif layer is None:
                told[name] = f"AdamW: {self._plan.reasons.get(name, 'in no layer')}"
            else:
                inputs, outputs = (self._describe(*side) for side in self._sides(layer))
                joint = "" if p is layer.weight else f", with {layer.name}.weight"
                told[name] = f"SINGD: inputs {inputs}, outputs {outputs}{joint}"
        return told

    def _sides(self, layer: Layer) -> Iterable[tuple[Structure, str]]:
        """Each factor's structure, and the one that was asked for."""
        return zip((layer.inputs, layer.outputs), self.defaults["structures"].split("+"), strict=True)

    def _describe(self, structure: Structure, asked: str) -> str:
        if asked == "dense" and isinstance(structure, Diagonal):
            return f"diagonal ({structure.dim}, above max_dense_dim)"
        return f"{asked} ({structure.dim})"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `EfcpOptimizer.add_param_group`; a layer that changes size by it starts its factors anew."""
        super().add_param_group(param_group)
        self._planned()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `EfcpOptimizer.load_state_dict`."""
        try:
            super().load_state_dict(state_dict)
        finally:
            self._planned()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_model": self._model, "_lr_cov_of_step": self._lr_cov_of_step}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_model" in state:
            self._start()
            self._is_built = True
            self._planned()

    def metrics(self) -> dict[str, float]:
        """See `EfcpOptimizer.metrics`; besides, `singd_growth`, the largest `τ(KKᵀ)·τ(CCᵀ)` of a layer."""
        figures = super().metrics()
        if self.state and self._layers():
            growth = [float(self._pair(layer).growth()) for layer in self._own_layers()]
            largest = torch.tensor([max(growth, default=0.0)], dtype=torch.float64)
            figures["singd_growth"] = max(map(float, self._owners.group.gather(largest)))
        return figures

    def _planned(self) -> None:
        """Make layers and hooks those of today's options and parameters."""
        if not self._is_built:
            return
        key = (*(self.defaults[name] for name in _PLANNING), *map(id, self._parameters()))
        if key == self._plan_key:
            return
        self._plan_key = key
        self.close()
        structures = tuple(self.defaults["structures"].split("+"))
        trained = set(self._parameters())
        self._plan = find_layers(self._model, trained, structures, self.defaults["max_dense_dim"])
        self._of_parameter = {p: layer for layer in self._plan.layers for p in layer.parameters}
        self._pairs.clear()
        for layer in self._plan.layers:
            layer.inputs, layer.outputs = (
                DenseMetric(s.dim) if stores_metric_alone(s, self.defaults) else s
                for s in (layer.inputs, layer.outputs)
            )
            state, name = self.state.get(layer.weight, {}), factor_name("input", layer.inputs)
            if name in state and state[name].numel() != layer.inputs.numel:
                for name in [n for n in state if n.startswith(("input_", "output_")) or n == "refreshes"]:
                    del state[name]
        self._collector = Collector(
            self._plan.layers,
            approx=self.defaults["kfac_approx"],
            count=self.defaults["loss_average"] or "batch",
            is_due=self._is_due,
            check=self._check_forward,
            factors=self._factors,
            scale=self._loss_scale,
            restart=self._restart,
        )

    def _adopt_state(self) -> None:
        self._planned()
        self._refuse_strangers()
        super()._adopt_state()

    def _refuse_strangers(self) -> None:
        """Raise where no parameter is the model's: something has put others in the place of all of them."""
        params, ours = self._parameters(), set(self._model.parameters())
        if ours and not any(p in ours for p in params):
            raise NotImplementedError(
                f"{type(self).__name__} follows the layers of its model, and none of its parameters is in the groups: "
                f"parameter 0 there has shape {tuple(params[0].shape)}. DeepSpeed ZeRO puts flat partitions in their "
                "place: use DDP, or efcp_mfac or efcp_ggt with FSDP2."
            )

    def _units(self, params: Sequence[Tensor]) -> list[list[Tensor]]:
        """A layer's weight and bias have one owner."""
        trained = set(params)
        layers = [[p for p in layer.parameters if p in trained] for layer in self._layers()]
        return [*layers, *([p] for p in params if self._layer_of(p) is None)]

    def _pair(self, layer: Layer) -> FactorPair:
        state, pair = self.state[layer.weight], self._pairs.get(layer)
        if pair is None or not pair.is_of(state, self.defaults):
            pair = self._pairs[layer] = FactorPair(layer, state, self.defaults)
        return pair

    def _own_layers(self) -> list[Layer]:
        """Those that this rank keeps and steps."""
        return [layer for layer in self._layers() if layer.weight in self._owners]

    @property
    def _ranks(self) -> Group:
        return world()  # statistics are of all, whoever keeps the factors

    def _shared_state(self, device: torch.device) -> dict[str, Tensor]:
        where = self._counting_device(device)
        shared = {**super()._shared_state(device), "steps": torch.zeros((), dtype=torch.int64, device=where)}
        if self.defaults["fallback_lr"] is not None:
            # A scheduler scales `lr`; which part of it is the first value is known now and must be saved.
            first = self.param_groups[0].get("initial_lr", self.defaults["lr"])
            ratio = self.defaults["fallback_lr"] / first if first else 0.0
            shared["fallback_ratio"] = torch.tensor(ratio, dtype=torch.float64, device=where)
        return shared

    def _layers(self) -> list[Layer]:
        return self._plan.layers

    def _layer_of(self, parameter: Tensor) -> Layer | None:
        return self._of_parameter.get(parameter)

    def _shared(self) -> dict[str, Tensor]:
        return self.state.get(self._parameters()[0], {})

    def _fallback_ratio(self) -> float:
        ratio = self._shared().get("fallback_ratio")
        return 1.0 if ratio is None else float(ratio)

    def _is_due(self, layer: Layer | None = None) -> bool:
        """Whether this step updates factors; those of a layer that has never run are due whenever it runs first."""
        shared = self._shared()
        if "steps" not in shared:
            return True
        steps = int(shared["steps"])
        if steps < self.defaults["warm_steps"] or steps % self.defaults["T"] == 0:
            return True
        return layer is not None and int(self.state[layer.weight]["refreshes"]) == 0

    def _count_step(self) -> None:
        self._shared()["steps"] += 1

    def _schedule_lr_cov(self) -> None:
        """Where `lr_cov` is a function, have its value of today among the options."""
        if self._lr_cov_of_step is None:
            return
        (option,) = (option for option in self.options if option.name == "lr_cov")
        self.defaults["lr_cov"] = option.check(self._lr_cov_of_step(int(self._shared()["steps"])))
        for group in self.param_groups:
            group["lr_cov"] = self.defaults["lr_cov"]

    def _factors(self, layer: Layer) -> tuple[Tensor, Tensor] | None:
        state = self.state.get(layer.weight, {})
        if "refreshes" not in state:
            return None
        names = factor_name("input", layer.inputs), factor_name("output", layer.outputs)
        elsewhere = torch.empty(0, dtype=torch.promote_types(torch.float32, layer.weight.dtype))  # and not needed here
        return state.get(names[0], elsewhere), state.get(names[1], elsewhere)

    def _statistics(self) -> dict[Layer, Sums]:
        """Of the layers whose factors are due, over the batch of all ranks."""
        if self._ranks.size > 1 and not (self._is_due() or any(self._is_due(layer) for layer in self._layers())):
            return {}  # all ranks know that without asking
        return summed_over_ranks(self._ranks, {layer: self._collector.sums(layer) for layer in self._layers()})

    def _share_factors(self, layers: Iterable[Layer]) -> None:
        """Let all ranks have the new factors through which they pass their rows."""
        names = [(layer.weight, name) for layer in layers for name in factors_for_statistics(layer)]
        if names and self._is_divided:
            weights = [weight for weight, _ in names]
            self._owners.share_tensors([self.state[weight][name] for weight, name in names], weights)

    def _forget_statistics(self) -> None:
        self._forget()

    def _loss_scale(self) -> float:
        if self._known_scale is None:
            is_known = self._scaler is not None and self._scaler.is_enabled()
            self._known_scale = self._scaler.get_scale() if is_known else self.defaults["init_grad_scale"]
        return self._known_scale

    def _check_forward(self, device_type: str) -> None:
        is_fp16 = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) is torch.float16
        if is_fp16 and self._scaler is None and self.defaults["init_grad_scale"] == 1:
            raise RuntimeError(
                "Under fp16 autocast SINGD must know what scales the loss: call optimizer.use_scaler(scaler), or set "
                "init_grad_scale where the scale is a constant other than 1."
            )
