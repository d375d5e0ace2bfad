"""How many weights each layer keeps: exact counts for a density of the whole."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from hf_efcp.sparsity.allocation import allocate
from hf_efcp.sparsity.maskable import Maskable

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
        first_dense: keep the first layer whole.

    Raises:
        ValueError: an unknown distribution, a density out of range, a pattern without a match, or fixed layers that
            leave the others too much or too little.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"`distribution` must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}.")
    if not 0 < density <= 1:
        raise ValueError(f"`density` must be in (0, 1], got {density}.")
    fixed = _fixed_counts(layers, densities or {}, first_dense)
    free = [layer for layer in layers if layer.name not in fixed]
    rest = round(density * sum(layer.size for layer in layers)) - sum(fixed.values())
    counts = dict(fixed)
    if free:
        sizes = [layer.size for layer in free]
        if not 0 <= rest <= sum(sizes):
            raise ValueError(
                f"density {density:g} of the whole leaves {rest} weights for the {len(free)} layers without a density "
                f"of their own, which have {sum(sizes)}; change it, `densities` or `first_dense`."
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


def _fixed_counts(layers: Sequence[Maskable], densities: Mapping[str, float], first_dense: bool) -> dict[str, int]:
    fixed = {layers[0].name: layers[0].size} if first_dense else {}
    for pattern, density in densities.items():
        if not 0 <= density <= 1:
            raise ValueError(f"`densities`: that of {pattern!r} must be in [0, 1], got {density}.")
        hits = [layer for layer in layers if re.search(pattern, layer.name)]
        if not hits:
            raise ValueError(f"`densities`: no masked layer matches {pattern!r}.")
        fixed.update({layer.name: round(density * layer.size) for layer in hits})
    return fixed
