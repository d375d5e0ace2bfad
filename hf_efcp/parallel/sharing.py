"""Which way of sharing fits the parameters, and what fits none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from hf_efcp.parallel.group import Group, world
from hf_efcp.parallel.ownership import Local, Replicated, Sharded

_USE_FSDP2 = (
    "Use FSDP2 (fully_shard; fsdp_version 2 in accelerate, `--fsdp_config '{\"version\": 2}'` in Trainer) or DDP."
)


@dataclass(frozen=True)
class Sharing:
    """How the state of an optimizer lies on the ranks.

    Attributes:
        kind: `"local"`, `"replicated"` or `"sharded"`, see `hf_efcp.parallel.ownership`.
        group: the ranks that own it together.
    """

    kind: str = "local"
    group: Group = field(default_factory=Group)

    def own(self, params: Sequence[Tensor], unit: int | None) -> Local:
        """Ownership of some parameters in units of so many entries, whole where `unit` is `None`."""
        if self.kind == "local":
            return Local(params)
        return (Sharded if self.kind == "sharded" else Replicated)(params, unit, self.group)  # pyright: ignore[reportArgumentType]


def find_sharing(params: Sequence[Tensor], shard_state: bool | None) -> Sharing:
    """The way that suits the parameters as they are now, wrapped or not.

    Args:
        shard_state: whether the state of replicated parameters is divided; `None`: if there are several ranks.

    Raises:
        NotImplementedError: parameters that no way suits, with the first of them and what works.
        ValueError: `shard_state=False` with sharded parameters.
    """
    for number, parameter in enumerate(params):
        if getattr(parameter, "_fsdp_flattened", False):
            raise NotImplementedError(f"{_named(number, parameter)} is flattened by FSDP1. {_USE_FSDP2}")
    if any(isinstance(p, DTensor) for p in params):
        return Sharing("sharded", Group(_mesh_group(params, shard_state)))
    group = Group() if shard_state is False else world()
    return Sharing("replicated", group) if group.size > 1 else Sharing()


def _mesh_group(params: Sequence[Tensor], shard_state: bool | None) -> Any:
    first = next(p for p in params if isinstance(p, DTensor))
    if shard_state is False:
        raise ValueError("`shard_state=False` keeps the state whole on every rank, but the parameters are sharded.")
    for number, parameter in enumerate(params):
        if not isinstance(parameter, DTensor):
            raise NotImplementedError(
                f"{_named(number, parameter)} is no DTensor, while others are. Let fully_shard take the whole model, "
                "or freeze what it ignores."
            )
        if parameter.device_mesh != first.device_mesh:
            raise NotImplementedError(f"{_named(number, parameter)} lies on a mesh of its own. {_USE_FSDP2}")
        if tuple(parameter.placements) != (Shard(0),):
            raise NotImplementedError(
                f"{_named(number, parameter)} is placed as {tuple(parameter.placements)} on a mesh of shape "
                f"{tuple(parameter.device_mesh.shape)}: tensor parallelism and meshes of several axes are not "
                f"supported. {_USE_FSDP2}"
            )
    return first.device_mesh.get_group()


def check_replicas(params: Sequence[Tensor], group: Group) -> None:
    """Raise `RuntimeError` on all ranks where they do not hold the same weights and gradients. Waits for the device."""
    device = params[0].device
    sizes = torch.tensor([len(params), sum(p.numel() for p in params)], dtype=torch.int64, device=device)
    sums = torch.stack([_checksum(t, device) for p in params for t in (p.detach(), p.grad)]).view(-1, 2)
    if not _differs(group, sizes):
        differing = [group.gather(part.contiguous()) for part in sums.T]
        unequal = [torch.stack([(part != parts[0]) for part in parts]).any(0) for parts in differing]
        for what, wrong in zip(("weights", "gradients"), unequal, strict=True):
            if wrong.any():
                number = int(wrong.nonzero()[0])
                raise RuntimeError(_unequal(f"the {what} of {_named(number, params[number])}"))
        return
    raise RuntimeError(_unequal("the number of their parameters"))


def _differs(group: Group, values: Tensor) -> bool:
    parts = group.gather(values)
    return any(not torch.equal(part, parts[0]) for part in parts)


def _unequal(what: str) -> str:
    return (
        f"The ranks differ in {what}, and `shard_state` divides the state of a model that is the same on all. Wrap the "
        "model in DistributedDataParallel (accelerate does), average the gradients, or give each rank an optimizer of "
        "its own with shard_state=False. DeepSpeed ZeRO hands out partitions of a model: use FSDP2 or DDP instead."
    )


def _checksum(tensor: Tensor | None, device: torch.device) -> Tensor:
    """() int64 from the bits of a tensor; 0 for `None`."""
    if tensor is None:
        return torch.zeros((), dtype=torch.int64, device=device)
    value = tensor.sum(dtype=torch.float64).to(device)
    return torch.where(value.isnan(), -1, value.view(torch.int64))


def _named(number: int, parameter: Tensor) -> str:
    return f"parameter {number} of shape {tuple(parameter.shape)}"


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of it, but for a `DTensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
