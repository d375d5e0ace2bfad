"""How much of a snapshot's noise is taken out of a gradient: AGENT's coefficient and others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

_FLAT = 1e-12  # of the mean square: a variance below is rounding, and its slope means nothing


class AgentCoefficient:
    """AGENT's coefficient, from losses alone (arXiv 2301.03573).

        τ_now = Cov(a, o)/Var(o),   τ ← (1 − α)τ + α·clip(τ_now),   c = γτ

    over one pass, with `a` the batches' losses at today's weights and `o` those of the same batches at the snapshot
    that is about to be replaced. Published without a clip: right after the first epoch τ_now is then often far below
    0, and the correction adds variance for the next ones.

    Args:
        gamma: γ. It bounds the variance that can be removed at `1 − (1 − γ)²`, 19 % for 0.1.
        smoothing: α, weight of the newest slope.
        initial: τ before the first pass.
        clip: range of τ_now before it is averaged; `None` for none, as published.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        gamma: float = 0.1,
        smoothing: float = 0.3,
        initial: float = 0.1,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ):
        for name, value in (("gamma", gamma), ("smoothing", smoothing), ("initial", initial)):
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"`{name}` must be a number, got {value!r}.")
            if not math.isfinite(value):
                raise ValueError(f"`{name}` must be finite, got {value}.")
        if not 0 <= smoothing <= 1:
            raise ValueError(f"`smoothing` must be in [0, 1], got {smoothing}.")
        self.gamma, self.smoothing, self.clip = gamma, smoothing, _range(clip)
        self.slope = float(initial)  # τ
        self.newest: float | None = None  # τ_now as measured; None where there was nothing to measure
        self.correlation: float | None = None  # of the two losses, likewise

    @property
    def value(self) -> float:
        """c = γτ."""
        return self.gamma * self.slope

    def update(self, losses: Tensor | Sequence[float], snapshot_losses: Tensor | Sequence[float]) -> float:
        """Take in the losses of a pass, (M,) each, and return the new c.

        The average stays as it is where a slope has no meaning: fewer than two batches, losses at the snapshot that
        are all the same, or any that is not finite.

        Raises:
            ValueError: the two differ in number.
        """
        now, old = (torch.as_tensor(x, dtype=torch.float64).flatten() for x in (losses, snapshot_losses))
        if now.shape != old.shape:
            raise ValueError(f"As many snapshot losses are needed as losses, got {len(old)} and {len(now)}.")
        covariance, variance, of_now, scale = moments(now, old)
        self.include(covariance, variance, scale)
        known = self.newest is not None and of_now > 0
        self.correlation = covariance / math.sqrt(variance) / math.sqrt(of_now) if known else None
        return self.value

    def include(self, covariance: float, variance: float, scale: float) -> float:
        """Take in a slope `covariance/variance`; `scale` is the mean square that `variance` is measured against."""
        self.newest = None
        if math.isfinite(covariance) and math.isfinite(variance) and variance > _FLAT * scale:
            newest = covariance / variance
            if math.isfinite(newest):
                self.newest = newest
                low, high = self.clip or (-math.inf, math.inf)
                self.slope += self.smoothing * (min(high, max(low, newest)) - self.slope)
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"slope": self.slope, "newest": self.newest, "correlation": self.correlation}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.slope, self.newest, self.correlation = state["slope"], state["newest"], state.get("correlation")


def moments(now: Tensor, old: Tensor) -> tuple[float, float, float, float]:
    """Cov(now, old), Var(old), Var(now), unbiased, and the mean square of `old`. NaN where there are fewer than two."""
    if len(now) < 2:
        return math.nan, math.nan, math.nan, 1.0
    d_now, d_old = now - now.mean(), old - old.mean()
    n = len(now) - 1
    return float(d_now @ d_old) / n, float(d_old @ d_old) / n, float(d_now @ d_now) / n, float(old.square().mean())


def _range(clip: Any) -> tuple[float, float] | None:
    if clip is None:
        return None
    try:
        low, high = map(float, clip)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not low <= high:
        raise ValueError(f"`clip` must be (low, high) with low ≤ high, or None, got {clip!r}.")
    return low, high


def linear_decay(value: float, progress: float) -> float:
    """`value·(1 − progress)`, with progress from 0 to 1 over training (α-SVRG, arXiv 2311.05589)."""
    return value * (1 - min(1.0, max(0.0, progress)))
