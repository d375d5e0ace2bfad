"""The processes that hold an optimizer together, and the few collectives that it needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """Some ranks of `torch.distributed`, or a single process, in which every collective returns at once.

    All ranks must make the same calls in the same order. Tensors may lie on any device: what the backend cannot
    carry (NCCL has nothing for the CPU) is moved to a device of its own and back.

    Args:
        process_group: as `torch.distributed` has it; `None` for this process alone.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None):
        self.process_group = process_group
        self.rank = dist.get_rank(process_group) if process_group else 0
        self.size = dist.get_world_size(process_group) if process_group else 1
        self._carries_cpu = process_group is None or "gloo" in str(dist.get_backend_config(process_group))

    def carrier(self, device: torch.device) -> torch.device:
        """Where a tensor of `device` must lie for the backend to carry it."""
        if device.type != "cpu" or self._carries_cpu:
            return device
        return torch.device("cuda", torch.cuda.current_device())

    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor summed over the ranks, in place. Every rank gets the same bits."""
        if self.size > 1:
            carried = tensor.to(self.carrier(tensor.device)).contiguous()
            dist.all_reduce(carried, group=self.process_group)
            if carried is not tensor:
                tensor.copy_(carried)
        return tensor

    def all_(self, flag: Tensor) -> Tensor:
        """() bool: whether the flag is true on every rank. The host does not wait."""
        return self.sum_((~flag).to(torch.int32)) == 0 if self.size > 1 else flag

    def any_(self, flag: Tensor) -> Tensor:
        """() bool: whether the flag is true on some rank."""
        return self.sum_(flag.to(torch.int32)) > 0 if self.size > 1 else flag

    def gather(self, part: Tensor) -> list[Tensor]:
        """The (n,) tensors of all ranks, n and dtype the same on each, in one call."""
        if self.size == 1:
            return [part]
        carried = part.to(self.carrier(part.device)).contiguous()
        out = torch.empty(self.size * len(part), dtype=part.dtype, device=carried.device)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
        gather(out, carried, group=self.process_group)
        return list(out.to(part.device).split(len(part)))

    def exchange(self, send: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        """What every rank sends to this one, in the ranks' order; `send` is cut by `send_counts`."""
        carried = send.to(self.carrier(send.device))
        out = torch.empty(sum(receive_counts), dtype=send.dtype, device=carried.device)
        dist.all_to_all_single(out, carried, list(receive_counts), list(send_counts), group=self.process_group)
        return out.to(send.device)

    def broadcast_(self, tensor: Tensor, source: int) -> Tensor:
        """The tensor of rank `source`, in place."""
        if self.size > 1:
            carried = tensor.to(self.carrier(tensor.device))
            dist.broadcast(carried, group_src=source, group=self.process_group)
            if carried is not tensor:
                tensor.copy_(carried)
        return tensor


_planned: ContextVar[Group | None] = ContextVar("planned", default=None)


@contextlib.contextmanager
def planned(size: int, rank: int = 0) -> Iterator[None]:
    """Within it `world()` is a group of so many ranks, without any: to count what one of them would hold."""
    group = Group()
    group.size, group.rank = size, rank
    token = _planned.set(group)
    try:
        yield
    finally:
        _planned.reset(token)


def world() -> Group:
    """All processes of the program; this one alone where `torch.distributed` is not set up."""
    planned = _planned.get()
    if planned is not None:
        return planned
    return Group(dist.group.WORLD) if dist.is_available() and dist.is_initialized() else Group()
