"""How the parameters of a segment and the state of their optimizer lie on the ranks.

    Local        one rank, or each on its own: everything is here
    Replicated   DDP: every rank has all weights and all gradients, and owns the state of some pieces; it updates
                 these and gives the new weights to the others
    Sharded      FSDP2: every rank has rows of the weights and gradients, and owns the state of nearly the same entries

A piece is a run of whole blocks of one parameter, the same blocks on any number of ranks: so are the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from hf_efcp.parallel.group import Group
from hf_efcp.parallel.pieces import Piece, chunks, everything, owners, rows, slices

_BUCKET = 1 << 25  # entries that a rank gives to the others at a time


class Local:
    """Everything on this rank. The others add what differs.

    Attributes:
        params: the parameters.
        pieces: what this rank owns of them, in their order.
        group: the ranks over which sums of pieces run.
    """

    def __init__(self, params: Sequence[Tensor]):
        self.params = list(params)
        self.group = Group()
        self.pieces = everything([p.numel() for p in self.params])

    def shapes(self) -> list[torch.Size]:
        """Of the pieces' gradients and updates."""
        return [piece.shape([p.shape for p in self.params]) for piece in self.pieces]

    def gradients(self) -> list[Tensor | None]:
        """The gradient of each piece, in its shape."""
        return [p.grad for p in self.params]

    def weights(self) -> list[Tensor]:
        """The weights of each piece, in memory that `share` reads; not for sharded parameters."""
        return self.params

    def targets(self, updates: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Parameters, the weights of theirs that this rank updates in place, and the updates for them.

        Args:
            updates: of each piece, in its shape.
        """
        return [(p, w, u.to(p.device)) for p, w, u in zip(self.params, self.weights(), updates, strict=True)]

    def share(self, weights: Sequence[Tensor]) -> None:
        """Let all ranks have the new weights that `targets` gave out."""

    def state(self, piece: Piece, tensor: Tensor, axis: int, steps: int) -> Tensor:
        """A state tensor as `optimizer.state` shows it; along `axis` all ranks together have `steps`."""
        return tensor


class Replicated(Local):
    """The same weights and gradients on every rank, and the state in pieces.

    Args:
        unit: entries that stay together; `None` for whole parameters.
        ranks: of each whole parameter the one that owns it; by their entries if not given.
    """

    def __init__(self, params: Sequence[Tensor], unit: int | None, group: Group, ranks: Sequence[int] | None = None):
        super().__init__(params)
        numels = [p.numel() for p in self.params]
        self.group = group
        whole = unit is None
        self.by_rank = owners(numels, group.size, ranks) if whole else slices(numels, unit, group.size)
        self.pieces = self.by_rank[group.rank]

    def gradients(self) -> list[Tensor | None]:
        grads = [self.params[piece.number].grad for piece in self.pieces]
        return [None if g is None else _part(g, piece) for g, piece in zip(grads, self.pieces, strict=True)]

    def weights(self) -> list[Tensor]:
        return [_part(self.params[piece.number].detach(), piece) for piece in self.pieces]

    def targets(self, updates: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        params = [self.params[piece.number] for piece in self.pieces]
        return [(p, w, u.to(p.device)) for p, w, u in zip(params, self.weights(), updates, strict=True)]

    def share(self, weights: Sequence[Tensor]) -> None:
        longest = max(sum(map(len, pieces)) for pieces in self.by_rank)
        mine = torch.zeros(longest, dtype=self.params[0].dtype, device=self.params[0].device)
        if weights:
            flat = [w.reshape(-1) for w in weights]
            torch._foreach_copy_(list(mine.split([*map(len, flat), longest - sum(map(len, flat))])[:-1]), flat)
        for start in range(0, longest, _BUCKET):
            parts = self.group.gather(mine[start : start + _BUCKET])
            for pieces, part in zip(self.by_rank, parts, strict=True):
                self._write(pieces, start, part)

    def _write(self, pieces: Sequence[Piece], start: int, part: Tensor) -> None:
        """Weights of one rank's pieces from what it gave: entries `start`, … of them, laid end to end."""
        first = -start
        weights, values = [], []
        for piece in pieces:
            low, high = max(first, 0), min(first + len(piece), len(part))
            if low < high:
                p, offset = self.params[piece.number].detach(), piece.start - first
                if p.is_contiguous():
                    weights.append(p.view(-1)[offset + low : offset + high])
                    values.append(part[low:high])
                else:
                    flat = p.reshape(-1).clone()
                    flat[offset + low : offset + high] = part[low:high]
                    p.copy_(flat.view(p.shape))
            first += len(piece)
        if weights:
            torch._foreach_copy_(weights, values)


class Sharded(Local):
    """`DTensor` parameters cut along their first axis. Sums run over the ranks of their mesh.

    Gradients travel from the rank that has their rows to the one that owns their block, and updates back: nothing
    where rows and blocks end together, a block or a row at each of a rank's ends elsewhere.
    """

    def __init__(self, params: Sequence[Tensor], unit: int, group: Group):
        super().__init__(params)
        self.group = group
        self._held = rows([p.shape for p in self.params], group.size)
        self._owned = chunks([p.numel() for p in self.params], unit, group.size)
        self.pieces = self._owned[group.rank]
        self._inward = _Move(self._held, self._owned, group)
        self._outward = _Move(self._owned, self._held, group)

    def gradients(self) -> list[Tensor | None]:
        held = [
            torch.zeros(len(piece), device=p.to_local().device) if p.grad is None else p.grad.to_local().float()
            for p, piece in zip(self.params, self._held[self.group.rank], strict=True)
        ]
        return self._inward([g.reshape(-1) for g in held])

    def targets(self, updates: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        weights = [p.to_local() for p in self.params]
        device = weights[0].device
        held = self._outward([u.reshape(-1).to(device) for u in updates])
        return [(p, w, u.view(w.shape)) for p, w, u in zip(self.params, weights, held, strict=True)]

    def state(self, piece: Piece, tensor: Tensor, axis: int, steps: int) -> Tensor:
        """A `DTensor` over the tensor's memory, which distributed checkpoints save, gather and cut anew."""
        shape = torch.Size([*tensor.shape[:axis], steps, *tensor.shape[axis + 1 :]])
        stride = torch.empty(shape, device="meta").stride()
        mesh = self.params[piece.number].device_mesh
        return DTensor.from_local(tensor, mesh, [Shard(axis)], run_check=False, shape=shape, stride=stride)


class _Move:
    """Entries of all parameters from the ranks that have them in one division to those of another, in one call."""

    def __init__(self, source: list[list[Piece]], target: list[list[Piece]], group: Group):
        self._source, self._target, self._group = source[group.rank], target[group.rank], group
        others = [rank != group.rank for rank in range(group.size)]
        self._send = [_overlaps(self._source, t) if other else [] for t, other in zip(target, others, strict=True)]
        self._receive = [_overlaps(s, self._target) if other else [] for s, other in zip(source, others, strict=True)]
        self._is_needed = any(
            (s.start, s.stop) != (t.start, t.stop)
            for ours, theirs in zip(source, target, strict=True)
            for s, t in zip(ours, theirs, strict=True)
        )

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Flat tensors of this rank's target pieces from those of its source pieces; may be the same memory."""
        if not self._is_needed:
            return list(values)
        send = [values[n][a - self._source[n].start : b - self._source[n].start] for n, a, b in chain(*self._send)]
        received = self._group.exchange(
            torch.cat(send) if send else values[0].new_empty(0), _counts(self._send), _counts(self._receive)
        )
        moved = [values[piece.number].new_empty(len(piece)) for piece in self._target]
        offset = 0
        for n, a, b in chain(*self._receive):
            moved[n][a - self._target[n].start : b - self._target[n].start] = received[offset : offset + b - a]
            offset += b - a
        for n, a, b in _overlaps(self._source, self._target):
            kept = values[n][a - self._source[n].start : b - self._source[n].start]
            moved[n][a - self._target[n].start : b - self._target[n].start] = kept
        return moved


def _overlaps(ours: Sequence[Piece], theirs: Sequence[Piece]) -> list[tuple[int, int, int]]:
    """Number, start and stop of what two divisions of the same parameters have in common."""
    common = []
    for a, b in zip(ours, theirs, strict=True):
        start, stop = max(a.start, b.start), min(a.stop, b.stop)
        if start < stop:
            common.append((a.number, start, stop))
    return common


def _counts(overlaps: Sequence[Sequence[tuple[int, int, int]]]) -> list[int]:
    return [sum(stop - start for _, start, stop in parts) for parts in overlaps]


def _part(tensor: Tensor, piece: Piece) -> Tensor:
    return tensor if piece.whole else tensor.reshape(-1)[piece.start : piece.stop]
