"""Factors of equal shape that are updated together: few products of batches instead of many of small matrices."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_efcp.curvature.layer_statistics import Sums
from hf_efcp.curvature.structures import Dense
from hf_efcp.optim.singd_state import FactorPair

_MOST = 1 << 24  # entries of a batch's factors: larger ones fill a device without being batched


def refresh_together(statistics: Mapping[FactorPair, Sums], loss_terms: Tensor | float | None) -> None:
    """`FactorPair.refresh` of all pairs; those of one shape, dtype, device and number of updates as one batch."""
    alike: dict[Any, list[FactorPair]] = {}
    for pair in statistics:
        alike.setdefault(_key(pair), []).append(pair)
    for pairs in alike.values():
        size = max(1, _MOST // pairs[0].numel) if _gains(pairs[0]) else 1
        for start in range(0, len(pairs), size):
            _refresh({pair: statistics[pair] for pair in pairs[start : start + size]}, loss_terms)


def _key(pair: FactorPair) -> tuple[Any, ...]:
    return pair.kind, pair.dtype, pair.layer.weight.device, int(pair.state["refreshes"])


def _gains(pair: FactorPair) -> bool:
    """Whether a batch is faster: not on a CPU where products of dense matrices take all the time."""
    is_dense = any(isinstance(structure, Dense) for structure in (pair.layer.inputs, pair.layer.outputs))
    return not (is_dense and pair.layer.weight.device.type == "cpu")


def _refresh(statistics: Mapping[FactorPair, Sums], loss_terms: Tensor | float | None) -> None:
    operands = [pair.operands(sums, loss_terms) for pair, sums in statistics.items()]
    first, count = next(iter(statistics)), int(next(iter(statistics)).state["refreshes"])
    if len(operands) == 1:
        first.write(first.updated(operands[0], count))
        return
    stacked = {name: torch.stack([tensors[name] for tensors in operands]) for name in operands[0]}
    new = torch.vmap(partial(first.updated, count=count))(stacked)
    for number, pair in enumerate(statistics):
        pair.write({name: tensors[number] for name, tensors in new.items()})
