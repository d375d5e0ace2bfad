"""Table and picture of the runs of `train_sparse.py`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LABELS = {
    "rigl": "RigL",
    "agent": "RigL + AGENT",
    "spared": "RigL + AGENT, grown weights spared",
    "bold": "RigL + AGENT, γ = 1, grown weights spared",
    "longer": "RigL, for AGENT's compute",
}
COLORS = {"rigl": "tab:blue", "agent": "tab:orange", "spared": "tab:red", "bold": "tab:purple", "longer": "tab:green"}
CORRECTED = ("agent", "spared", "bold")
Run = dict[str, Any]


def of(runs: Sequence[Run], sparsity: float, arm: str) -> list[Run]:
    """The runs of an arm at a sparsity, by seed."""
    found = [run for run in runs if run["sparsity"] == sparsity and run["arm"] == arm]
    return sorted(found, key=lambda run: run["seed"])


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard deviation; one value alone has none."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def epochs_to(run: Run, accuracy: float) -> int | None:
    """The first epoch whose accuracy is this high; `None` if none is."""
    return next((epoch for epoch, value in enumerate(run["accuracy"], 1) if value >= accuracy), None)


def passes_at(run: Run, epoch: int) -> float:
    """Forward passes over a batch up to the end of an epoch."""
    steps = run["steps"]
    return steps * (3 * epoch + 7 * (epoch - 1)) if run["arm"] in CORRECTED else steps * 3 * epoch


def reached(runs: Sequence[Run], rivals: Sequence[Run]) -> str:
    """Epochs, and passes, to the last accuracy of the rival with the same seed."""
    targets = {run["seed"]: run["accuracy"][-1] for run in rivals}
    found = [(run, epochs_to(run, targets[run["seed"]])) for run in runs if run["seed"] in targets]
    hits = [(epoch, passes_at(run, epoch)) for run, epoch in found if epoch is not None]
    if not hits:
        return f"none of {len(found)}"
    epochs, passes = (statistics.mean(values) for values in zip(*hits, strict=True))
    return f"{epochs:.1f} epochs, {passes:.0f} passes ({len(hits)} of {len(found)})"


def table(runs: Sequence[Run]) -> str:
    """Accuracies at equal epochs and at equal compute, and what it took to reach RigL's last accuracy; Markdown."""
    lines = [
        "| sparsity | method | seeds | epochs | passes | accuracy, % | best epoch, % | to RigL's last accuracy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for sparsity in sorted({run["sparsity"] for run in runs}):
        for arm, label in LABELS.items():
            mine = of(runs, sparsity, arm)
            if not mine:
                continue
            last = spread([100 * run["accuracy"][-1] for run in mine])
            best = spread([100 * max(run["accuracy"]) for run in mine])
            to = reached(mine, of(runs, sparsity, "rigl"))
            size = f"{len(mine)} | {mine[0]['epochs']} | {mine[0]['passes']}"
            lines.append(f"| {sparsity:g} | {label} | {size} | {last} | {best} | {to} |")
    return "\n".join([*lines, "", noise(runs)])


def noise(runs: Sequence[Run]) -> str:
    """Variance ratios of the corrected to the plain gradient, epoch by epoch; median and largest; Markdown.

    The last column is the share of the snapshot's variance that is at weights which are 0 there.
    """
    columns = "c | variance ratio, median | largest | ratio at best c | share at zeros"
    lines = [f"| sparsity | method | epoch | {columns} |", "|---|---|---|---|---|---|---|---|"]
    for sparsity in sorted({run["sparsity"] for run in runs}):
        for arm in CORRECTED:
            figures = [f for run in of(runs, sparsity, arm) for f in run["noise"]]
            for epoch in sorted({round(f["epoch"], 2) for f in figures}):
                here = {k: [f[k] for f in figures if round(f["epoch"], 2) == epoch] for k in figures[0]}
                middle = {k: f"{statistics.median(values):.3f}" for k, values in here.items()}
                largest = f"{max(here['ratio']):.3f}"
                row = middle["c"], middle["ratio"], largest, middle["best_ratio"], middle["at_zeros"]
                lines.append(f"| {sparsity:g} | {LABELS[arm]} | {epoch:g} | {' | '.join(row)} |")
    return "\n".join(lines)


def draw(runs: Sequence[Run], file: Path) -> Path:
    """Accuracy over epochs and over compute, and the variance ratio over training, a row for each sparsity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sparsities = sorted({run["sparsity"] for run in runs}) or [0.9]
    figure, axes = pyplot.subplots(len(sparsities), 3, figsize=(14, 4 * len(sparsities)), squeeze=False)
    for (by_epoch, by_passes, by_noise), sparsity in zip(axes, sparsities, strict=True):
        for arm, label in LABELS.items():
            for number, run in enumerate(of(runs, sparsity, arm)):
                style = {"color": COLORS[arm], "alpha": 0.8, "label": label if number == 0 else None}
                epochs = list(range(1, len(run["accuracy"]) + 1))
                accuracy = [100 * value for value in run["accuracy"]]
                by_epoch.plot(epochs, accuracy, **style)
                by_passes.plot([passes_at(run, epoch) for epoch in epochs], accuracy, **style)
                if run["noise"]:
                    at = [f["epoch"] for f in run["noise"]]
                    by_noise.plot(at, [f["ratio"] for f in run["noise"]], **style)
                    best = f"{label}, best coefficient" if number == 0 else None
                    dotted = {**style, "linestyle": ":", "label": best}
                    by_noise.plot(at, [f["best_ratio"] for f in run["noise"]], **dotted)
        if max((f["ratio"] for run in runs if run["sparsity"] == sparsity for f in run["noise"]), default=1) > 3:
            by_noise.set_yscale("log")
        by_noise.axhline(1, color="grey", linewidth=0.8)
        titles = {by_epoch: "epoch", by_passes: "forward passes (a backward pass is two)", by_noise: "epoch"}
        for axis, title in titles.items():
            axis.set_xlabel(title)
            axis.legend(fontsize=8)
        by_epoch.set_ylabel(f"test accuracy, %, at sparsity {sparsity:g}")
        by_noise.set_ylabel("variance, corrected over plain")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return file
