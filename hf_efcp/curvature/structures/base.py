"""What a structure of square matrices must do to serve as a Kronecker factor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

_POWER_ITERATIONS = 6
_CHUNK = 64  # rows of a matrix at a time, where a structure has no product of its own: never all d×d


class Structure:
    """A family of d×d matrices M, closed under sums and products, each stored as one vector of `numel` entries.

    A new structure is two methods, `apply` and `extract`, besides `numel`, `identity` and `weight`; the rest follows.
    Others may be overridden where a formula beats passing M's rows through these.

    The projection Π of a symmetric S keeps S's entries inside the structure and doubles those whose mirror image lies
    outside: I + εΠ(S) then has to first order the metric that the symmetric I + εS has (SINGD, arXiv 2312.05705).
    """

    numel: int
    sums_raw = False  # whether `moment` leaves M aside, so that layers with the same rows may share one
    keeps_metric = False  # whether keeping the entries of MMᵀ that `times_metric` needs makes it faster

    def __init__(self, dim: int):
        self.dim = dim

    def identity(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(numel,) the stored entries of I."""
        raise NotImplementedError

    def weight(self, like: Tensor) -> Tensor | float:
        """What Π multiplies each entry by: 2 where its mirror image is not stored, else 1."""
        return 1.0

    def apply(self, values: Tensor, rows: Tensor, transpose: bool = False) -> Tensor:
        """`rows @ M`, or `rows @ Mᵀ`; rows are (n, d)."""
        raise NotImplementedError

    def extract(self, left: Tensor, right: Tensor) -> Tensor:
        """(numel,) the entries inside the structure of `leftᵀ @ right`, both (n, d)."""
        raise NotImplementedError

    def project(self, rows: Tensor) -> Tensor:
        """Π(XᵀX) for X of shape (n, d)."""
        return self.extract(rows, rows) * self.weight(rows)

    def gram(self, values: Tensor) -> Tensor:
        """Π(MᵀM)."""
        return sum(self.project(self.apply(values, unit)) for unit in self._units(values))

    def product(self, values: Tensor, other: Tensor) -> Tensor:
        """The entries of M @ other."""
        return sum(
            self.extract(self.apply(values, unit, transpose=True), self.apply(other, unit))
            for unit in self._units(values)
        )

    def moment(self, values: Tensor, rows: Tensor) -> Tensor:
        """What to sum over batches of rows a: here Π(Mᵀ(Σ aaᵀ)M) itself."""
        return self.project(self.apply(values, rows))

    def finish(self, values: Tensor, moment: Tensor) -> Tensor:
        """Π(MᵀUM) from the sum of `moment`s, which may be scaled."""
        return moment

    def mean_trace(self, values: Tensor) -> Tensor:
        """() tr(M)/d."""
        one = self.identity(values.dtype, values.device)
        return (values * one).sum() / one.sum()

    def moment_trace(self, moment: Tensor) -> Tensor:
        """() tr(U)/d of a raw `moment`."""
        return self.mean_trace(moment)

    def mean_curvature(self, values: Tensor, moment: Tensor, metric: Tensor | None = None) -> Tensor:
        """() tr(MᵀUM)/d, from the sum of `moment`s; `metric` is MMᵀ where it is kept."""
        return self.mean_trace(self.finish(values, moment))

    def metric(self, values: Tensor) -> Tensor:
        """The entries of MMᵀ that `times_metric` needs, where `keeps_metric`."""
        raise NotImplementedError

    def times_metric(self, values: Tensor, rows: Tensor, metric: Tensor | None = None) -> Tensor:
        """`rows @ MMᵀ`; with `metric` where it is kept."""
        return self.apply(values, self.apply(values, rows), transpose=True)

    def metric_times(self, values: Tensor, columns: Tensor, metric: Tensor | None = None) -> Tensor:
        """`MMᵀ @ columns`, columns (d, n)."""
        return self.times_metric(values, columns.T, metric).T

    def metric_times_blocks(self, values: Tensor, blocks: Sequence[Tensor], metric: Tensor | None = None) -> Tensor:
        """`MMᵀ @ columns`, (d, n), of columns in blocks (d, ·)."""
        return self.metric_times(values, torch.cat(list(blocks), 1) if len(blocks) > 1 else blocks[0], metric)

    def write_times_metric(
        self, values: Tensor, rows: Tensor, targets: Sequence[Tensor], metric: Tensor | None = None
    ) -> None:
        """`rows @ MMᵀ` into its column blocks, (n, ·), which are overwritten."""
        product = self.times_metric(values, rows, metric)
        for target, block in zip(targets, product.split([t.shape[1] for t in targets], 1), strict=True):
            target.copy_(block)

    def scaled(self, values: Tensor, factor: Tensor) -> Tensor:
        """`factor · M`."""
        return values * factor

    def mean_square(self, values: Tensor) -> Tensor:
        """() tr(MᵀM)/d, for structures that store each entry of M once."""
        return values.square().sum() / self.dim

    def damped(self, values: Tensor, moment: Tensor, weight: Tensor | float, damping: Tensor | float) -> Tensor:
        """Π(Mᵀ(weight·U + damping·I)M) from the sum of `moment`s."""
        if not self.sums_raw:
            return weight * self.finish(values, moment) + damping * self.gram(values)
        return self.finish(values, self.shifted(moment, weight, damping))

    def shifted(self, moment: Tensor, weight: Tensor | float, damping: Tensor | float) -> Tensor:
        """`weight·U + damping·I` as a raw `moment`."""
        return weight * moment + damping * self.identity(moment.dtype, moment.device)

    def radius(self, values: Tensor) -> Tensor:
        """() the largest eigenvalue's magnitude of an almost symmetric M, from below, by a few power iterations."""
        return self._radius(lambda row: self.apply(values, row), values)

    def _radius(self, apply: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
        # Multiples of the golden ratio: the same always, and orthogonal to nothing that layers learn.
        row = torch.arange(1, self.dim + 1, dtype=torch.float64, device=like.device).mul(0.6180339887).frac() - 0.5
        row = row.to(like.dtype).unsqueeze(0) + 0 * like.flatten()[:1]  # one for each matrix of a batch
        for _ in range(_POWER_ITERATIONS):
            row = apply(row / torch.linalg.vector_norm(row).clamp_min(torch.finfo(row.dtype).tiny))
        return torch.linalg.vector_norm(row)

    def to_dense(self, values: Tensor) -> Tensor:
        """(d, d) M; for tests and small matrices."""
        return self.apply(values, torch.eye(self.dim, dtype=values.dtype, device=values.device))

    def _units(self, like: Tensor) -> Iterator[Tensor]:
        for start in range(0, self.dim, _CHUNK):
            unit = torch.zeros(min(_CHUNK, self.dim - start), self.dim, dtype=like.dtype, device=like.device)
            unit.diagonal(start).fill_(1)
            yield unit
