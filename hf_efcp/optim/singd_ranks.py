"""K-FAC statistics of several ranks: those of the batch that all of them saw."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_efcp.curvature.layer_statistics import Sums
from hf_efcp.curvature.layers import Layer
from hf_efcp.parallel import Group


def summed_over_ranks(group: Group, local: Mapping[Layer, Sums | None]) -> dict[Layer, Sums]:
    """Each layer's sums over the rows of all ranks, of the gradient that DDP averages; without layers that ran nowhere.

    A rank's loss counts as 1/N of the whole, so a row of its gradient is N times too long: `Σ ggᵀ` is divided by N².
    Two calls for all layers together: their sizes, as a layer may not have run everywhere, and what there is.

    Args:
        local: of every layer of the model, in the same order on each rank.
    """
    if group.size == 1 or not local:
        return {layer: sums for layer, sums in local.items() if sums is not None}
    device = next(iter(local)).weight.device
    sizes = torch.tensor([size for sums in local.values() for size in _sizes(sums)], dtype=torch.int64, device=device)
    largest = torch.stack(group.gather(sizes)).amax(0).view(len(local), 4).tolist()
    present = [(layer, sums, size) for (layer, sums), size in zip(local.items(), largest, strict=True) if any(size)]
    if not present:
        return {}
    dtype = torch.float64 if any(layer.weight.dtype is torch.float64 for layer in local) else torch.float32
    flat = group.sum_(torch.cat([_flat(sums, size, dtype, device) for _, sums, size in present]))
    parts = flat.split([4 + _numel(size[:2]) + _numel(size[2:]) for _, _, size in present])
    return {layer: _sums(part, size, 1 / group.size**2) for (layer, _, size), part in zip(present, parts, strict=True)}


def _sizes(sums: Sums | None) -> list[int]:
    """Two sides of both moments; the second is 0 where there is one."""
    if sums is None:
        return [0, 0, 0, 0]
    return [side for moment in (sums.inputs, sums.outputs) for side in (*moment.shape, 0)[:2]]


def _numel(size: list[int]) -> int:
    return size[0] * (size[1] or 1)


def _flat(sums: Sums | None, size: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if sums is None:
        return torch.zeros(4 + _numel(size[:2]) + _numel(size[2:]), dtype=dtype, device=device)
    scalars = (sums.input_trace, sums.output_trace, sums.rows, sums.terms)
    scalars = [torch.as_tensor(x).to(device, dtype).view(1) for x in scalars]
    return torch.cat([*scalars, sums.inputs.to(dtype).reshape(-1), sums.outputs.to(dtype).reshape(-1)])


def _sums(flat: Tensor, size: list[int], output_share: float) -> Sums:
    input_trace, output_trace, rows, terms = flat[:4].unbind()
    inputs, outputs = flat[4:].split([_numel(size[:2]), _numel(size[2:])])
    return Sums(
        inputs=inputs.view([side for side in size[:2] if side]),
        outputs=outputs.view([side for side in size[2:] if side]) * output_share,
        input_trace=input_trace,
        output_trace=output_trace * output_share,
        rows=rows,
        terms=terms,
    )
