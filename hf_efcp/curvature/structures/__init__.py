"""Structured matrices by name."""

from __future__ import annotations

import difflib
import re

from hf_efcp.curvature.structures.base import Structure
from hf_efcp.curvature.structures.block import BlockDiagonal
from hf_efcp.curvature.structures.dense import Dense, DenseMetric, Diagonal
from hf_efcp.curvature.structures.hierarchical import Hierarchical
from hf_efcp.curvature.structures.toeplitz import TriangularToeplitz

__all__ = [
    "BlockDiagonal",
    "Dense",
    "DenseMetric",
    "Diagonal",
    "Hierarchical",
    "Structure",
    "TriangularToeplitz",
    "make_structure",
]

_PATTERNS = {
    "dense": lambda dim: Dense(dim),
    "diagonal": lambda dim: Diagonal(dim),
    r"block(\d+)diagonal": lambda dim, block: BlockDiagonal(dim, block),
    r"hierarchical(\d+)_(\d+)": lambda dim, top, bottom: Hierarchical(dim, top, bottom),
    "triltoeplitz": lambda dim: TriangularToeplitz(dim, lower=True),
    "triutoeplitz": lambda dim: TriangularToeplitz(dim, lower=False),
}
_EXAMPLES = ("dense", "diagonal", "block30diagonal", "hierarchical15_15", "triltoeplitz", "triutoeplitz")


def make_structure(name: str, dim: int) -> Structure:
    """The structure called `name` for d×d matrices: `dense`, `block30diagonal` (any size), `hierarchical15_15`, …

    Raises:
        ValueError: no such structure; names the closest one and all of them.
    """
    for pattern, make in _PATTERNS.items():
        match = re.fullmatch(pattern, name)
        if match and all(int(size) >= 1 for size in match.groups()):
            return make(dim, *map(int, match.groups()))
    near = difflib.get_close_matches(name, _EXAMPLES, n=1, cutoff=0.5)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    raise ValueError(f"A structure must be one of {', '.join(_EXAMPLES)} (sizes from 1 on), got {name!r}.{hint}")
