"""The published rules of sparse training: what is pruned and grown, when, and how much."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields, replace
from typing import Any

from hf_efcp.sparsity.distribution import DISTRIBUTIONS

GROWTH = ("none", "random", "gradient", "momentum")


@dataclass(frozen=True)
class SparseMethod:
    """A rule, with its published settings as defaults.

    Args:
        name: of the rule.
        distribution: of the weights over the layers, see `nonzero_counts`.
        first_dense: keep the first layer whole.
        grow: score of the weights that grow: `random`, size of the dense `gradient` or of its `momentum`; `none`
            where nothing grows.
        rate, final_rate: share ρ of a layer's weights that is exchanged, falling along a cosine.
        interval: steps between two changes, or `epoch`.
        begin: the first step at which the topology may change.
        stop: share of training after which it no longer does.
        stop_epochs: the same in epochs; whichever comes first.
        order: `replace`: the change takes the place of the optimizer's step, `after`: it follows the step.
        regrow_keep_value: a weight that is pruned and grown again at once keeps its value; otherwise it starts at 0.
        gradual: start dense and prune the smallest of the whole model, to the sparsity at `stop`, along a cubic.
    """

    name: str
    distribution: str = "erk"
    first_dense: bool = False
    grow: str = "none"
    rate: float = 0.0
    final_rate: float = 0.0
    interval: int | str = "epoch"
    begin: int = 1
    stop: float = 1.0
    stop_epochs: int | None = None
    order: str = "after"
    regrow_keep_value: bool = False
    gradual: bool = False

    @property
    def changes(self) -> bool:
        """Whether the topology changes at all."""
        return self.gradual or self.grow != "none"

    def last_step(self, total_steps: int, steps_per_epoch: int) -> int:
        """The last step, counted from 1, at which the topology may change; never the run's last one."""
        last = min(math.floor(self.stop * total_steps), total_steps - 1)
        return last if self.stop_epochs is None else min(last, self.stop_epochs * steps_per_epoch)

    def is_due(self, step: int, total_steps: int, steps_per_epoch: int) -> bool:
        """Whether the topology changes at a step, counted from 1. Gradual pruning ends where it must."""
        last = self.last_step(total_steps, steps_per_epoch)
        interval = steps_per_epoch if self.interval == "epoch" else self.interval
        is_inside = self.changes and self.begin <= step <= last
        return is_inside and (step % interval == 0 or (self.gradual and step == last))  # pyright: ignore[reportOperatorIssue]

    def fitted(self, total_steps: int, steps_per_epoch: int) -> SparseMethod:
        """This method, or where it would never change a thing in so short a run, one that does up to ten times."""
        last = self.last_step(total_steps, steps_per_epoch)
        steps = range(1, last + 1)
        if not self.changes or any(self.is_due(step, total_steps, steps_per_epoch) for step in steps):
            return self
        # Not at each step of a very short run: a change may take the place of the optimizer's step.
        return replace(self, interval=max(5, last // 10), begin=min(self.begin, max(1, last // 10)))

    def exchange_rate(self, step: int, last: int) -> float:
        """`ρ(t) = ρ_min + (ρ₀ − ρ_min)(1 + cos(πt/T))/2`."""
        t = min(1.0, step / max(1, last))
        return self.final_rate + (self.rate - self.final_rate) * (1 + math.cos(math.pi * t)) / 2

    def gradual_sparsity(self, step: int, last: int, final: float) -> float:
        """`s(t) = s_f(1 − (1 − (t − t₀)/(T − t₀))³)` (Zhu & Gupta, arXiv 1710.01878)."""
        done = min(1.0, max(0.0, (step - self.begin) / max(1, last - self.begin)))
        return final * (1 - (1 - done) ** 3)


METHODS = {
    method.name: method
    for method in (
        SparseMethod("static"),
        SparseMethod("set", "uniform", True, "random", rate=0.5, stop_epochs=99),
        SparseMethod("rigl", "erk", grow="gradient", rate=0.3, interval=100, stop=0.75, order="replace"),
        SparseMethod(
            "rigl_itop", "erk", grow="gradient", rate=0.5, final_rate=0.005, interval=4000, regrow_keep_value=True
        ),
        SparseMethod(
            "set_itop", "erk", grow="random", rate=0.5, final_rate=0.005, interval=1500, regrow_keep_value=True
        ),
        SparseMethod("snfs", "uniform", grow="momentum", rate=0.5, stop_epochs=99),
        SparseMethod("gmp", interval=100, begin=700, stop=0.75, gradual=True),
    )
}
_FIXED = ("name", "grow", "gradual")


def sparse_method(name: str, **changes: Any) -> SparseMethod:
    """A published rule, with some of its settings changed.

    Raises:
        ValueError, TypeError: no such rule or setting, or a value out of range.
    """
    if name not in METHODS:
        raise ValueError(f"`sparse_method` must be one of {', '.join(METHODS)}, got {name!r}.{_closest(name, METHODS)}")
    known = [field.name for field in fields(SparseMethod) if field.name not in _FIXED]
    for setting in changes:
        if setting not in known:
            raise ValueError(f"{name} has no setting `{setting}`.{_closest(setting, known)} It has {', '.join(known)}.")
    method = replace(METHODS[name], **changes)
    _check(method)
    return method


def _check(method: SparseMethod) -> None:
    for setting, choices in (("distribution", DISTRIBUTIONS), ("order", ("replace", "after"))):
        if getattr(method, setting) not in choices:
            raise ValueError(f"`{setting}` must be one of {', '.join(choices)}, got {getattr(method, setting)!r}.")
    for setting in ("rate", "final_rate", "stop"):
        value = getattr(method, setting)
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"`{setting}` must be in [0, 1], got {value!r}.")
    for setting in ("first_dense", "regrow_keep_value"):
        if not isinstance(getattr(method, setting), bool):
            raise TypeError(f"`{setting}` must be true or false, got {getattr(method, setting)!r}.")
    interval = method.interval
    if interval != "epoch" and not (isinstance(interval, int) and not isinstance(interval, bool) and interval >= 1):
        raise ValueError(f"`interval` must be `epoch` or a number of steps, at least 1, got {interval!r}.")
    for setting in ("begin", "stop_epochs"):
        value = getattr(method, setting)
        if not (isinstance(value, int) and value >= 0) and not (setting == "stop_epochs" and value is None):
            raise ValueError(f"`{setting}` must be a whole number, at least 0, got {value!r}.")


def _closest(name: str, names: Any) -> str:
    match = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.5)
    return f" Did you mean `{match[0]}`?" if match else ""
