"""How much noise a correction takes out of the gradients of batches."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class VarianceProbe:
    """Traces of Var(g), Var(g̃) and Cov(g, g̃) over batches, from pairs of gradients at θ and at θ̃.

    Keeps two sums of gradients. For a full gradient u of the same batches, `tr Var(g + c(u − g̃))` over `tr Var(g)` is
    `1 − 2c·Cov/Var(g) + c²·Var(g̃)/Var(g)`, least at `c* = Cov/Var(g̃)`.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._now = self._old = self._both = 0.0

    def add(self, now: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> None:
        """Take in one batch's gradients at θ and at θ̃, by name."""
        self.count += 1
        for name, g in now.items():
            a, b = g.double(), old[name].double()
            self._now += float(a.square().sum())
            self._old += float(b.square().sum())
            self._both += float((a * b).sum())
            if name in self._sums:
                self._sums[name][0].add_(a)
                self._sums[name][1].add_(b)
            else:
                self._sums[name] = a.clone(), b.clone()

    def traces(self) -> tuple[float, float, float]:
        """tr Var(g), tr Var(g̃), tr Cov(g, g̃), each divided by the number of batches."""
        n = self.count
        means = [(a / n, b / n) for a, b in self._sums.values()]
        return (
            self._now / n - sum(float(a.square().sum()) for a, _ in means),
            self._old / n - sum(float(b.square().sum()) for _, b in means),
            self._both / n - sum(float((a * b).sum()) for a, b in means),
        )

    def ratio(self, coefficient: float) -> float:
        """tr Var of the corrected gradient over that of the plain one."""
        now, old, both = self.traces()
        return 1 - 2 * coefficient * both / now + coefficient**2 * old / now

    def best(self) -> float:
        """c*, the coefficient with the least variance."""
        _, old, both = self.traces()
        return both / old
