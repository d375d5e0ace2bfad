"""Kernels, optimizer steps and Trainer steps on one NVIDIA GPU, under 8 minutes.

    python scripts/bench_gpu.py                            # all of it, into out/bench_gpu.{jsonl,md,png}
    python scripts/bench_gpu.py                            # again: what is missing, or failed
    python scripts/bench_gpu.py --afresh                   # again: all of it
    python scripts/bench_gpu.py --sections copy kernels
    python scripts/bench_gpu.py --dry-run                  # tiny, on the CPU, in Triton's interpreter: a test of it

The copy bandwidth of the device is measured first, and each kernel's bytes per second are given as a share of it;
bytes are those that have to move at least. ViT-B: 86 million parameters; 1B: sixty 4096×4096. Trainer steps: ViT-B,
images of 224², batch 64, bfloat16, random weights. What the time is too short for, or the memory, is said to be left
out; the same command then goes on with that, at the same commit and on the same device.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read at Triton's import

import torch
from gpu_cases import (
    DRY,
    GPU,
    TRAINED,
    Sizes,
    copy_bandwidth,
    kernels,
    models,
    optimizer_step,
    trainer_step,
    use_backend,
)

SECTIONS = ("copy", "kernels", "steps", "trainer")
# Shares of the copy bandwidth, and of the time beyond that of AdamW, that are aimed at on an H200.
TARGETS = {"push": 0.6, "row dots": 0.7, "window dots": 0.7, "window combine": 0.7, "combine and step": 0.7}
OVERHEADS = {
    "efcp_mfac window=256": 0.10,
    "efcp_mfac window=1024": 0.25,
    "efcp_singd T=10": 0.15,
    "sketchy_shampoo update_freq=10": 0.10,
}


def commit() -> str:
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return told.stdout.strip() or os.environ.get("HF_EFCP_COMMIT", "unknown")


def jobs(sizes: Sizes, sections: list[str], own: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is measured, in order, each a function that gives rows; the dearest last."""
    if "copy" in sections:
        yield "copy", lambda: [{"copy_bytes_per_second": copy_bandwidth(sizes)}]
    shapes = models(sizes)
    if "kernels" in sections:
        for name, window in (("ViT-B", sizes.windows[1]), ("ViT-B", sizes.windows[-1]), ("1B", sizes.windows[1])):
            yield f"kernels {name} m = {window}", lambda n=name, w=window: kernels(n, shapes[n], w, sizes)
    if "trainer" in sections:
        for label in TRAINED:
            yield f"trainer {label}", lambda label=label: [trainer_step(label, sizes)]
    if "steps" in sections:
        for model, optimizer, window in step_cases(sizes, own):
            yield (
                f"step {model} {optimizer} m = {window}",
                lambda m=model, o=optimizer, w=window: [optimizer_step(m, shapes[m], o, w, sizes)],
            )


def step_cases(sizes: Sizes, own: str) -> Iterator[tuple[str, str, int | None]]:
    """Model, optimizer and window of each step that is timed alone."""
    for model in ("ViT-B", "1B"):
        yield model, "AdamW fused", None
        for window in sizes.windows if model == "ViT-B" else sizes.windows[:2]:
            yield model, f"efcp_mfac, {own}", window
            if model == "ViT-B":
                yield model, "efcp_mfac, torch", window
                yield model, "published step", window


def header(sizes: Sizes) -> dict[str, Any]:
    """What figures of one file have in common."""
    return {
        "commit": commit(),
        "device": torch.cuda.get_device_name() if sizes.device == "cuda" else "cpu, interpreted",
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in ("triton", "transformers")},
    }


def finished(path: Path, common: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of jobs that an earlier run with the same header finished; those of a job that was cut off are dropped."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # cut off while it was written
            break
    if rows[:1] != [common]:
        return []
    done = {row["finished"] for row in rows if "finished" in row}
    return [row for row in rows[1:] if row.get("job", row.get("finished")) in done]


def measure(args: argparse.Namespace, sizes: Sizes, own: str, done: set[str]) -> Iterator[dict[str, Any]]:
    """Rows as they come; a job that fails, or that there is no time for, is a row that says so."""
    begin = time.monotonic()
    for name, job in jobs(sizes, args.sections, own):
        if name in done:
            continue
        if time.monotonic() - begin > args.minutes * 60 * 0.9:
            yield {"left_out": name, "why": f"{args.minutes} minutes are over"}
            continue
        use_backend(own if sizes.device == "cpu" else None)
        why = None
        try:
            for row in job():
                yield {"job": name, **row}
        except Exception as error:  # the others may still be worth the device's time
            why = f"{type(error).__name__}: {str(error)[:200]}"
        yield {"finished": name} if why is None else {"left_out": name, "why": why}
        gc.collect()  # out of memory: what the failed job held is garbage by now
        if sizes.device == "cuda":
            torch.cuda.empty_cache()
        print(f"{time.monotonic() - begin:5.0f} s  {name}", file=sys.stderr, flush=True)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: kernels beside the copy, steps and Trainer steps beside AdamW."""
    copy = next((row["copy_bytes_per_second"] for row in rows if "copy_bytes_per_second" in row), None)
    yield from ([f"Copy: {copy / 1e12:.3f} TB/s", ""] if copy else [])
    yield from ("| model | m | kernel | ms | TB/s | of the copy | target |", "|---|---|---|---|---|---|---|")
    for row in (row for row in rows if "kernel" in row):
        rate, target = row["bytes_per_second"], TARGETS.get(row["kernel"])
        share = f"{rate / copy:.0%}" if copy else ""
        aim = f"{target:.0%}" if target else ""
        yield (
            f"| {row['model']} | {row['window']} | {row['kernel']} | {row['ms']:.3f} | {rate / 1e12:.3f} "
            f"| {share} | {aim} |"
        )
    yield from ("", "| model | m | optimizer step | ms | peak GB |", "|---|---|---|---|---|")
    for row in (row for row in rows if "optimizer" in row):
        yield (
            f"| {row['model']} | {row['window'] or ''} | {row['optimizer']} | {row['ms']:.2f} "
            f"| {gigabytes(row['peak_bytes'])} |"
        )
    yield from ("", "| Trainer step | ms | mean | over AdamW | target | peak GB |", "|---|---|---|---|---|---|")
    trained = [row for row in rows if "trainer" in row]
    adamw = next((row["mean_ms"] for row in trained if row["trainer"] == "adamw_torch_fused"), None)
    for row in trained:
        over = f"{row['mean_ms'] / adamw - 1:+.1%}" if adamw else ""
        target = OVERHEADS.get(row["trainer"])
        yield (
            f"| {row['trainer']} | {row['ms']:.1f} | {row['mean_ms']:.1f} | {over} "
            f"| {f'{target:+.0%}' if target else ''} | {gigabytes(row['peak_bytes'])} |"
        )
    yield from (f"\nLeft out: {row['left_out']} ({row['why']})" for row in rows if "left_out" in row)


def gigabytes(n_bytes: int | None) -> str:
    return "" if n_bytes is None else f"{n_bytes / 1e9:.2f}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars: share of the copy bandwidth of each kernel, time of each Trainer step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    copy = next((row["copy_bytes_per_second"] for row in rows if "copy_bytes_per_second" in row), 1.0)
    left = {
        f"{row['kernel']}, {row['model']}, m = {row['window']}": row["bytes_per_second"] / copy
        for row in rows
        if "kernel" in row
    }
    right = {row["trainer"]: row["mean_ms"] for row in rows if "trainer" in row}
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    panels = ((left, "share of the copy bandwidth"), (right, "ms per Trainer step"))
    for ax, (bars, label) in zip(axes, panels, strict=True):
        ax.barh(list(bars), list(bars.values()))
        ax.invert_yaxis()
        ax.set(xlabel=label)
        ax.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU; its times mean nothing")
    parser.add_argument("--afresh", action="store_true", help="measure what an earlier run has measured too")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=7.5, help="start nothing after 0.9 of these")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder (default: %(default)s)")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("bench_gpu.py measures an NVIDIA GPU, and torch sees none here. --dry-run runs it on the CPU, tiny.")
    if not importlib.util.find_spec("triton"):
        sys.exit("bench_gpu.py measures Triton kernels: pip install triton")
    args.out.mkdir(parents=True, exist_ok=True)
    sizes, path = DRY if args.dry_run else GPU, args.out / "bench_gpu.jsonl"
    common = header(sizes)
    rows = [] if args.afresh else finished(path, common)
    done = {row["finished"] for row in rows if "finished" in row}
    with path.open("w") as file:
        for row in (common, *rows):
            print(json.dumps(row), file=file, flush=True)
        for row in measure(args, sizes, "triton", done):
            rows.append(row)
            for stream in (file, sys.stdout):
                print(json.dumps(row), file=stream, flush=True)
    lines = "\n".join(table(rows))
    print("", lines, sep="\n")
    (args.out / "bench_gpu.md").write_text(lines + "\n")
    draw(rows, args.out / "bench_gpu.png")


if __name__ == "__main__":
    main()
