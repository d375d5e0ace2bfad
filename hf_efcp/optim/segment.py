"""The flat buffers of all parameters that live on one device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        moments: names of the float32 vectors of the parameters' size that live between steps.

    Attributes:
        n_systems: m×m systems over these parameters.
        moments: (layout.size,) float32 vectors by name.
    """

    def __init__(self, params: Sequence[Tensor], options: Mapping[str, Any], moments: Sequence[str]):
        self.params = list(params)
        self.device = self.params[0].device
        shapes = [p.shape for p in self.params]
        if options["compression"] == "topk" and options["selection"] == "block":
            block_size = options["block_size"]
            group = scale_group(block_size) if options["value_dtype"] == "int8" else 1
            self.layout = Layout(shapes, block_size, group)
        else:
            self.layout = Layout(shapes, 1)
        self.n_systems = len(self.params) if options["system"] == "layer" else 1
        self.window = make_window(self.layout, options, self.device)
        self.moments = {name: self.layout.zeros(torch.float32, self.device) for name in moments}

    def fits(self, params: Sequence[Tensor]) -> bool:
        """Whether these buffers are those of `params`, still on the same device."""
        return len(params) == len(self.params) and all(
            ours is theirs and ours.device == self.device for ours, theirs in zip(self.params, params, strict=True)
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
