"""The registered optimizers as cases of one contract, and the small training run that all of them make.

Every name of the registry is a case, and so is every choice of its options, one at a time. A new optimizer
or a new choice is covered as soon as it is registered.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_efcp.ops import torch_ops
from hf_efcp.ops.backend import cpu_backend
from hf_efcp.optim import SINGD
from hf_efcp.optim.registry import create_optimizer, get_spec, list_optimizers
from hf_efcp.optim.window import WindowOptimizer

# Small enough that a ring wraps, a block ends inside a tensor and a sketch is truncated within a few steps.
SMALL = {"window": 4, "block_size": 8, "density": 0.3, "rank": 2, "update_freq": 2}


class Tiny(nn.Module):
    """A network with matrices, vectors and a scalar, of odd sizes."""

    def __init__(self, hidden: int = 7):
        super().__init__()
        self.first = nn.Linear(5, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.second = nn.Linear(hidden, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x)))) * self.scale


def tiny_model(dtype: torch.dtype = torch.float32) -> Tiny:
    """The same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tiny().to(dtype)


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices with weight decay and the rest without, as transformers' Trainer makes them."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class Case:
    """An optimizer's name with options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, model: nn.Module, lr: float = 0.01, **changes: Any) -> Optimizer:
        """Over a model's two groups; also over the model itself where the optimizer needs it, as Trainer does."""
        options = {**self.options, **changes}
        if self.needs_model:
            spec = get_spec(self.name)
            return spec.cls(model, params=decay_groups(model), **{"lr": lr, **spec.resolve(options)})
        return create_optimizer(self.name, decay_groups(model), lr=lr, **options)

    def build_plain(self, target: nn.Module | list[Tensor], lr: float = 0.01, **changes: Any) -> Optimizer:
        """Over a model's or the given parameters in one group."""
        return create_optimizer(self.name, target, lr=lr, **{**self.options, **changes})

    @property
    def needs_model(self) -> bool:
        """Whether it is built over a module."""
        return get_spec(self.name).needs_model

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items() if SMALL.get(k) != v)])


def small(name: str) -> Case:
    """The optimizer as it is by default, over a small window."""
    return Case(name, {option: SMALL[option] for option in get_spec(name).options() if option in SMALL})


def _variants(name: str) -> Iterable[Case]:
    plain = small(name)
    yield plain
    for option, default in get_spec(name).options().values():
        choices = (True, False) if option.kind is bool else option.choices
        for choice in choices:
            if choice != default:
                yield Case(name, {**plain.options, option.name: choice})
    for preset in get_spec(name).presets:
        yield Case(name, {**plain.options, "preset": preset})


def _can_be_built(case: Case) -> bool:
    try:
        case.build(tiny_model())
    except (ValueError, NotImplementedError):  # options that exclude one another
        return case == small(case.name)
    return True


NAMES = [pytest.param(small(name), id=name) for name in list_optimizers()]
CASES = [pytest.param(c, id=str(c)) for name in list_optimizers() for c in _variants(name) if _can_be_built(c)]
each_name = pytest.mark.parametrize("case", NAMES)
each_case = pytest.mark.parametrize("case", CASES)


def backward(model: nn.Module, step: int) -> Tensor:
    """Gradients of batch `step`; the same at every call."""
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    x, y = (torch.randn(6, n, generator=generator).to(dtype) for n in (5, 3))
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss


def train(
    model: nn.Module, optimizer: Optimizer, steps: Iterable[int], change: Callable[[int], None] | None = None
) -> None:
    """One step for each number; `change` may alter the gradients before it."""
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        if change:
            change(step)
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    """A copy of all parameters."""
    return [p.detach().clone() for p in model.parameters()]


def saved(optimizer: Optimizer) -> dict[str, Any]:
    """A copy of the state dict that nothing can change any more."""
    return copy.deepcopy(optimizer.state_dict())


def without_count(state_dict: dict[str, Any]) -> dict[Any, Any]:
    """The state without the count of skipped steps."""
    return {
        index: {name: value for name, value in state.items() if name != "skipped"}
        for index, state in state_dict["state"].items()
    }


def rounding(optimizer: Any) -> float:
    """By how much numbers of two kernels may differ: plain tensors on the CPU have torch's own, or numba's."""
    is_compiled = isinstance(optimizer, WindowOptimizer) and cpu_backend() is not torch_ops
    return 1e-6 if is_compiled or isinstance(optimizer, SINGD) else 0.0


def assert_same(ours: Any, expected: Any, where: str = "", within: float = 0.0) -> None:
    """Equal to the last bit, dtypes and containers included; floating point numbers to `within`, if given."""
    assert type(ours) is type(expected), where
    if isinstance(ours, dict):
        assert ours.keys() == expected.keys(), where
        for key in ours:
            assert_same(ours[key], expected[key], f"{where}.{key}", within)
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(expected), where
        for i, pair in enumerate(zip(ours, expected, strict=True)):
            assert_same(*pair, f"{where}[{i}]", within)
    elif isinstance(ours, Tensor):
        assert ours.dtype is expected.dtype, where
        if within and ours.is_floating_point():
            torch.testing.assert_close(ours, expected, rtol=within, atol=within, msg=lambda text: f"{where}: {text}")
            return
        assert torch.equal(ours, expected), f"{where} differs by {(ours.double() - expected.double()).abs().max()}"
    else:
        assert ours == expected, where
