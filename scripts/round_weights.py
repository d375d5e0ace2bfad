"""Weights of 16 bits, rounded stochastically and to the nearest, beside weights of 32: curves of the validation loss.

    python scripts/round_weights.py                               # efcp_mfac, two learning rates, three seeds
    python scripts/round_weights.py --optim efcp_singd --seeds 0
    python scripts/round_weights.py --report                      # table and picture of what is there

The small ViT on scikit-learn's digits, all weights and gradients bfloat16, at AdamW's best rate and at a tenth of it,
whose steps are shorter than half the distance of two numbers of 16 bits. Each finished run is a line of `--file`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from quality_runs import REPOSITORY, Run, append, read, train
from tasks import digits
from transformers.utils import logging

ARMS = {
    "float32": (torch.float32, None),
    "bfloat16, stochastic (default)": (torch.bfloat16, "stochastic"),
    "bfloat16, to the nearest": (torch.bfloat16, "nearest"),
}


def run(arm: str, optimizer: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """A line of the file: the record of the quality benchmark, with the name of its arm."""
    dtype, rounding = ARMS[arm]
    task = digits()
    task = replace(task, new_model=lambda new=task.new_model: new().to(dtype))
    options = {} if rounding is None else {"weight_rounding": rounding}
    return {"arm": arm, **train(Run.of("digits", optimizer, options, rate, seed, (steps, steps)), task)}


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("arm", "optimizer", "learning_rate", "seed", "steps"))


def groups(records: Sequence[dict[str, Any]]) -> dict[tuple[str, float], dict[str, list[dict[str, Any]]]]:
    """Records by (optimizer, learning rate) and arm."""
    found: dict[tuple[str, float], dict[str, list[dict[str, Any]]]] = {}
    for record in records:
        arms = found.setdefault((record["optimizer"], record["learning_rate"]), {})
        arms.setdefault(record["arm"], []).append(record)
    return found


def table(records: Sequence[dict[str, Any]]) -> str:
    """Last loss and accuracy, mean ± standard deviation over the seeds; Markdown."""
    lines = ["| optimizer | learning rate | weights | seeds | last loss | accuracy, % |", "|---|---|---|---|---|---|"]
    for (optimizer, rate), arms in groups(records).items():
        for arm in filter(arms.get, ARMS):
            losses, metrics = ([r[name][-1] for r in arms[arm]] for name in ("loss", "metric"))
            cells = spread(losses, 3), spread([100 * value for value in metrics], 1)
            lines.append(f"| `{optimizer}` | {rate:g} | {arm} | {len(losses)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def draw(records: Sequence[dict[str, Any]], file: Path) -> Path:
    """Mean validation loss over the steps, a panel for each optimizer and rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = groups(records)
    figure, axes = pyplot.subplots(1, len(found), figsize=(6 * len(found), 4), squeeze=False)
    for axis, ((optimizer, rate), arms) in zip(axes[0], found.items(), strict=True):
        for arm in filter(arms.get, ARMS):
            curves = [r["loss"] for r in arms[arm]]
            axis.plot(arms[arm][0]["at"], [statistics.mean(at) for at in zip(*curves, strict=True)], label=arm)
        axis.set_title(f"{optimizer}, learning rate {rate:g}")
        axis.set_xlabel("step")
        axis.set_ylabel("validation loss")
        axis.set_yscale("log")
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return file


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optim", nargs="+", default=["efcp_mfac"])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 1e-4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--file", type=Path, default=REPOSITORY / "scripts" / "results" / "rounding.jsonl")
    parser.add_argument("--picture", type=Path, default=REPOSITORY / "scripts" / "figures" / "rounding.png")
    parser.add_argument("--report", action="store_true", help="only table and picture")
    options = parser.parse_args(argv)
    logging.set_verbosity_error()
    done = {key_of(record) for record in read(options.file)}
    wanted = [
        (arm, name, rate, seed, options.steps)
        for seed in options.seeds
        for name in options.optim
        for rate in options.rates
        for arm in ARMS
    ]
    for case in [] if options.report else [case for case in wanted if case not in done]:
        append(options.file, run(*case))
    records = read(options.file)
    print(table(records))
    print(draw(records, options.picture))


if __name__ == "__main__":
    main()
