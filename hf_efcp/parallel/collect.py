"""The state of all ranks, for checkpoints that do not depend on how many there were."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_efcp.parallel.group import Group


def collect(
    group: Group, states: Sequence[dict[str, Tensor]], device: torch.device
) -> Iterator[list[dict[str, Tensor]]]:
    """Every rank's `states`, on the CPU, one rank after the other; all ranks must take them all.

    What travels is a line of JSON (names, dtypes, shapes) and the tensors' bytes.

    Args:
        device: of the optimizer, over which the bytes travel.
    """
    for rank in range(group.size):
        mine = states if rank == group.rank else []
        head = json.dumps([{n: [str(t.dtype)[6:], list(t.shape)] for n, t in state.items()} for state in mine])
        entries = json.loads(
            bytes(_sent(group, rank, torch.tensor(list(head.encode()), dtype=torch.uint8), device).tolist())
        )
        flat = [_bytes(t) for state in mine for t in state.values()]
        payload = _sent(group, rank, torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8), device)
        yield list(_unpacked(entries, payload))


def _unpacked(entries: list[dict[str, tuple[str, list[int]]]], payload: Tensor) -> Iterator[dict[str, Tensor]]:
    start = 0
    for entry in entries:
        state = {}
        for name, (dtype_name, shape) in entry.items():
            dtype = getattr(torch, dtype_name)
            stop = start + torch.Size(shape).numel() * dtype.itemsize
            state[name] = payload[start:stop].clone().view(dtype).view(shape)  # views need aligned memory
            start = stop
        yield state


def _sent(group: Group, source: int, data: Tensor, device: torch.device) -> Tensor:
    """Rank `source`'s (n,) uint8 on every rank's CPU."""
    carrier = group.carrier(device)
    length = torch.tensor([len(data)], dtype=torch.int64, device=carrier)
    n = int(group.broadcast_(length, source))
    buffer = data.to(carrier) if source == group.rank else torch.empty(n, dtype=torch.uint8, device=carrier)
    return group.broadcast_(buffer, source).cpu() if n else buffer.cpu()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
