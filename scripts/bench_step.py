"""Time of an S-M-FAC step beside the published one and AdamW, in one run.

    python scripts/bench_step.py                     # d = 1M as four 500×500, density 1 %, m = 32, 256, 1024
    python scripts/bench_step.py --window 256 --steps 40 --json out/bench_step.json

Process time on one thread, warm, window full, medians; use the ratios. Memory is counted from the tensors that live
between steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from published_mfac import PublishedMFAC

from hf_efcp.optim import MFAC


def make_params(generator: torch.Generator, side: int = 500, count: int = 4) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.randn(side, side, generator=generator) * 0.02) for _ in range(count)]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * 0.01
    return params


def milliseconds(optimizer: object, params: list[torch.nn.Parameter], steps: int) -> float:
    """Median process time of a step; gradients change between steps, outside the clock."""
    times = []
    for number in range(steps + 2):
        for p in params:
            p.grad = p.grad.roll(12345).mul_(0.9).add_(p.grad, alpha=0.1)
        start = time.process_time()
        optimizer.step()
        if number >= 2:
            times.append(time.process_time() - start)
    return statistics.median(times) * 1e3


def fill(optimizer: MFAC, params: list[torch.nn.Parameter], window: int, generator: torch.Generator) -> None:
    for _ in range(window):
        for p in params:
            p.grad.normal_(generator=generator).mul_(0.01)
        optimizer.step()


def measure(window: int, steps: int, density: float) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    params = make_params(generator)
    size = sum(p.numel() for p in params)
    rows = []

    def add(name: str, optimizer: object, state_bytes: int) -> None:
        rows.append({"optimizer": name, "window": window, "ms": milliseconds(optimizer, params, steps)})
        rows[-1]["bytes_per_parameter"] = state_bytes / size

    published = PublishedMFAC(params, 1e-6, window=window, damping=1e-4, density=density)
    published.fill(generator)
    add("published step", published, published.state_bytes())
    common = {"window": window, "density": density, "damping": 1e-4, "damping_mode": "absolute", "momentum": 0.0}
    for name, options in {
        "S-M-FAC float32": {"precondition": "compressed", "scaling": "none"},
        "S-M-FAC bfloat16": {"precondition": "compressed", "scaling": "none", "value_dtype": "bfloat16"},
        "S-M-FAC on the dense gradient": {"precondition": "gradient", "scaling": "rms"},
    }.items():
        ours = MFAC(params, 1e-6, **common, **options)
        fill(ours, params, window, generator)
        add(name, ours, ours.state_bytes())
    adamw = torch.optim.AdamW(params, lr=1e-6, foreach=True)
    add("AdamW foreach", adamw, 8 * size)
    for row in rows:
        row["speed_up"] = rows[0]["ms"] / row["ms"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, nargs="+", default=[32, 256, 1024])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print(f"torch {torch.__version__}, 1 thread, d = 1,000,000, density {args.density:g}, {commit.stdout.strip()}\n")
    print("| m | optimizer | ms | × published | bytes per parameter |\n|---|---|---|---|---|")
    rows = []
    for window in args.window:
        for row in measure(window, args.steps, args.density):
            rows.append(row)
            print(
                f"| {window} | {row['optimizer']} | {row['ms']:.2f} | {row['speed_up']:.1f} | "
                f"{row['bytes_per_parameter']:.1f} |",
                flush=True,
            )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"commit": commit.stdout.strip(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
