"""Who owns what: the parts of parameters whose state each rank keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Piece:
    """Entries `start` to `stop` of a parameter, flattened.

    Attributes:
        number: of the parameter in its list.
        whole: whether these are all of them, and not a part that happens to be everything.
    """

    number: int
    start: int
    stop: int
    whole: bool = False

    def __len__(self) -> int:
        return self.stop - self.start

    def shape(self, shapes: Sequence[torch.Size]) -> torch.Size:
        """Of the piece's tensors: the parameter's, or flat."""
        return shapes[self.number] if self.whole else torch.Size([len(self)])


def everything(numels: Sequence[int]) -> list[Piece]:
    """Every parameter whole."""
    return [Piece(number, 0, numel, whole=True) for number, numel in enumerate(numels)]


def slices(numels: Sequence[int], unit: int, n_ranks: int) -> list[list[Piece]]:
    """For each rank an equal run of units of the parameters laid end to end, each begun with a unit of its own."""
    counts = [-(-numel // unit) for numel in numels]
    share = -(-sum(counts) // n_ranks)
    owned: list[list[Piece]] = [[] for _ in range(n_ranks)]
    begin = 0
    for number, (numel, count) in enumerate(zip(numels, counts, strict=True)):
        end = begin + count
        for rank in range(begin // share if share else 0, -(-end // share) if share else 0):
            start, stop = max(begin, rank * share) - begin, min(end, (rank + 1) * share) - begin
            whole = stop - start == count
            owned[rank].append(Piece(number, start * unit, min(stop * unit, numel), whole))
        begin = end
    return owned


def chunks(numels: Sequence[int], unit: int, n_ranks: int) -> list[list[Piece]]:
    """For each rank a part of every parameter: of its units, what `torch.chunk` gives that rank. May be empty."""
    owned: list[list[Piece]] = [[] for _ in range(n_ranks)]
    for number, numel in enumerate(numels):
        count = -(-numel // unit)
        share = unit * -(-count // n_ranks)
        for rank, pieces in enumerate(owned):
            pieces.append(Piece(number, min(rank * share, numel), min((rank + 1) * share, numel)))
    return owned


def rows(shapes: Sequence[torch.Size], n_ranks: int) -> list[list[Piece]]:
    """The entries that FSDP2 keeps on each rank: of every parameter, `torch.chunk`'s part of its first axis."""
    return [
        [
            Piece(number, *(min(edge * -(-shape[0] // n_ranks), shape[0]) * shape[1:].numel() for edge in (r, r + 1)))
            for number, shape in enumerate(shapes)
        ]
        for r in range(n_ranks)
    ]


def balanced(costs: Sequence[int], n_ranks: int) -> list[int]:
    """A rank for each of the costs, the largest first to the rank that has the least."""
    loads, ranks = [0] * n_ranks, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda i: -costs[i]):
        rank = loads.index(min(loads))
        loads[rank] += costs[number]
        ranks[number] = rank
    return ranks


def owners(numels: Sequence[int], n_ranks: int, ranks: Sequence[int] | None = None) -> list[list[Piece]]:
    """Every parameter whole with one rank: the one in `ranks`, or such that all have about as many entries."""
    ranks = balanced(numels, n_ranks) if ranks is None else ranks
    owned: list[list[Piece]] = [[] for _ in range(n_ranks)]
    for number, (numel, rank) in enumerate(zip(numels, ranks, strict=True)):
        owned[rank].append(Piece(number, 0, numel, whole=True))
    return owned
