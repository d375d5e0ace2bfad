"""The flat buffers of what a rank owns of the parameters: one segment for each device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_efcp import ops
from hf_efcp.curvature.layout import Layout
from hf_efcp.curvature.lowrank import LowRankWindow
from hf_efcp.curvature.window import BlockTopKWindow, DenseWindow, GlobalTopKWindow, Window, scale_group
from hf_efcp.optim.options import DTYPES
from hf_efcp.parallel import Sharing


def make_window(layout: Layout, options: Mapping[str, Any], device: torch.device) -> Window:
    """The ring of gradients that the options name."""
    shape = {"value_dtype": DTYPES[options["value_dtype"]], "device": device}
    systems = {"per_parameter": options["system"] == "layer"}
    if options["compression"] == "none":
        return DenseWindow(layout, options["window"], **shape, **systems)
    shape["residual_dtype"] = DTYPES.get(options["residual_dtype"])
    if options["compression"] == "lowrank":
        return LowRankWindow(layout, options["window"], rank=options["rank"], **shape, **systems)
    if options["selection"] == "global":
        return GlobalTopKWindow(layout, options["window"], density=options["density"], **shape)
    return BlockTopKWindow(layout, options["window"], density=options["density"], **shape, **systems)


class Segment:
    """Window and moments of what this rank owns of the parameters on one device.

    Args:
        params: parameters, all on one device.
        options: an optimizer's checked options.
        moments: names of the vectors of the parameters' size that live between steps.
        sharing: how they lie on the ranks.
        numbers: of the parameters among those of the model; as they stand here if not given.

    Attributes:
        device: of the buffers: the parameters', or `options["state_device"]`.
        owned: what this rank owns of the parameters, piece by piece.
        layout: of the pieces.
        numbers: of each piece's parameter among those of the model.
        n_systems: m×m systems over them.
        moments: (layout.size,) vectors of `options["moment_dtype"]` by name.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        options: Mapping[str, Any],
        moments: Sequence[str],
        sharing: Sharing | None = None,
        numbers: Sequence[int] | None = None,
    ):
        sharing = sharing or Sharing()
        self.params = list(params)
        self.parameter_device = self.params[0].device
        self.device = torch.device(options["state_device"] or self.parameter_device)
        in_blocks = options["compression"] == "topk" and options["selection"] == "block"
        block_size = options["block_size"] if in_blocks else 1
        group = scale_group(block_size) if options["value_dtype"] == "int8" and in_blocks else 1
        self._unit = block_size * group
        self.owned = sharing.own(self.params, None if options["compression"] == "lowrank" else self._unit)
        self.layout = Layout(self.owned.shapes(), block_size, group, in_units=sharing.kind == "sharded")
        numbers = range(len(self.params)) if numbers is None else numbers
        self.numbers = [numbers[piece.number] for piece in self.owned.pieces]
        self._per_parameter = options["system"] == "layer"
        self.n_systems = len(self.numbers) if self._per_parameter else 1
        self.window = make_window(self.layout, options, self.device)
        dtype = DTYPES[options["moment_dtype"]]
        self.moments = {name: self.layout.zeros(dtype, self.device) for name in moments}

    def fits(self, params: Sequence[Tensor]) -> bool:
        """Whether these buffers are those of `params`, still on the same device."""
        return len(params) == len(self.params) and all(
            ours is theirs and ours.device == self.parameter_device
            for ours, theirs in zip(self.params, params, strict=True)
        )

    def views(self) -> list[dict[str, Tensor]]:
        """For each piece its views of the buffers, by name."""
        views = self.window.views()
        for name, flat in self.moments.items():
            for state, part in zip(views, self.layout.views(flat), strict=True):
                state[name] = part
        return views

    def states(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Each parameter of which this rank owns a piece, with what stands for it in `optimizer.state`."""
        states = []
        for piece, views in zip(self.owned.pieces, self.views(), strict=True):
            parameter = self.params[piece.number]
            units = -(-parameter.numel() // self._unit)
            shown = {n: self.owned.state(piece, v, (self.steps(n) or (0,))[0], units) for n, v in views.items()}
            states.append((parameter, shown))
        return states

    def steps(self, name: str) -> tuple[int, int] | None:
        """As `Window.steps`, of moments too."""
        return None if name in self.moments else self.window.steps(name)

    def flat_gradient(self) -> Tensor:
        """A float32 copy of the gradients of all pieces, (layout.size,); a missing one counts as zero."""
        return self.layout.flatten(self.owned.gradients(), self.device)

    def products(self, x: Tensor) -> Tensor:
        """`G x` and `|x|²` of each system, (S, m + 1) float64, for a flat vector.

        Lengths are taken by block, or by parameter where there are no blocks, and summed in float64, so that neither
        the order of parameters nor the number of ranks matters.
        """
        layout = self.layout
        if layout.block_size > 1:
            squares = ops.block_squares(x.view(-1, layout.block_size))
            parts = [squares[blocks.start : blocks.stop].sum() for blocks in layout.blocks]
        else:
            parts = [torch.linalg.vector_norm(part).double().square() for part in layout.split(x)]
        by_part = torch.stack(parts) if parts else x.new_zeros(0, dtype=torch.float64)
        squares = by_part if self._per_parameter else by_part.sum()[None]
        return torch.cat([self.window.dots(x), squares[:, None]], dim=1)


class Segments:
    """The segments of a model and the m×m systems over them.

    Args:
        params: all parameters, in the optimizer's order.
        options: an optimizer's checked options.
        moments: as for `Segment`.
        key: what tells the parameters of one segment from those of another; the device. Weights that travel have one
            dtype besides.
        sharing: how they lie on the ranks.

    Raises:
        NotImplementedError: rows that cross parameters, and a model on several devices or sharded.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        options: Mapping[str, Any],
        moments: Sequence[str],
        key: Callable[[Tensor], Any],
        sharing: Sharing | None = None,
    ):
        self.sharing = sharing or Sharing()
        self._key = key if self.sharing.kind == "local" else lambda p: (str(key(p)), str(p.dtype))
        self.group = self.sharing.group
        self.numel = sum(p.numel() for p in params)
        self.numels = [p.numel() for p in params]
        self._constants: dict[Any, Tensor] = {}
        self._per_parameter = options["system"] == "layer"
        parts = self._partition(params)
        if options["compression"] == "topk" and options["selection"] == "global" and len(parts) > 1:
            raise NotImplementedError(
                f"selection='global' ranks all entries of a model on one device; this one is spread over "
                f"{sorted(map(str, map(key, params)))}. Use selection='block'."
            )
        number = {p: i for i, p in enumerate(params)}
        self._segments = [Segment(part, options, moments, self.sharing, [number[p] for p in part]) for part in parts]

    def _partition(self, params: Sequence[Tensor]) -> list[list[Tensor]]:
        by_key: dict[Any, list[Tensor]] = {}
        for parameter in params:
            by_key.setdefault(self._key(parameter), []).append(parameter)
        return list(by_key.values())

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._segments)

    def __len__(self) -> int:
        return len(self._segments)

    def fits(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the buffers of `params`, none swapped or moved since: accelerate does both."""
        parts = self._partition(params)
        return len(parts) == len(self) and all(s.fits(part) for s, part in zip(self, parts, strict=True))

    def gather(self, parts: Sequence[Tensor], device: torch.device) -> Tensor:
        """(S, m) products of the model on `device`, from those of the segments of all ranks."""
        if self._per_parameter:
            return self.by_parameter(parts, device)
        return self.group.sum_(sum(part.to(device) for part in parts))  # pyright: ignore[reportArgumentType]

    def scatter(self, values: Tensor) -> list[Tensor]:
        """For each segment the rows of `values` (S, …) that are its systems', on its device."""
        return self.by_piece(values) if self._per_parameter else [values.to(segment.device) for segment in self]

    def by_parameter(self, parts: Sequence[Tensor], device: torch.device) -> Tensor:
        """(P, …) sums over all ranks of what the segments have of each parameter, a row a piece."""
        total = parts[0].new_zeros(len(self.numels), *parts[0].shape[1:], device=device)
        for segment, part in zip(self, parts, strict=True):
            total.index_add_(0, self._constant(segment.numbers, device), part.to(device))
        return self.group.sum_(total)

    def by_piece(self, values: Tensor) -> list[Tensor]:
        """For each segment, on its device, a row of `values` (P, …) for each of its pieces."""
        rows = [self._constant(segment.numbers, values.device) for segment in self]
        return [values.index_select(0, r).to(segment.device) for segment, r in zip(self, rows, strict=True)]

    def means(self, sums: Tensor) -> Tensor:
        """(P,) sums over the entries of each parameter, divided by their number."""
        return sums / self._constant(self.numels, sums.device).clamp_min(1)

    def _constant(self, numbers: list[int], device: torch.device) -> Tensor:
        """(n,) int64; made once for each device, as it crosses from the host."""
        key = id(numbers), device
        if key not in self._constants:
            self._constants[key] = torch.tensor(numbers, dtype=torch.int64, device=device)
        return self._constants[key]
