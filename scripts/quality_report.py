"""The reports of the quality benchmark: everything, for the console, and what stands in the README."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from quality_rivals import BASELINE
from quality_runs import TASKS, default_settings
from quality_tables import NEVER, OURS, Record, entries, markdown, per_task, summary, task_table, unlearned, whole

BEGIN, END = "<!-- made by scripts/bench_quality.py -->\n", "<!-- end -->\n"


def published(records: Sequence[Record]) -> str:
    """The README's tables, with what they rest on."""
    used = whole(records)
    commits = ", ".join(dict.fromkeys(record["commit"] for record in used))
    machines = ", ".join(dict.fromkeys(record["hardware"] for record in used))
    first = [entry for entry in entries(records) if entry[0] in (BASELINE, *OURS[:2]) and entry[0] != "own"]
    rest = [entry for entry in entries(records) if entry not in first]
    tables = [per_task(records, columns) for columns in (first, rest) if columns]
    return "\n\n".join([
        f"{len(used)} runs (commits {commits}; {machines}), through the Trainer, each optimizer's defaults untouched. "
        "AdamW's best loss is the lowest validation loss of its mean curve at its best of four learning rates; steps "
        f"count at eight evaluations a run, and a task where it is never reached counts {NEVER:g}. "
        + _left_out(records),
        summary(records),
        "Lowest validation loss; metric at the last step in points (accuracy, or Matthews' correlation for CoLA, "
        "Pearson's for STS-B, F1 of entities for WNUT-17), mean ± standard deviation over the seeds in brackets:",
        *tables,
        *studies(records),
    ]) + "\n"  # fmt: skip


def _left_out(records: Sequence[Record]) -> str:
    tasks = unlearned(records)
    if not tasks:
        return "All tasks count."
    return (
        f"Not counted: {', '.join(tasks)}, where AdamW's loss falls by less than the spread of its seeds, "
        "so that its best is chance."
    )


def update_readme(path: Path, records: Sequence[Record]) -> None:
    """Replace what stands between the markers. Raises `ValueError` where they are missing."""
    text = path.read_text()
    if BEGIN not in text or END not in text.split(BEGIN, 1)[1]:
        raise ValueError(f"{path} has no lines `{BEGIN.strip()}` and `{END.strip()}`.")
    before, rest = text.split(BEGIN, 1)
    path.write_text(before + BEGIN + published(records) + END + rest.split(END, 1)[1])


def full_report(records: Sequence[Record]) -> str:
    """Summary, losses at all evaluated steps by learning rate, and the study of single options."""
    used = whole(records)
    parts = [summary(records)] if used else []
    parts += [task_table(records, task) for task in TASKS if any(record["task"] == task for record in used)]
    parts += studies(records)
    return "\n\n".join(parts) or "no finished run"


def studies(records: Sequence[Record]) -> list[str]:
    """The study of single options of each optimizer, with what its figures are; empty where none was run."""
    ours = dict.fromkeys(record["optimizer"] for record in records if record["settings"])
    tables = [table for name in ours if (table := study(records, name))]
    if not tables:
        return []
    return [
        "Options beside the defaults: last validation loss over that of the defaults, same task, learning rate and "
        "seed; the number of pairs in brackets, and below 1 the option is better:",
        *tables,
    ]


def study(records: Sequence[Record], optimizer: str) -> str:
    """Options that are not the defaults: last validation loss over that of the defaults, same task, rate, seed, stop.

    Each cell is the mean of these ratios and the number of pairs; below 1 the option is the better.
    """
    own = [record for record in records if record["optimizer"] == optimizer]
    today = default_settings(optimizer)  # what a record older than an option ran with
    usual = {_circumstances(record): record for record in own if record["defaults"]}
    ratios: dict[str, dict[str, list[float]]] = {}
    for record in own:
        base = usual.get(_circumstances(record))
        if base is None or record["defaults"]:
            continue
        changed = {k: v for k, v in record["settings"].items() if {**today, **base["settings"]}.get(k) != v}
        loss, reference = record["loss"][-1], base["loss"][base["at"].index(record["at"][-1])]
        ratio = math.inf if loss is None or reference is None else loss / reference
        label = ",".join(f"{name}={value}" for name, value in changed.items())
        ratios.setdefault(label, {}).setdefault(record["task"], []).append(ratio)
    if not ratios:
        return ""
    tasks = [task for task in TASKS if any(task in cells for cells in ratios.values())]
    rows = [[optimizer, *tasks, "mean of tasks"]]
    for label, cells in ratios.items():
        means = {task: statistics.mean(values) for task, values in cells.items()}
        shown = [f"{means[task]:.3f} ({len(cells[task])})" if task in means else "" for task in tasks]
        rows.append([label, *shown, f"{statistics.mean(means.values()):.3f}"])
    return markdown(rows)


def _circumstances(record: Record) -> str:
    return json.dumps([record[name] for name in ("task", "learning_rate", "seed", "steps", "stop")])
