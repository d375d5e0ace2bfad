"""Time of an S-Shampoo step beside full Shampoo and AdamW, and of its parts.

    python scripts/bench_sketchy.py                            # one 768×3072 matrix, rank 64
    python scripts/bench_sketchy.py --shape 768 768 --rank 32 --json out/bench_sketchy.json

Process time on one thread, medians; use the ratios. Update is that of the sketches, or matrices and roots, of both
axes; apply multiplies a gradient by the roots of both; step is the optimizer's between two updates, without momentum
and grafting: apply, checks and the change of the weights. Full Shampoo is `GGᵀ`, `eigh` and root of both whole axes in
float32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from hf_efcp.optim import SketchyShampoo
from hf_efcp.optim.partition import partition
from hf_efcp.optim.sketch_state import BlockSketches, Due


class FullShampoo:
    """Shampoo of one matrix as it is published: `L ← β₂L + GGᵀ`, `R` alike, `L^{-1/4} G R^{-1/4}`."""

    def __init__(self, shape: tuple[int, int], beta2: float = 0.999):
        self.sums = [torch.zeros(d, d) for d in shape]
        self.roots = [torch.eye(d) for d in shape]
        self.beta2 = beta2

    def update(self, gradient: Tensor) -> None:
        for i, matrix in enumerate((gradient, gradient.T)):
            self.sums[i].mul_(self.beta2).addmm_(matrix, matrix.T)
            values, vectors = torch.linalg.eigh(self.sums[i])
            self.roots[i] = (vectors * values.clamp_min(1e-7 * values[-1]) ** -0.25) @ vectors.T

    def apply(self, gradient: Tensor) -> Tensor:
        return self.roots[0] @ gradient @ self.roots[1]


def milliseconds(run: Callable[[], object], repeats: int, before: Callable[[], object] = lambda: None) -> float:
    """Median process time; `before` is outside of the clock."""
    times = []
    for _ in range(repeats):
        before()
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times)


class Drift:
    """A new gradient each time, not far from the last."""

    def __init__(self, shape: tuple[int, int]):
        self.generator = torch.Generator().manual_seed(0)
        self.gradient = torch.randn(shape, generator=self.generator)

    def __call__(self) -> Tensor:
        noise = torch.randn(self.gradient.shape, generator=self.generator)
        self.gradient.mul_(0.9).add_(noise, alpha=0.1)
        return self.gradient


def sketchy_times(shape: tuple[int, int], repeats: int, **options: object) -> tuple[dict[str, float], SketchyShampoo]:
    """Of update, apply and step, and the optimizer."""
    weight = torch.nn.Parameter(torch.zeros(shape))
    new_gradient = Drift(shape)
    optimizer = SketchyShampoo([weight], 1e-6, update_freq=1 << 19, grafting="none", momentum=0.0, **options)
    weight.grad = new_gradient()
    optimizer.step()
    (block,) = partition(shape, None, optimizer.defaults["max_dim"], one_sided=False)
    sketches = BlockSketches([optimizer.state[weight]], 0, block, optimizer.defaults, accept=None)
    seeds = itertools.count(1)
    return {
        "update": milliseconds(lambda: sketches.update(weight.grad[None], Due(next(seeds), 1)), repeats, new_gradient),
        "apply": milliseconds(lambda: sketches.precondition(weight.grad[None]), repeats, new_gradient),
        "step": milliseconds(optimizer.step, repeats, new_gradient),
    }, optimizer


def measure(shape: tuple[int, int], rank: int, repeats: int) -> list[dict[str, object]]:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    numel = gradient.numel()
    rows = []

    def add(name: str, times: dict[str, float], size: int) -> None:
        rows.append({"optimizer": name, "ms": times, "bytes_per_parameter": size / numel})

    for name, options in {
        "S-Shampoo, subspace": {"sketch_update": "subspace"},
        "S-Shampoo, exact": {"sketch_update": "exact"},
        "S-Shampoo, subspace, bfloat16": {"sketch_update": "subspace", "sketch_dtype": "bfloat16"},
    }.items():
        times, optimizer = sketchy_times(shape, repeats, rank=rank, **options)
        add(name, times, optimizer.state_bytes())
    full = FullShampoo(shape)
    times = {
        "update": milliseconds(lambda: full.update(gradient), 2),
        "apply": milliseconds(lambda: full.apply(gradient), repeats),
    }
    add("full Shampoo, eigh", times, 8 * sum(d * d for d in shape))
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = gradient
    adamw = torch.optim.AdamW([weight], foreach=True)
    adamw.step()
    add("AdamW foreach", {"step": milliseconds(adamw.step, repeats)}, 8 * numel)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[768, 3072])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    shape = "×".join(map(str, args.shape))
    print(f"torch {torch.__version__}, 1 thread, {shape}, rank {args.rank}, {commit.stdout.strip()}\n")
    print("| optimizer | update, ms | apply, ms | step, ms | bytes per parameter |\n|---|---|---|---|---|")
    rows = measure(tuple(args.shape), args.rank, args.repeats)
    for row in rows:
        times = [f"{row['ms'][part]:.1f}" if part in row["ms"] else "" for part in ("update", "apply", "step")]
        print(f"| {' | '.join([row['optimizer'], *times])} | {row['bytes_per_parameter']:.2f} |")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"commit": commit.stdout.strip(), "shape": args.shape, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
