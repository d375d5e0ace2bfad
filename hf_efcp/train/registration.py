"""Every registered optimizer as a value of `--optim`, for any script that uses transformers' Trainer.

transformers has no public door for this. Two private names are extended: the members of `OptimizerNames`, from
which argument parsers take the choices of `--optim`, and `trainer_optimizer._OPTIMIZER_HANDLERS`, from which Trainer
takes what to build. Besides, `--optim_args` learns JSON, `DEFAULT_CALLBACKS` the callback that logs metrics, and
Trainer's methods that save and load an optimizer what `hf_efcp.train.checkpoints` says.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, cast

import transformers
from torch import nn
from torch.optim import Optimizer

from hf_efcp.optim.optim_args import parse_optim_args
from hf_efcp.optim.registry import OptimizerSpec, get_spec, list_optimizers, on_register
from hf_efcp.train.callbacks import EfcpCallback, EfcpMetricsCallback
from hf_efcp.train.checkpoints import wrap_saving_and_loading

DEFAULT_LEARNING_RATE = 5e-5  # of TrainingArguments: where `--learning_rate` has it, nobody chose it


def register_optimizers() -> None:
    """Make every registered optimizer known to transformers, and those that are registered later.

    Raises:
        RuntimeError: this version of transformers keeps the names that are extended elsewhere.
    """
    names_enum, handlers, modules, callbacks = _seams()

    def add(spec: OptimizerSpec) -> None:
        _add_member(names_enum, spec.name)
        handlers[spec.name] = _handler(spec)

    for name in list_optimizers():
        add(get_spec(name))
    on_register(add)
    for module in modules:
        module._parse_optim_args = parse_optim_args
    if EfcpCallback not in callbacks:
        callbacks.append(EfcpCallback)
    wrap_saving_and_loading(transformers.Trainer)


def optim_choices() -> list[str]:
    """Every value that `--optim` takes, those of transformers too. Raises `RuntimeError` as `register_optimizers`."""
    names_enum, *_ = _seams()
    return [member.value for member in names_enum]


def log_diagnostics() -> None:
    """Let every Trainer that is made from now on log `optimizer.diagnostics()`, see `EfcpMetricsCallback`.

    Raises:
        RuntimeError: as `register_optimizers`.
    """
    *_, callbacks = _seams()
    if EfcpMetricsCallback not in callbacks:
        callbacks.append(EfcpMetricsCallback)


def record_runs(path: str) -> None:
    """Let every Trainer that is made from now on write its log and cost to `path`, see `RunRecorder`.

    Raises:
        RuntimeError: as `register_optimizers`.
    """
    from hf_efcp.train.recorder import RunRecorder

    *_, callbacks = _seams()
    callbacks.append(RunRecorder(path))


def _seams() -> tuple[type[Enum], dict[str, Callable], list[Any], list[Any]]:
    try:
        from transformers import trainer, trainer_optimizer
        from transformers.training_args import OptimizerNames

        handlers, callbacks = trainer_optimizer._OPTIMIZER_HANDLERS, trainer.DEFAULT_CALLBACKS
        modules = [module for module in (trainer, trainer_optimizer) if module._parse_optim_args]
        files = trainer.Trainer._save_optimizer_and_scheduler, trainer.Trainer._load_optimizer_and_scheduler
        maps = OptimizerNames._member_names_, OptimizerNames._member_map_, OptimizerNames._value2member_map_
        if not isinstance(handlers, dict) or not isinstance(callbacks, list) or not all((*maps, *files)):
            raise TypeError("they are of another kind")
    except (ImportError, AttributeError, TypeError) as error:
        raise RuntimeError(
            f"hf_efcp cannot register its optimizers with transformers {transformers.__version__}: the names it "
            f"extends have moved ({error}). Use transformers 5.23, or build the optimizer in code: "
            "Trainer(optimizer_cls_and_kwargs=(hf_efcp.optim.MFAC, {'lr': …}))."
        ) from error
    return OptimizerNames, handlers, modules, callbacks


def _add_member(names: type[Enum], value: str) -> None:
    if value in names._value2member_map_:
        return
    # `MFAC` and `mfac` are two optimizers; members are looked up by value, so the attribute takes the value's case.
    member: Any = str.__new__(cast("type[str]", names), value)
    member._name_, member._value_, member.__objclass__ = value, value, names
    member._sort_order_ = len(names._member_names_)
    # `training_args.bin` goes to the Hub with the model and must load where this package is not installed.
    member.__reduce_ex__ = lambda protocol: (str, (value,))
    names._member_names_.append(value)
    names._member_map_[value] = member
    names._value2member_map_[value] = member
    type.__setattr__(names, value, member)


def _handler(spec: OptimizerSpec) -> Callable[[Any], tuple[Any, dict[str, Any]]]:
    def handler(context: Any) -> tuple[Any, dict[str, Any]]:
        """What Trainer builds: a class over its decay and no-decay groups, or a factory over the model."""
        args = context.args
        if args.optim_target_modules is not None:
            raise ValueError(f"`{spec.name}` does not use `optim_target_modules`; freeze what it should not train.")
        options = resolve_for_trainer(spec, args.learning_rate, context.optim_args)
        if spec.needs_model:
            return (lambda: _ModelFactory(spec.cls, args.weight_decay)), options
        return spec.cls, options

    return handler


def resolve_for_trainer(spec: OptimizerSpec, learning_rate: float, raw: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the optimizer, `lr` included, from Trainer's arguments.

    Raises:
        ValueError, TypeError: as `OptimizerSpec.resolve`; and two learning rates, or a `weight_decay` among options.
    """
    options = spec.resolve(raw)
    if "weight_decay" in options:
        raise ValueError("`weight_decay` is given by `--weight_decay`, not in `optim_args`: Trainer sets it per group.")
    given = options.setdefault("lr", learning_rate)
    if given != learning_rate and learning_rate != DEFAULT_LEARNING_RATE:
        raise ValueError(
            f"`--learning_rate {learning_rate:g}` and `lr` = {given:g} in `optim_args` contradict each other; give one."
        )
    return options


class _ModelFactory:
    """Builds an optimizer over a module, with the groups that Trainer makes for one over parameters."""

    def __init__(self, cls: type[Optimizer], weight_decay: float):
        self.cls, self.weight_decay = cls, weight_decay

    def __call__(self, model: nn.Module, **options: Any) -> Optimizer:
        from transformers import Trainer

        decayed = set(Trainer.get_decay_parameter_names(None, model))  # pyright: ignore[reportArgumentType]
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in trained if name in decayed], "weight_decay": self.weight_decay},
            {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
        ]
        return self.cls(model, params=groups, **options)  # pyright: ignore[reportCallIssue]
