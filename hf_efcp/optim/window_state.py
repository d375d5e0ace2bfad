"""The state of a window optimizer between its buffers, `optimizer.state`, and a checkpoint of any number of ranks.

A checkpoint holds each parameter's state whole, as a single process has it. Sharded parameters show theirs as
`DTensor`s in units of blocks, which distributed checkpoints cut and join. Either form of top-k rows loads anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_efcp.optim.segment import Segment, Segments
from hf_efcp.parallel import Piece, Sharing, collect, find_sharing, local_part


def find_window_sharing(params: Sequence[Tensor], options: Mapping[str, Any]) -> Sharing:
    """`find_sharing`, with what the rows of the window allow."""
    is_global = options["compression"] == "topk" and options["selection"] == "global"
    sharing = find_sharing(params, options["shard_state"])
    if sharing.kind == "replicated" and is_global:
        return Sharing()
    if sharing.kind == "sharded" and (is_global or options["compression"] == "lowrank"):
        what = "selection='global' ranks all entries" if is_global else "compression='lowrank' factors whole matrices"
        raise NotImplementedError(
            f"{what}, and the parameters are sharded. With FSDP2 use block-wise top-k rows (efcp_mfac, efcp_ggt); "
            "with DDP all rows work."
        )
    return sharing


def filled_states(
    segments: Segments, params: Sequence[Tensor], saved: Mapping[Tensor, Mapping[str, Any]]
) -> dict[Tensor, dict[str, Tensor]]:
    """For each parameter what stands for it in `optimizer.state`, its buffers filled from what is saved of it.

    Raises:
        ValueError: saved shapes that are not this model's with these options.
    """
    states: dict[Tensor, dict[str, Tensor]] = {parameter: {} for parameter in params}
    for segment in segments:
        for piece, views in zip(segment.owned.pieces, segment.views(), strict=True):
            old = saved.get(segment.params[piece.number], {})
            for name, view in views.items():
                if name in old:
                    _fill_(segment, piece, name, view, local_part(old[name]))
        states.update(segment.states())
    return states


def _fill_(segment: Segment, piece: Piece, name: str, view: Tensor, saved: Tensor) -> None:
    numel, steps = segment.params[piece.number].numel(), segment.steps(name)
    unit = segment.layout.block_size * segment.layout.group
    padded = -(-numel // unit) * unit
    if saved.shape == view.shape:
        view.copy_(saved)
        return
    if steps is None and saved.numel() in (numel, padded) and view.numel() >= len(piece):
        view.view(-1)[: len(piece)].copy_(saved.reshape(-1)[piece.start : piece.stop])
        return
    if steps is not None:
        axis, entries = steps
        saved = saved.flatten(0, 1) if saved.dim() > view.dim() else saved
        view = view.flatten(0, 1) if saved.dim() < view.dim() else view
        shape = [*view.shape[:axis], padded // entries, *view.shape[axis + 1 :]]
        if list(saved.shape) == shape:
            view.copy_(saved.narrow(axis, piece.start // entries, view.shape[axis]))
            return
    raise ValueError(
        f"The saved `{name}` has shape {tuple(saved.shape)}; this model and these options need {tuple(view.shape)}"
        f"{'' if len(piece) == numel else f', or that of all {numel} entries of the parameter'}."
    )


def whole_states(segments: Segments, device: torch.device, keeps: bool) -> dict[Tensor, dict[str, Tensor]] | None:
    """Each parameter's state from the pieces of all ranks, on the CPU. All ranks must call it.

    Args:
        device: over which the pieces travel.
        keeps: whether this rank wants it; else it returns `None` and needs no memory for it.
    """
    mine = [views for segment in segments for views in segment.views()]
    parts: dict[Tensor, list[dict[str, Tensor]]] = {p: [] for segment in segments for p in segment.params}
    for rank, states in enumerate(collect(segments.group, mine, device)):
        if keeps:
            owners = [s.params[piece.number] for s in segments for piece in s.owned.by_rank[rank]]  # pyright: ignore[reportAttributeAccessIssue]
            for parameter, state in zip(owners, states, strict=True):
                parts[parameter].append(state)
    if not keeps:
        return None
    return {p: _joined(segment, p, parts[p]) for segment in segments for p in segment.params}


def _joined(segment: Segment, parameter: Tensor, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One state from those of consecutive pieces."""
    if len(parts) < 2:
        return parts[0] if parts else {}
    joined = {}
    for name in parts[0]:
        tensors, steps = [part[name] for part in parts], segment.steps(name)
        joined[name] = torch.cat(tensors).view(parameter.shape) if steps is None else torch.cat(tensors, steps[0])
    return joined
