"""Optimizers by name: what `--optim`, `create_optimizer` and `hf-efcp explain` know of them."""

from __future__ import annotations

import inspect
import os
import runpy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hf_efcp.optim.options import Option, closest, refuse_unknown

_TRAINER = ("lr", "weight_decay")  # set by their own arguments everywhere, never among an optimizer's options


@dataclass(frozen=True)
class OptimizerSpec:
    """A registered optimizer.

    Args:
        name: what `--optim` takes.
        cls: the optimizer; its class attribute `options` lists its keyword arguments.
        summary: one line.
        paper: title and arXiv number.
        defaults: where they differ from the constructor's.
        fixed: options that make this name what it is; they cannot be set.
        without: options of the class that mean nothing under this name.
        presets: named sets of options, chosen by `preset=`.
        renames: option names that published commands print, and ours.
        takes_lr: whether `lr` may stand among the options, as published commands print it.
        needs_model: whether it is built over a module instead of parameters.
    """

    name: str
    cls: type[Optimizer]
    summary: str
    paper: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    renames: Mapping[str, str] = field(default_factory=dict)
    takes_lr: bool = False
    needs_model: bool = False

    def options(self) -> dict[str, tuple[Option, Any]]:
        """Each option that a user can set under this name, with its default here."""
        signature = inspect.signature(self.cls.__init__).parameters
        hidden = {*self.fixed, *self.without, *_TRAINER}
        usual = {name: self.defaults.get(name, parameter.default) for name, parameter in signature.items()}
        return {  # a pair in the signature, as (None, None), is one word here
            option.name: (option, option.check(value) if isinstance(value := usual[option.name], tuple) else value)
            for option in self.cls.options
            if option.name not in hidden
        }

    def resolve(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of the optimizer from a user's options, words of a command line included.

        Raises:
            ValueError: an unknown option (with the closest match), a value out of range, `lr` given twice.
            TypeError: a value of the wrong kind.
        """
        for theirs, ours in self.renames.items():
            if theirs in raw and ours in raw:
                raise ValueError(f"`{theirs}` is `{ours}` in `{self.name}`, and both are given.")
        raw = {self.renames.get(name, name): value for name, value in raw.items()}
        resolved = {**self.defaults, **self.fixed, **self._preset(raw.pop("preset", None))}
        known = self.options()
        extra = _TRAINER if self.takes_lr else ()
        for name in raw:
            if name in _TRAINER and name not in extra:
                raise ValueError(
                    f"`{name}` is given by its own argument (`{name}=` in code, "
                    f"`--{'learning_rate' if name == 'lr' else name}` on a command line), not among the options."
                )
            if name in self.fixed:
                raise ValueError(
                    f"`{name}` is {self.fixed[name]!r} in `{self.name}`; another optimizer of "
                    f"{self.cls.__name__} may have the one you want: {', '.join(_siblings(self))}."
                )
        refuse_unknown(f"`{self.name}`", raw, [*known, "preset", *extra])
        by_name = {option.name: option for option in self.cls.options}
        for name, value in raw.items():
            option = by_name[name]
            resolved[name] = option.parse(value) if isinstance(value, str) else option.check(value)
        return resolved

    def _preset(self, name: str | None) -> Mapping[str, Any]:
        if name in (None, "default"):
            return {}
        if name not in self.presets:
            names = ["default", *self.presets]
            raise ValueError(
                f"`preset` of `{self.name}` must be one of {', '.join(names)}, got {name!r}.{closest(name, names)}"
            )
        return self.presets[name]


_SPECS: dict[str, OptimizerSpec] = {}
_LISTENERS: list[Callable[[OptimizerSpec], None]] = []


def register(spec: OptimizerSpec) -> None:
    """Add an optimizer. Raises `ValueError` where the name is taken."""
    if spec.name in _SPECS:
        raise ValueError(f"An optimizer `{spec.name}` is registered already.")
    _SPECS[spec.name] = spec

    for listener in _LISTENERS:
        listener(spec)


def on_register(listener: Callable[[OptimizerSpec], None]) -> None:
    """Have `listener` called with each optimizer that is registered from now on."""
    _LISTENERS.append(listener)


def load_optimizers(path: str) -> list[str]:
    """Run a Python file that registers optimizers of its own; their names.

    Raises:
        ValueError: there is no such file, it fails, or it registers nothing.
    """
    before = set(_SPECS)
    if not os.path.isfile(path):
        raise ValueError(f"No file {path!r} to take optimizers from.")
    try:
        runpy.run_path(path, run_name=f"hf_efcp_optimizers.{os.path.splitext(os.path.basename(path))[0]}")
    except Exception as error:
        raise ValueError(f"{path} failed: {type(error).__name__}: {error}") from error
    if not (added := [name for name in _SPECS if name not in before]):
        raise ValueError(f"{path} registers no optimizer. It should end with `register(OptimizerSpec(...))`.")
    return added


def list_optimizers() -> list[str]:
    """The names that `--optim` and `create_optimizer` take."""
    return list(_SPECS)


def get_spec(name: str) -> OptimizerSpec:
    """The registered optimizer. Raises `ValueError` with the closest match."""
    if name not in _SPECS:
        raise ValueError(f"No optimizer `{name}`.{closest(name, _SPECS)} Registered: {', '.join(_SPECS)}.")
    return _SPECS[name]


def create_optimizer(
    name: str, model_or_params: nn.Module | Iterable[Any], lr: float, *, weight_decay: float = 0.0, **options: Any
) -> Optimizer:
    """Build an optimizer by name.

    Args:
        name: one of `list_optimizers()`.
        model_or_params: a module, whose trainable parameters are taken, or parameters or groups.
        lr: learning rate.
        weight_decay: decoupled weight decay of groups that set none.
        **options: as `hf-efcp explain NAME` lists them; strings are read as on a command line.

    Raises:
        ValueError, TypeError: a name, option or value that does not exist or fit.
    """
    spec = get_spec(name)
    resolved = {"lr": lr, "weight_decay": weight_decay, **spec.resolve(options)}
    if isinstance(model_or_params, nn.Module) and not spec.needs_model:
        model_or_params = [p for p in model_or_params.parameters() if p.requires_grad]
    return spec.cls(model_or_params, **resolved)


def _siblings(spec: OptimizerSpec) -> list[str]:
    return [other.name for other in _SPECS.values() if other.cls is spec.cls and other.name != spec.name]
