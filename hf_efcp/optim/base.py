"""What every optimizer of this package does alike: checks, loading, accounting."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_efcp.optim.options import Option
from hf_efcp.parallel import local_part

logger = logging.getLogger(__name__)


class EfcpOptimizer(Optimizer):
    """`torch.optim.Optimizer` with the state contract of this package.

    - State is made at the first step, for every parameter, and is tensors under word keys alone.
    - `load_state_dict` keeps the dtypes of the saved state. torch casts every state tensor, integer indices
      included, to the parameter's dtype (pytorch/pytorch#43706), and accelerate loads at every `prepare`.
    - `metrics()` and `skipped_steps` read the device; call them when you log, not at each step.
    """

    options: tuple[Option, ...] = ()
    cpu_state: tuple[str, ...] = ()  # state that only an optimizer on the CPU keeps; on meta it is there too
    _whole: dict[Tensor, dict[str, Tensor]] | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it may have its own `lr` and `weight_decay`, the other options are the optimizer's."""
        for name in param_group.keys() - {"params", "param_names", "initial_lr", *self.defaults}:
            raise ValueError(f"{type(self).__name__} has no option `{name}` for a parameter group.")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except Exception:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in self.defaults.keys() - {"lr", "weight_decay"}:
            if group[name] != self.defaults[name]:
                raise ValueError(
                    f"`{name}` is one setting for the whole optimizer ({self.defaults[name]!r}); a parameter group "
                    f"asks for {group[name]!r}. Groups may differ in `lr` and `weight_decay`."
                )
        for option in self.options:
            if option.name in group:
                group[option.name] = option.check(group[option.name])
        for parameter in group["params"]:
            if not parameter.is_floating_point():
                raise TypeError(
                    f"{type(self).__name__} optimizes real floating point parameters, got {parameter.dtype}."
                )

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _state_device(self, parameter: Tensor) -> torch.device:
        return parameter.device

    def _adopt_state(self) -> None:
        """Make the tensors in `self.state` this optimizer's own; called after loading, when they may be another's.

        They may lie on any device, and be the whole of what several ranks share.
        """
        raise NotImplementedError

    @property
    def _is_divided(self) -> bool:
        """Whether `self.state` holds only a part, and the other ranks the rest."""
        return False

    def _join_state(self, keeps: bool) -> dict[Tensor, dict[str, Tensor]] | None:
        """The state of all ranks, which all call it, on the CPU of those that keep it."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The state of all ranks, whatever their number, as a single process would save it.

        Where ranks hold parts of it (`shard_state`), all of them must call it, or enter `whole_state` before.
        """
        state_dict = super().state_dict()
        if self._is_divided:
            whole = self._whole or self._join_state(keeps=True)
            numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
            state_dict["state"] = {n: whole[p] for n, p in zip(numbers, self._parameters(), strict=True)}  # pyright: ignore[reportOptionalSubscript]
        return state_dict

    @contextlib.contextmanager
    def whole_state(self, keeps: bool = True) -> Iterator[None]:
        """Within it `state_dict()` needs no other rank: for a trainer whose rank 0 alone saves. All ranks enter.

        Args:
            keeps: whether this rank will ask for it; the others need no memory for it.
        """
        self._whole = self._join_state(keeps) if self._is_divided else None
        try:
            yield
        finally:
            self._whole = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that `state_dict()` made, every tensor in its saved dtype, on its parameter's device.

        The caller's dict is left as it was. Options of the saved state replace this optimizer's.

        Raises:
            ValueError: the groups differ in number or size, or the state is another optimizer's.
        """
        saved_groups = state_dict["param_groups"]
        ours = [len(group["params"]) for group in self.param_groups]
        theirs = [len(group["params"]) for group in saved_groups]
        if ours != theirs:
            raise ValueError(
                f"The saved state has parameter groups of {theirs} tensors, this optimizer has {ours}. Build it over "
                "the same model with the same decay and no-decay groups, frozen layers included."
            )
        for number, group in enumerate(saved_groups):
            missing = sorted(self.defaults.keys() - group.keys())
            if missing:
                raise ValueError(
                    f"The saved state is not one of {type(self).__name__}: its group {number} lacks "
                    f"{', '.join(f'`{name}`' for name in missing)}."
                )
        self._tell_replaced_options(saved_groups[0])
        before = self.state, self.param_groups, dict(self.defaults)
        try:
            self._load(state_dict)
        except Exception:
            self.state, self.param_groups, self.defaults = before
            raise

    def _load(self, state_dict: dict[str, Any]) -> None:
        saved_groups = state_dict["param_groups"]
        super().load_state_dict({**state_dict, "state": {}})
        saved_ids = chain.from_iterable(group["params"] for group in saved_groups)
        for saved, parameter in zip(saved_ids, self._parameters(), strict=True):
            if saved in state_dict["state"]:
                state = state_dict["state"][saved]
                self.state[parameter] = {
                    name: value.detach() if isinstance(value, Tensor) else value for name, value in state.items()
                }
        self.defaults.update({n: self.param_groups[0][n] for n in self.defaults.keys() - {"lr", "weight_decay"}})
        if self.state:  # accelerate loads the empty state of a new optimizer
            self._adopt_state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it to the defaults and not to the groups

    def _tell_replaced_options(self, saved: dict[str, Any]) -> None:
        for name in sorted(self.defaults.keys() - {"lr", "weight_decay"}):
            if saved[name] != self.defaults[name]:
                logger.warning("`%s` is %r in the saved state; it replaces %r.", name, saved[name], self.defaults[name])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure` returns. A step whose gradients are not finite is left out."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._has_gradients():
            self._take_step()
        return loss

    def _take_step(self) -> None:
        """What a step does where there is a gradient."""
        raise NotImplementedError

    def _has_gradients(self) -> bool:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise NotImplementedError(
                f"{type(self).__name__}.step() cannot be captured in a CUDA graph: learning rates and the schedule of "
                "updates are the host's. Capture forward and backward passes, and step outside of the graph."
            )
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        if any(gradient.is_sparse for gradient in gradients):
            raise NotImplementedError(
                f"{type(self).__name__} needs dense gradients; build the embedding with sparse=False."
            )
        return bool(gradients)

    def _reads(self, flag: Tensor) -> bool:
        """Whether the host may branch on a flag of the device: elsewhere it would wait, and masks do the work."""
        return flag.device.type == "cpu"

    @staticmethod
    def _counting_device(device: torch.device) -> torch.device:
        """Where numbers live that the host counts with, next to state on `device`."""
        return device if device.type == "meta" else torch.device("cpu")

    def materialize_state(self) -> None:
        """Make the state that the first step would make. On the meta device it takes no memory, but counts."""
        raise NotImplementedError(f"{type(self).__name__} makes its state at the first step only.")

    def state_bytes(self) -> int:
        """Bytes of all tensors that live between steps on this rank, each storage counted once."""
        storages = {}
        for value in _tensors(self.state.values()):
            storage = local_part(value).untyped_storage()
            storages[storage._cdata] = storage.nbytes()  # the address of its data is 0 on the meta device
        return sum(storages.values())

    @property
    def skipped_steps(self) -> int:
        """Steps left out because a gradient or an update was not finite. Waits for the device."""
        return sum(int(state["skipped"]) for state in self.state.values() if "skipped" in state)

    def metrics(self) -> dict[str, float]:
        """Figures worth logging, by name. Waits for the device."""
        n_parameters = sum(p.numel() for p in self._parameters())
        size = self.state_bytes()
        return {
            "state_bytes": float(size),
            "state_bytes_per_parameter": size / max(1, n_parameters),
            "skipped_steps": float(self.skipped_steps),
        }


def flat_parameters(params: Iterable[Any]) -> list[Tensor]:
    """The tensors in parameters, named parameters or groups of either, as `torch.optim` takes them."""
    found: list[Tensor] = []
    for item in params:
        if isinstance(item, dict):
            inner = item["params"]
            found += [inner] if isinstance(inner, Tensor) else flat_parameters(inner)
        else:
            found.append(item[1] if isinstance(item, tuple) else item)
    return found


def fill_(tensors: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    """Copy what is saved into the tensors of the same names; those that are not saved stay.

    Raises:
        ValueError: a saved shape is another.
    """
    for name, tensor in tensors.items():
        if name not in saved:
            continue
        if saved[name].shape != tensor.shape:
            raise ValueError(
                f"The saved `{name}` has shape {tuple(saved[name].shape)}; this model and these options need "
                f"{tuple(tensor.shape)}."
            )
        tensor.copy_(saved[name])


def _tensors(states: Iterable[dict[str, Any]]) -> Iterable[Tensor]:
    return (value for state in states for value in state.values() if isinstance(value, Tensor))
