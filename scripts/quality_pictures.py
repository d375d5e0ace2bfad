"""Pictures of the quality benchmark: loss over steps, and the metric over learning rates, a panel a task."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quality_rivals import BASELINE
from quality_runs import TASKS
from quality_tables import OURS, Record, by_rate, entries, result_of, whole

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


def draw_overview(records: Sequence[Record], path: Path) -> None:
    """The README's first picture: losses of AdamW and ours on the tasks that were run, and bytes per parameter."""
    from hf_efcp.plot import new_figure

    tasks = [task for task in TASKS if result_of(records, task, BASELINE, "own")]
    columns = min(len(tasks) + 1, COLUMNS)
    rows = math.ceil((len(tasks) + 1) / columns)
    figure = new_figure(2.7 * columns, 2.5 * rows + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    names = [name for name, choice in entries(records) if name in (BASELINE, *OURS[:2]) and choice != "own"]
    colors = {name: f"C{i}" for i, name in enumerate([BASELINE, *names])}
    for axis, task in zip(axes, tasks, strict=False):
        shown = [(BASELINE, "own"), *((name, "AdamW's") for name in names)]
        _losses(axis, records, task, colors, shown)
    _bytes_per_parameter(axes[len(tasks)], colors)
    for axis in axes[len(tasks) + 1 :]:
        axis.remove()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    figure.savefig(path, dpi=110)


def _bytes_per_parameter(axis: Any, colors: dict[str, str]) -> None:
    """What `hf-efcp memory bert` counts with every optimizer's defaults."""
    from hf_efcp.memory import footprint, meta_model

    model, _ = meta_model("bert")
    counts = {name: footprint(model, name, {}) for name in colors if name != BASELINE}
    sizes = {BASELINE: next(iter(counts.values())).adamw, **{name: count.state for name, count in counts.items()}}
    values = [size / next(iter(counts.values())).n_trained for size in sizes.values()]
    drawn = axis.barh(list(sizes), values, color=[colors[name] for name in sizes])
    axis.bar_label(drawn, labels=[f"{value:.2f}" for value in values], padding=3, fontsize=8)
    axis.set_xlim(0, 1.3 * max(values))
    axis.set_yticks([])
    axis.invert_yaxis()
    axis.set_title("bytes per parameter, BERT-base", fontsize=9)
    axis.tick_params(labelsize=7)


def _losses(
    axis: Any, records: Sequence[Record], task: str, colors: dict[str, str], shown: Sequence[tuple[str, str]] = ()
) -> None:
    for optimizer, choice in shown or entries(records):
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
