"""The sketches of parameters of one shape: where they stand in `state[p]`, their update and use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_efcp.curvature.inverse_roots import inverse_root, precondition, unfold
from hf_efcp.curvature.sketch import Sketch, exact_update, is_cheap_exactly, subspace_update
from hf_efcp.optim.partition import Block


def storage_dtype(name: str, parameter: Tensor) -> torch.dtype:
    """The dtype of a name, float64 in place of float32 where the parameter is."""
    dtype = getattr(torch, name)
    return parameter.dtype if (dtype, parameter.dtype) == (torch.float32, torch.float64) else dtype


def compute_dtype(options: Mapping[str, Any], parameter: Tensor) -> torch.dtype:
    """float32, float64 where the sketches or the parameter are."""
    return torch.float64 if "float64" in (options["sketch_dtype"], str(parameter.dtype)[6:]) else torch.float32


def new_sketches(blocks: Sequence[Block], options: Mapping[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    """Empty sketches of all blocks of a parameter: `basis_<block>_<axis>`, `singular_values_…`, `tail_…`."""
    device = parameter.device
    state = {}
    scalar = {"dtype": torch.float64, "device": device}
    for number, block in enumerate(blocks):
        if options["tail"] == "trace":
            state[f"trace_{number}"] = torch.zeros((), **scalar)
        for axis in block.axes:
            d = block.shape[axis]
            k = min(options["rank"], d)
            dtype = storage_dtype(options["sketch_dtype"], parameter)
            state[f"basis_{number}_{axis}"] = torch.zeros(d, k, dtype=dtype, device=device)
            state[f"singular_values_{number}_{axis}"] = torch.zeros(k, **scalar)
            state[f"tail_{number}_{axis}"] = torch.zeros((), **scalar)
    return state


class Due(NamedTuple):
    """An update of the sketches: how many were before it, and the steps since the last."""

    number: int
    steps: int


def due_update(count: int, options: Mapping[str, Any]) -> Due | None:
    """The update after `count` steps, if due: in the first `warm_steps` always, then at every `update_freq`-th."""
    warm, every = options["warm_steps"], options["update_freq"]
    if count < warm:
        return Due(count, 1)
    if count % every:
        return None
    later = count // every - -(-warm // every)  # multiples of update_freq from warm_steps on, before this one
    return Due(warm + later, min(every, count - warm + 1) if warm else every)


class BlockSketches:
    """The sketches of one block of some parameters of equal shape.

    Args:
        states: the parameters' states; their tensors are written in place.
        number: of the block.
        block: its place, shape and axes.
        options: the optimizer's.
        accept: () bool; where false nothing is written. `None`: the step is accepted.
    """

    def __init__(
        self,
        states: Sequence[dict[str, Tensor]],
        number: int,
        block: Block,
        options: Mapping[str, Any],
        accept: Tensor | None,
    ):
        self.states, self.number, self.block = states, number, block
        self.options, self.accept = options, accept

    def update(self, gradient: Tensor, due: Due) -> list[Tensor | None]:
        """Take a gradient, (n, *block.shape) and not written to, into the sketches.

        Returns:
            for `precondition`: `UᵀG` of each axis, where it comes for free.
        """
        if self.options["tail"] == "trace" and self.block.axes:
            self._copy(f"trace_{self.number}", self._decay(due) * self._trace + _square_norm(gradient))
        projections = []
        for axis in self.block.axes:
            sketch, projection = self._updated(self._read(axis), unfold(gradient, axis), due)
            self._write(axis, sketch)
            # A basis that is stored rounded is not the one of the projection.
            projections.append(projection if sketch.basis.dtype is gradient.dtype else None)
        return projections

    def precondition(self, gradient: Tensor, projections: Sequence[Tensor | None] | None = None) -> Tensor:
        """The preconditioned gradient, a new tensor."""
        axes = self.block.axes
        if not axes:
            return gradient.clone()
        total = _square_norm(gradient)
        roots, found = [], []
        for axis, projection in zip(axes, projections or [None] * len(axes), strict=True):
            sketch = self._read(axis)
            basis = sketch.basis.to(gradient.dtype)
            found.append(basis.mT @ unfold(gradient, axis) if projection is None else projection)
            root = inverse_root(
                sketch._replace(basis=basis),
                found[-1],
                total,
                order=2 * len(axes),
                epsilon=self.options["epsilon"],
                relative=self.options["relative_epsilon"],
                trace=self._trace if self.options["tail"] == "trace" else None,
            )
            roots.append((axis, root))
        return precondition(gradient, roots, found)

    def _updated(self, sketch: Sketch, matrix: Tensor, due: Due) -> tuple[Sketch, Tensor | None]:
        beta2 = self._decay(due)
        tail_decay = beta2**0.5 if self.options["tail_decay"] == "sqrt" else beta2
        if self.options["sketch_update"] == "exact" or is_cheap_exactly(*matrix.shape[-2:], sketch.basis.shape[-1]):  # pyright: ignore[reportCallIssue]
            return exact_update(sketch, matrix, beta2, tail_decay), None
        return subspace_update(sketch, matrix, beta2, tail_decay, due.number)

    def _decay(self, due: Due) -> float:
        """β₂ of an update."""
        return self.options["beta2"] ** (due.steps if self.options["beta2_per_step"] else 1)

    @property
    def _trace(self) -> Tensor:
        """(n,) float64, `tr M`."""
        return torch.stack([state[f"trace_{self.number}"] for state in self.states])

    def _read(self, axis: int) -> Sketch:
        names = (f"{name}_{self.number}_{axis}" for name in ("basis", "singular_values", "tail"))
        return Sketch(*(_stack([state[name] for state in self.states]) for name in names))

    def _write(self, axis: int, sketch: Sketch) -> None:
        for name, value in sketch._asdict().items():
            self._copy(f"{name}_{self.number}_{axis}", value)

    def _copy(self, name: str, values: Tensor) -> None:
        for state, value in zip(self.states, values, strict=True):
            state[name].copy_(value if self.accept is None else torch.where(self.accept, value, state[name]))


def _stack(tensors: list[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def _square_norm(gradient: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradient.flatten(1), dim=1).double().square()
