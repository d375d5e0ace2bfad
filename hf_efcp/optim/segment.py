"""The flat buffers of parameters: one segment for each device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_efcp.curvature.layout import Layout
from hf_efcp.curvature.lowrank import LowRankWindow
from hf_efcp.curvature.window import BlockTopKWindow, DenseWindow, GlobalTopKWindow, Window, scale_group
from hf_efcp.optim.options import DTYPES


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
    """Window and moments of the parameters on one device.

    Args:
        params: parameters, all on one device.
        options: an optimizer's checked options.
        moments: names of the vectors of the parameters' size that live between steps.

    Attributes:
        device: of the buffers: the parameters', or `options["state_device"]`.
        n_systems: m×m systems over these parameters.
        root_numels: root of each parameter's number of entries.
        moments: (layout.size,) vectors of `options["moment_dtype"]` by name.
    """

    def __init__(self, params: Sequence[Tensor], options: Mapping[str, Any], moments: Sequence[str]):
        self.params = list(params)
        self.parameter_device = self.params[0].device
        self.device = torch.device(options["state_device"] or self.parameter_device)
        shapes = [p.shape for p in self.params]
        if options["compression"] == "topk" and options["selection"] == "block":
            block_size = options["block_size"]
            group = scale_group(block_size) if options["value_dtype"] == "int8" else 1
            self.layout = Layout(shapes, block_size, group)
        else:
            self.layout = Layout(shapes, 1)
        self.n_systems = len(self.params) if options["system"] == "layer" else 1
        self.window = make_window(self.layout, options, self.device)
        dtype = DTYPES[options["moment_dtype"]]
        self.root_numels = torch.tensor(self.layout.numels, device=self.device).clamp_min(1).sqrt()
        self.moments = {name: self.layout.zeros(dtype, self.device) for name in moments}

    def fits(self, params: Sequence[Tensor]) -> bool:
        """Whether these buffers are those of `params`, still on the same device."""
        return len(params) == len(self.params) and all(
            ours is theirs and ours.device == self.parameter_device
            for ours, theirs in zip(self.params, params, strict=True)
        )

    def views(self) -> list[dict[str, Tensor]]:
        """For each parameter its views of the buffers, by name: what stands in `optimizer.state`."""
        views = self.window.views()
        for name, flat in self.moments.items():
            for state, part in zip(views, self.layout.split(flat), strict=True):
                state[name] = part
        return views

    def flat_gradient(self) -> Tensor:
        """A float32 copy of all gradients, (layout.size,); a missing one counts as zero."""
        return self.layout.flatten([p.grad for p in self.params], self.device)


class Segments:
    """The segments of a model and the m×m systems over them.

    Args:
        params: all parameters, in the optimizer's order.
        options: an optimizer's checked options.
        moments: as for `Segment`.
        key: what tells the parameters of one segment from those of another; the device.

    Raises:
        NotImplementedError: a model on several devices with rows that cross parameters.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        options: Mapping[str, Any],
        moments: Sequence[str],
        key: Callable[[Tensor], Any],
    ):
        self._key = key
        self._per_parameter = options["system"] == "layer"
        parts = self._partition(params)
        if options["compression"] == "topk" and options["selection"] == "global" and len(parts) > 1:
            raise NotImplementedError(
                f"selection='global' ranks all entries of a model on one device; this one is spread over "
                f"{sorted(map(str, map(key, params)))}. Use selection='block'."
            )
        self._segments = [Segment(part, options, moments) for part in parts]

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

    def views(self) -> dict[Tensor, dict[str, Tensor]]:
        """For each parameter its views of the buffers, by name."""
        return {p: views for segment in self for p, views in zip(segment.params, segment.views(), strict=True)}

    def gather(self, parts: Sequence[Tensor], device: torch.device) -> Tensor:
        """(S, m) products of the model on `device`, from those of the segments."""
        moved = [part.to(device) for part in parts]
        return torch.cat(moved) if self._per_parameter else sum(moved)

    def scatter(self, values: Tensor) -> list[Tensor]:
        """For each segment the rows of `values` (S, …) that are its systems', on its device."""
        counts = [segment.n_systems for segment in self]
        parts = values.split(counts) if self._per_parameter else [values] * len(self)
        return [part.to(segment.device) for segment, part in zip(self, parts, strict=True)]
