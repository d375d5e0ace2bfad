"""How many weights each layer keeps: exact counts for a density of the whole."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

from hf_efcp.sparsity.allocation import allocate
from hf_efcp.sparsity.maskable import Maskable, compiled

logger = logging.getLogger(__name__)

DISTRIBUTIONS = ("erk", "er", "uniform")


def nonzero_counts(
    layers: Sequence[Maskable],
    density: float,
    distribution: str = "erk",
    *,
    densities: Mapping[str, float] | None = None,
    first_dense: bool = False,
) -> dict[str, int]:
    """Number of weights that each layer keeps; together `round(density·N)`, exactly.

    `erk`: in layer l the density is `ε·Σshape/∏shape`, at most 1 (Erdős–Rényi kernel, arXiv 1911.11134). `er`: the
    same of its two channel dimensions alone (arXiv 1707.04780). `uniform`: the same density everywhere. Every layer
    keeps a weight, where there are enough.

    Args:
        layers: what is masked.
        density: share of all N weights that is kept, in (0, 1].
        distribution: one of `DISTRIBUTIONS`.
        densities: regular expressions of names, each with a density for those layers; the others share what is left.
        first_dense: keep the first layer whole, where that leaves the others half of the density or more.

    Raises:
        ValueError: an unknown distribution, a density out of range, a pattern without a match, or `densities` that
            leave the other layers too much or too little.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"`distribution` must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}.")
    if not 0 < density <= 1:
        raise ValueError(f"`density` must be in (0, 1], got {density}.")
    fixed = _fixed_counts(layers, densities or {})
    if first_dense and _has_room(layers, density):
        fixed.setdefault(layers[0].name, layers[0].size)
    free = [layer for layer in layers if layer.name not in fixed]
    rest = round(density * sum(layer.size for layer in layers)) - sum(fixed.values())
    counts = dict(fixed)
    if free:
        sizes = [layer.size for layer in free]
        if not 0 <= rest <= sum(sizes):
            raise ValueError(
                f"density {density:g} of the whole leaves {rest} weights for the {len(free)} layers without a density "
                f"of their own, which have {sum(sizes)}; change it or `densities`."
            )
        weights = [size * _raw_density(layer, distribution) for size, layer in zip(sizes, free, strict=True)]
        shares = allocate(rest, weights, sizes, minimum=1 if rest >= len(free) else 0)
        counts.update(zip((layer.name for layer in free), shares, strict=True))
    return {layer.name: counts[layer.name] for layer in layers}


def _raw_density(layer: Maskable, distribution: str) -> float:
    if distribution == "uniform":
        return 1.0
    shape = layer.shape if distribution == "erk" else layer.shape[:2]
    return sum(shape) / math.prod(shape)


def _has_room(layers: Sequence[Maskable], density: float) -> bool:
    first, others = layers[0].size, sum(layer.size for layer in layers[1:])
    if density * (first + others) - first >= 0.5 * density * others:
        return True
    logger.warning("%s is made sparse as the others: dense, it would take most of the weights.", layers[0].name)
    return False


def _fixed_counts(layers: Sequence[Maskable], densities: Mapping[str, float]) -> dict[str, int]:
    fixed: dict[str, int] = {}
    if not isinstance(densities, Mapping):
        raise TypeError(f"`densities` must be a dict of patterns and numbers, got {densities!r}.")
    for pattern, density in densities.items():
        if not isinstance(density, (int, float)) or not 0 <= density <= 1:
            raise ValueError(f"`densities`: that of {pattern!r} must be in [0, 1], got {density!r}.")
        regex = compiled(pattern, "densities")
        hits = [layer for layer in layers if regex.search(layer.name)]
        if not hits:
            raise ValueError(f"`densities`: no masked layer matches {pattern!r}.")
        fixed.update({layer.name: round(density * layer.size) for layer in hits})
    return fixed
