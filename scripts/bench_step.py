"""Time of S-M-FAC and S-GGT steps beside the published S-M-FAC step and AdamW, in one run.

    python scripts/bench_step.py                     # d = 1M as four 500×500, density 1 %, m = 32, 256, 1024
    python scripts/bench_step.py --window 256 --steps 40 --json out/bench_step.json
    python scripts/bench_step.py --size 1e7 --window 32 --threads 1 2 --rivals adamw copy
    python scripts/bench_step.py --sweep --json out/sweep.json --picture out/sweep.png

Warm, window full, medians; use the ratios. One thread: process time, which a busy machine disturbs least. Several:
time on the wall. Memory is counted from the tensors that live between steps. `--sweep` measures against d at m = 32,
to 100M as memory allows, and against m from 8 to 2048 at d = 1M; what stands in `--json` is not measured again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from published_mfac import PublishedMFAC

from hf_efcp.ops import backend
from hf_efcp.optim import GGT, MFAC

BACKENDS = ("torch", "numba") if importlib.util.find_spec("numba") else ("torch",)
BLOCK_SIZE = 4096
HEADER = "| d | m | optimizer | backend | threads | ms | × published | bytes per parameter |"


def run_on(name: str) -> None:
    os.environ[backend.VARIABLE] = name
    backend.cpu_backend.cache_clear()


def make_params(size: int, generator: torch.Generator) -> list[torch.nn.Parameter]:
    side = round((size / 4) ** 0.5)
    params = [torch.nn.Parameter(torch.randn(side, side, generator=generator) * 0.02) for _ in range(4)]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * 0.01
    return params


def milliseconds(optimizer: Any, params: list[torch.nn.Parameter], steps: int, clock: Callable[[], float]) -> float:
    """Median time of a step; gradients change between steps, outside the clock."""
    times = []
    for number in range(steps + 2):
        for p in params:
            p.grad = p.grad.roll(12345).mul_(0.9).add_(p.grad, alpha=0.1)
        start = clock()
        optimizer.step()
        if number >= 2:
            times.append(clock() - start)
    return statistics.median(times) * 1e3


class Copy:
    """As a rival: the weights read and written elsewhere, which no step is faster than, on any number of threads."""

    def __init__(self, params: list[torch.nn.Parameter]):
        self.params, self.copies = params, [torch.empty_like(p) for p in params]

    def step(self) -> None:
        for p, copy in zip(self.params, self.copies, strict=True):
            copy.copy_(p.detach())


def fill(optimizer: MFAC | GGT, params: list[torch.nn.Parameter], generator: torch.Generator) -> None:
    for _ in range(optimizer.defaults["window"]):
        for p in params:
            p.grad.normal_(generator=generator).mul_(0.01)
        optimizer.step()


def ours(params: list[torch.nn.Parameter], window: int, density: float, variants: bool) -> Iterator[tuple[str, Any]]:
    """The optimizers of this package that are measured, with a name, their windows empty."""
    common = {"window": window, "density": density, "block_size": BLOCK_SIZE, "momentum": 0.0, "lr": 1e-6}
    absolute = {"damping": 1e-4, "damping_mode": "absolute"}
    rule = {"precondition": "compressed", "scaling": "none", "value_dtype": "float32", "residual_dtype": "float32"}
    yield "S-M-FAC", MFAC(params, **common, **absolute, **rule)
    if variants:
        bfloat16 = {**rule, "value_dtype": "bfloat16", "residual_dtype": "bfloat16"}
        yield "S-M-FAC bfloat16", MFAC(params, **common, **absolute, **bfloat16)
        dense = {**bfloat16, "precondition": "gradient", "scaling": "adam", "moment_dtype": "bfloat16"}
        yield "S-M-FAC, dense gradient, Adam", MFAC(params, **{**common, "momentum": 0.9, **dense})
    if variants and window == 32:  # once
        common["window"] = 100
        yield "S-GGT", GGT(params, **common, **rule)


def measure(size: int, window: int, args: argparse.Namespace, variants: bool) -> Iterator[dict[str, Any]]:
    """Rows of the table for one size and window: the rivals first, then this package on each backend."""
    generator = torch.Generator().manual_seed(0)
    params = make_params(size, generator)
    size = sum(p.numel() for p in params)
    clock = time.process_time if args.threads == [1] else time.perf_counter
    published_ms: dict[int, float] = {}

    def rows(name: str, optimizer: Any, state_bytes: int, on: str = "") -> Iterator[dict[str, Any]]:
        for threads in args.threads:
            torch.set_num_threads(threads)
            ms = milliseconds(optimizer, params, args.steps, clock)
            if name == "published step":
                published_ms[threads] = ms
            yield {
                "size": size,
                "window": window,
                "optimizer": name,
                "backend": on,
                "threads": threads,
                "ms": ms,
                "speed_up": published_ms[threads] / ms if threads in published_ms else None,
                "bytes_per_parameter": state_bytes / size,
            }

    torch.set_num_threads(max(args.threads))
    if "published" in args.rivals:
        published = PublishedMFAC(params, 1e-6, window=window, damping=1e-4, density=args.density)
        published.fill(generator)
        yield from rows("published step", published, published.state_bytes())
        del published
    if "adamw" in args.rivals:
        yield from rows("AdamW foreach", torch.optim.AdamW(params, lr=1e-6, foreach=True), 8 * size)
    if "copy" in args.rivals:
        yield from rows("copy of the weights", Copy(params), 0)
    for name, optimizer in ours(params, window, args.density, variants):
        run_on(BACKENDS[-1])
        torch.set_num_threads(max(args.threads))
        fill(optimizer, params, generator)
        for on in args.backends:
            run_on(on)
            for row in rows(name, optimizer, optimizer.state_bytes(), on):
                yield {**row, "window": optimizer.defaults["window"]}


def line(row: dict[str, Any]) -> str:
    ratio = "" if row["speed_up"] is None or row["optimizer"] == "S-GGT" else f"{row['speed_up']:.1f}"
    return (
        f"| {row['size']:,} | {row['window']} | {row['optimizer']} | {row['backend']} | {row['threads']} "
        f"| {row['ms']:.2f} | {ratio} | {row['bytes_per_parameter']:.1f} |"
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time against d and against m, one line an optimizer and backend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    panels = (("size", "window", 32, "parameters d"), ("window", "size", 1_000_000, "window m"))
    for ax, (x, fixed, value, label) in zip(axes, panels, strict=True):
        part = [row for row in rows if row["asked_size" if fixed == "size" else fixed] == value]
        for name, on in dict.fromkeys((row["optimizer"], row["backend"]) for row in part):
            points = {row[x]: row["ms"] for row in part if (row["optimizer"], row["backend"]) == (name, on)}
            ax.plot(sorted(points), [points[at] for at in sorted(points)], "o-", label=f"{name} {on}".strip())
        ax.set(xscale="log", yscale="log", xlabel=label, title=f"{fixed} {value:,}")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("ms per step")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def cases(args: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Sizes and windows."""
    if not args.sweep:
        yield from ((int(args.size), window) for window in args.window)
        return
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sizes = [size for size in (10**5, 10**6, 10**7, 10**8) if 60 * size < available]
    swept = [(size, 32) for size in sizes] + [(10**6, window) for window in (8, 128, 512, 2048)]
    yield from sorted(swept, key=lambda case: case[0] * case[1])  # the cheap ones first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=1e6, help="parameters d")
    parser.add_argument("--window", type=int, nargs="+", default=[32, 256, 1024])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rivals", nargs="*", choices=["published", "adamw", "copy"], default=["published", "adamw"])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--sweep", action="store_true", help="cost against d and against m")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--picture", type=Path, help="with --sweep: draw there")
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    where = f"{processor()}, torch {torch.__version__}, commit {commit.stdout.strip()}"
    print(f"{where}, seed 0, density {args.density:g}, blocks of {BLOCK_SIZE}\n")
    print(HEADER, "|---|---|---|---|---|---|---|---|", sep="\n")
    rows = read(args.json) if args.sweep else []
    for row in rows:
        print(line(row))
    measured = {(row["asked_size"], row["window"]) for row in rows}
    for size, window in cases(args):
        if (size, window) in measured:
            continue
        found = []
        for row in measure(size, window, args, variants=not args.sweep):
            found.append({**row, "asked_size": size, "commit": commit.stdout.strip()})
            print(line(row), flush=True)
        rows += found
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({"rows": rows}, indent=1))
    if args.picture:
        draw(rows, args.picture)


def processor() -> str:
    """Its name, on Linux."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "unknown processor")


def read(path: Path | None) -> list[dict[str, Any]]:
    """The rows of a sweep that was broken off."""
    return json.loads(path.read_text())["rows"] if path and path.exists() else []


if __name__ == "__main__":
    main()
