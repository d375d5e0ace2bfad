"""Figures and Markdown tables of the quality benchmark, from its log alone.

AdamW's best validation loss on a task is the lowest of its curve, the mean over seeds, at its best learning rate;
another optimizer's steps to it are those of the first evaluation whose mean loss is no higher. Both count from the same
seeds and at evaluated steps, without interpolation. Points are hundredths of the metric at the last step. A task that
AdamW does not learn has a best loss that is chance, and is not compared.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quality_rivals import BASELINE
from quality_runs import TASKS, default_settings

Record = Mapping[str, Any]
OURS = ("efcp_mfac", "sketchy_shampoo", "efcp_ggt", "efcp_singd", "sketchy_adagrad")
NEVER = 2.0  # a run that never reaches AdamW's best loss counts as twice AdamW's steps in a mean


@dataclass(frozen=True)
class Result:
    """An optimizer on a task at one learning rate, over the seeds that were run."""

    records: tuple[Record, ...]

    @property
    def seeds(self) -> set[int]:
        return {record["seed"] for record in self.records}

    @property
    def rate(self) -> float:
        return self.records[0]["learning_rate"]

    @property
    def at(self) -> list[int]:
        return self.records[0]["at"]

    @property
    def curve(self) -> list[float]:
        """Mean validation loss at `at`; infinite where a seed diverged."""
        return [statistics.mean(losses) for losses in zip(*map(_losses, self.records), strict=True)]

    @property
    def lowest(self) -> list[float]:
        """Lowest validation loss of each seed."""
        return [min(_losses(record)) for record in self.records]

    @property
    def points(self) -> list[float]:
        """Metric of each seed at the last step, in points; 0 where it is not finite."""
        return [100 * (record["metric"][-1] or 0.0) for record in self.records]

    def of_seeds(self, seeds: set[int]) -> Result:
        return Result(tuple(record for record in self.records if record["seed"] in seeds))


def _losses(record: Record) -> list[float]:
    return [math.inf if loss is None else loss for loss in record["loss"]]


def whole(records: Sequence[Record]) -> list[Record]:
    """The runs that went to the end of their schedule, each optimizer's at one set of defaults."""
    ended = [record for record in records if record["stop"] == record["steps"]]
    return [record for name in dict.fromkeys(r["optimizer"] for r in ended) for record in at_defaults(ended, name)]


def at_defaults(records: Sequence[Record], optimizer: str) -> list[Record]:
    """Those of `optimizer` at today's defaults; where there are none, at the defaults of its last record with such.

    An option that came after a record ran as its default does now.
    """
    own = [record for record in records if record["optimizer"] == optimizer]
    usual = default_settings(optimizer)
    today = [record for record in own if {**usual, **record["settings"]} == usual]
    older = [record for record in own if record["defaults"]]
    return today or [record for record in older if record["settings"] == older[-1]["settings"]]


def by_rate(records: Sequence[Record], task: str, optimizer: str) -> dict[float, Result]:
    """Results by learning rate, ascending."""
    found: dict[float, list[Record]] = {}
    for record in whole(records):
        if record["task"] == task and record["optimizer"] == optimizer:
            found.setdefault(record["learning_rate"], []).append(record)
    return {rate: Result(tuple(sorted(found[rate], key=lambda r: r["seed"]))) for rate in sorted(found)}


def best(results: Mapping[float, Result]) -> Result | None:
    """That with the lowest mean of lowest losses, over the seeds that all rates have."""
    if not results:
        return None
    common = set.intersection(*(result.seeds for result in results.values()))
    return min(
        results.values(), key=lambda result: statistics.mean((result.of_seeds(common) if common else result).lowest)
    )


def learns(result: Result) -> bool:
    """Whether the curve falls below its first evaluation by more than the standard deviation over the seeds."""
    spread = statistics.stdev(result.lowest) if len(result.records) > 1 else 0.0
    return result.curve[0] - min(result.curve) > spread


def unlearned(records: Sequence[Record]) -> list[str]:
    """The tasks that AdamW ran and did not learn, at its best learning rate."""
    found = {task: result_of(records, task, BASELINE, "own") for task in TASKS}
    return [task for task, result in found.items() if result and not learns(result)]


def steps_to(result: Result, base: Result) -> float | None:
    """Steps to the lowest loss of `base` as a share of its own steps to it; `None` where it is never reached."""
    common = result.seeds & base.seeds
    if not common:
        return None
    result, base = result.of_seeds(common), base.of_seeds(common)
    target = min(base.curve)
    reached = [step for step, loss in zip(result.at, result.curve, strict=True) if loss <= target]
    return reached[0] / base.at[base.curve.index(target)] if reached else None


def seconds_to(result: Result, base: Result) -> float | None:
    """As `steps_to`, in seconds of training without evaluations."""
    share = steps_to(result, base)
    common = result.seeds & base.seeds
    if share is None:
        return None
    base = base.of_seeds(common)
    last = base.curve.index(min(base.curve))
    first = result.at.index(round(share * base.at[last]))
    mean = [statistics.mean(r["seconds"][i] for r in which.records if r["seed"] in common)
            for which, i in ((result, first), (base, last))]  # fmt: skip
    return mean[0] / mean[1]


def gained(result: Result, base: Result) -> float:
    """Points above AdamW's, at the last step and over common seeds."""
    common = result.seeds & base.seeds
    return statistics.mean(result.of_seeds(common).points) - statistics.mean(base.of_seeds(common).points)


def width(results: Mapping[float, Result]) -> tuple[float, bool]:
    """Octaves of learning rate around the best in which the metric stays within a point of it, and whether they end.

    Linear between the rates that were run; the second is False where the metric is that good at the lowest or highest.
    """
    logs = [math.log2(rate) for rate in results]
    metric = [statistics.mean(result.points) for result in results.values()]
    top = metric.index(max(metric))
    octaves, ends = 0.0, True
    for direction in (-1, 1):
        i = top
        while True:
            j = i + direction
            if not 0 <= j < len(logs):
                ends = False
                break
            share = 1.0 if metric[j] >= metric[top] - 1 else (metric[i] - metric[top] + 1) / (metric[i] - metric[j])
            octaves += share * abs(logs[j] - logs[i])
            if share < 1:
                break
            i = j
    return octaves, ends


def mean_and_std(values: Sequence[float], digits: int) -> str:
    """A single value stands without a deviation."""
    if not all(map(math.isfinite, values)):
        return "diverged"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def entries(records: Sequence[Record]) -> list[tuple[str, str]]:
    """What has a row of its own: (optimizer, how its learning rate was chosen), in the order of the tables."""
    ran = {record["optimizer"] for record in whole(records)}
    rivals = [name for name in dict.fromkeys(r["optimizer"] for r in whole(records)) if name not in (BASELINE, *OURS)]
    ours = [(name, "AdamW's") for name in OURS if name in ran]
    own = [(name, "own") for name in OURS if name in ran and any(len(by_rate(records, t, name)) > 3 for t in TASKS)]
    return [(BASELINE, "own"), *ours, *own, *((name, "own") for name in rivals)]


def result_of(records: Sequence[Record], task: str, optimizer: str, choice: str) -> Result | None:
    """The result for a table; an optimizer's own best rate is that of at least four."""
    results = by_rate(records, task, optimizer)
    if choice == "own":
        return best(results) if len(results) >= 4 else None
    base = best(by_rate(records, task, BASELINE))
    return results.get(base.rate) if base else None


def markdown(rows: Sequence[Sequence[str]]) -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


HEADER = ("optimizer", "learning rate", "tasks", "AdamW's best loss reached", "steps to it, × AdamW's",
          "seconds to it, × AdamW's", "points over AdamW, mean", "worst", "octaves within 1 point",
          "bytes per parameter")  # fmt: skip


def summary(records: Sequence[Record]) -> str:
    """A row an optimizer: steps and seconds to AdamW's best loss, points, memory, sensitivity to the learning rate.

    Over the tasks that AdamW learns.
    """
    rows = [HEADER]
    left_out = unlearned(records)
    for optimizer, choice in entries(records):
        pairs = {}
        for task in TASKS:
            result, base = (result_of(records, task, o, c) for o, c in ((optimizer, choice), (BASELINE, "own")))
            if result and base and result.seeds & base.seeds and task not in left_out:
                pairs[task] = result, base
        if pairs:
            rows.append([f"`{optimizer}`", choice, *_figures(pairs), _octaves(records, optimizer), _memory(pairs)])
    return markdown(rows)


def _figures(pairs: Mapping[str, tuple[Result, Result]]) -> list[str]:
    """The columns that compare an optimizer with AdamW, of (its result, AdamW's) by task."""
    steps = [steps_to(*pair) for pair in pairs.values()]
    seconds = [s for pair in pairs.values() if (s := seconds_to(*pair)) is not None]
    points = {task: gained(*pair) for task, pair in pairs.items()}
    worst = min(points, key=points.__getitem__)
    return [
        f"{len(pairs)} of {len(TASKS)}",
        f"{sum(share is not None for share in steps)} of {len(pairs)}",
        f"{statistics.mean(NEVER if share is None else share for share in steps):.2f}",
        f"{statistics.mean(seconds):.2f}" if seconds else "",
        f"{statistics.mean(points.values()):+.1f}",
        f"{points[worst]:+.1f} ({worst})",
    ]


def _octaves(records: Sequence[Record], optimizer: str) -> str:
    """Mean of `width` over the tasks with four rates; at least that much where one of them is open at an end."""
    widths = [width(results) for task in TASKS if len(results := by_rate(records, task, optimizer)) >= 4]
    if not widths:
        return ""
    return f"{'' if all(ends for _, ends in widths) else '≥ '}{statistics.mean(octaves for octaves, _ in widths):.1f}"


def _memory(pairs: Mapping[str, tuple[Result, Result]]) -> str:
    memory = [result.records[0]["bytes_per_parameter"] for result, _ in pairs.values()]
    low, high = f"{min(memory):.1f}", f"{max(memory):.1f}"
    return low if low == high else f"{low} to {high}"


def per_task(records: Sequence[Record], columns: Sequence[tuple[str, str]]) -> str:
    """A row a task: lowest validation loss and last metric of each entry, mean ± standard deviation over seeds."""
    header = ["task", *(f"`{optimizer}`, {choice} rate" for optimizer, choice in columns)]
    rows = [header]
    for task in TASKS:
        cells = []
        for optimizer, choice in columns:
            result = result_of(records, task, optimizer, choice)
            cells.append(
                f"{mean_and_std(result.lowest, 3)}; {mean_and_std(result.points, 1)} ({len(result.records)})"
                if result
                else "not run"
            )
        rows.append([task, *cells])
    return markdown(rows)


def task_table(records: Sequence[Record], task: str) -> str:
    """All that was run to the end on a task at defaults: mean losses at the evaluated steps, by learning rate."""
    names = dict.fromkeys(record["optimizer"] for record in whole(records))
    results = {(name, rate): r for name in names for rate, r in by_rate(records, task, name).items()}
    if not results:
        return f"{task}: no finished run"
    at = next(iter(results.values())).at
    rows = [[task, "rate", "seeds", *(f"loss at {step}" for step in at), "points", "octaves within 1 point"]]
    for (name, rate), result in results.items():
        octaves, ends = width(by_rate(records, task, name))
        is_best = result == best(by_rate(records, task, name))
        losses = [f"{loss:.4g}" if math.isfinite(loss) else "diverged" for loss in result.curve]
        span = f"{'' if ends else '≥ '}{octaves:.1f}" if is_best else ""
        points = mean_and_std(result.points, 1)
        rows.append([name, f"{rate:g}", str(len(result.records)), *losses, points, span])
    return markdown(rows)
