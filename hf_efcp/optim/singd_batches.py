"""Factors of equal shape that are updated together: few products of batches instead of many of small matrices.

On CUDA the batches run on a stream of their own, and gradients of a batch that is done are preconditioned meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from hf_efcp.curvature.layer_statistics import Sums
from hf_efcp.curvature.structures import Dense
from hf_efcp.optim.singd_state import FactorPair

_MOST = 1 << 24  # entries of a batch's factors: larger ones fill a device without being batched


def refresh_together(statistics: Mapping[FactorPair, Sums], loss_terms: Tensor | float | None) -> None:
    """`FactorPair.refresh` of all pairs; those of one shape, dtype, device and number of updates as one batch.

    On CUDA it may still run: a pair's `wait` must come before its factors are read, and that of all of them before
    `statistics` is let go, whose memory the main stream would take for something else.
    """
    alike: dict[Any, list[FactorPair]] = {}
    for pair in statistics:
        alike.setdefault(_key(pair), []).append(pair)
    for pairs in alike.values():
        size = max(1, _MOST // pairs[0].numel) if _gains(pairs[0]) else 1
        for start in range(0, len(pairs), size):
            _refresh_beside({pair: statistics[pair] for pair in pairs[start : start + size]}, loss_terms)


def _key(pair: FactorPair) -> tuple[Any, ...]:
    return pair.kind, pair.dtype, pair.layer.weight.device, int(pair.state["refreshes"])


def _gains(pair: FactorPair) -> bool:
    """Whether a batch is faster: not on a CPU where products of dense matrices take all the time."""
    is_dense = any(isinstance(structure, Dense) for structure in (pair.layer.inputs, pair.layer.outputs))
    return not (is_dense and pair.layer.weight.device.type == "cpu")


def _refresh_beside(statistics: Mapping[FactorPair, Sums], loss_terms: Tensor | float | None) -> None:
    """`_refresh` on the side stream, after all that the main stream has been told to do; on a CPU at once."""
    device = next(iter(statistics)).layer.weight.device
    if not _has_streams(device):
        _refresh(statistics, loss_terms)
        return
    stream = _side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        _refresh(statistics, loss_terms)
        done = stream.record_event()
    for pair in statistics:
        pair.done = done


def _has_streams(device: torch.device) -> bool:
    return device.type == "cuda"


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


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
