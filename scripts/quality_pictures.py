"""Pictures of the quality benchmark: loss over steps, and the metric over learning rates, a panel a task."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quality_rivals import BASELINE
from quality_runs import TASKS
from quality_tables import Record, by_rate, entries, result_of, whole

COLUMNS = 5


def draw(records: Sequence[Record], path: Path) -> None:
    """Write the picture of `records` to `path`: two rows of loss curves, two of sensitivity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = math.ceil(len(TASKS) / COLUMNS)
    figure, axes = pyplot.subplots(2 * rows, COLUMNS, figsize=(3.2 * COLUMNS, 5.2 * rows), squeeze=False)
    names = dict.fromkeys(name for name, _ in entries(records))
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    for i, task in enumerate(TASKS):
        above, below = axes[i // COLUMNS][i % COLUMNS], axes[rows + i // COLUMNS][i % COLUMNS]
        _losses(above, records, task, colors)
        _sensitivity(below, records, task, colors)
    handles = {label: h for axis in figure.axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=6, fontsize=8)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _losses(axis: Any, records: Sequence[Record], task: str, colors: dict[str, str]) -> None:
    for optimizer, choice in entries(records):
        if result := result_of(records, task, optimizer, choice):
            label = optimizer if optimizer == BASELINE else f"{optimizer}, {choice} rate"
            style = "-" if optimizer == BASELINE or choice != "own" else "--"
            axis.plot(result.at, result.curve, style, color=colors[optimizer], label=label, linewidth=1.2)
    if not axis.lines:
        axis.text(0.5, 0.5, "not run", ha="center", fontsize=8)
    axis.set_title(task, fontsize=9)
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylabel("validation loss", fontsize=8)
    axis.tick_params(labelsize=7)


def _sensitivity(axis: Any, records: Sequence[Record], task: str, colors: dict[str, str]) -> None:
    for optimizer in dict.fromkeys(record["optimizer"] for record in whole(records)):
        results = by_rate(records, task, optimizer)
        if len(results) > 1:
            points = [statistics.mean(result.points) for result in results.values()]
            axis.plot(list(results), points, ".-", color=colors[optimizer], linewidth=1.2)
    axis.set_xscale("log", base=2)
    axis.set_title(task, fontsize=9)
    axis.set_xlabel("learning rate", fontsize=8)
    axis.set_ylabel("metric, points", fontsize=8)
    axis.tick_params(labelsize=7)
