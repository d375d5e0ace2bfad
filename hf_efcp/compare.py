"""AdamW and other optimizers on one training script with the same seeds: a table, a picture and a page."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_efcp.optim.optim_args import parse_optim_args
from hf_efcp.optim.registry import get_spec, list_optimizers

BASELINE = "adamw_torch"
_OURS = ("--optim", "--optim_args", "--seed", "--output_dir")  # flags of the script that a comparison sets
_BOOKKEEPING = ("_runtime", "_per_second", "_time", "_flos")


@dataclass(frozen=True)
class Entrant:
    """An optimizer with options, the text after its name in `NAME:option=value,…`."""

    name: str
    options: str = ""

    @classmethod
    def parse(cls, text: str) -> Entrant:
        """Raises `ValueError` or `TypeError` for a name that is none, or options that our optimizer does not take."""
        from hf_efcp.train.registration import optim_choices

        name, _, options = text.partition(":")
        if name in list_optimizers() or name not in optim_choices():
            get_spec(name).resolve(parse_optim_args(options))
        return cls(name, options)

    @property
    def label(self) -> str:
        return f"{self.name} ({self.options})" if self.options else self.name


@dataclass(frozen=True)
class Outcome:
    """The runs of one optimizer, as `RunRecorder` wrote them."""

    entrant: Entrant
    runs: list[dict[str, Any]]

    def curve(self, key: str) -> list[tuple[int, float, float, float]]:
        """Step, mean, lowest and highest value over the seeds, where every seed has one."""
        by_seed = [{e["step"]: e[key] for e in run["log_history"] if key in e} for run in self.runs]
        steps = sorted(set.intersection(*(set(values) for values in by_seed)))
        points = [(step, [values[step] for values in by_seed]) for step in steps]
        return [(step, statistics.fmean(values), min(values), max(values)) for step, values in points]

    def last(self, key: str) -> list[float]:
        """The last value of each seed that has one."""
        found = ([e[key] for e in run["log_history"] if key in e] for run in self.runs)
        return [values[-1] for values in found if values]

    def steps_to(self, key: str, goal: float) -> int | None:
        """The first step at which the mean over the seeds is no worse than `goal`."""
        return next((step for step, mean, _, _ in self.curve(key) if mean <= goal), None)

    @property
    def bytes_per_parameter(self) -> float:
        return self.runs[0]["state_bytes"] / self.runs[0]["n_parameters"]

    @property
    def seconds_per_step(self) -> float:
        return statistics.median(run["seconds_per_step"] for run in self.runs)


def compare(
    script: Sequence[str],
    entrants: Sequence[Entrant],
    seeds: Sequence[int],
    folder: Path,
    *,
    launcher: Sequence[str] = (),
) -> list[Outcome]:
    """Train with each optimizer and each seed, one after the other, in processes of their own.

    Args:
        script: a training script with a Trainer, and its arguments; `--optim`, `--optim_args`, `--seed` and
            `--output_dir` are added.
        entrants: AdamW is put before them where it is not among them.
        seeds: of every optimizer.
        folder: for the runs; what they print goes to files there.
        launcher: options of `hf_efcp.run`.

    Raises:
        ValueError: the script sets what a comparison sets, or a run fails.
    """
    if not script or not Path(script[0]).is_file():
        raise ValueError(f"No training script {script[0]!r}." if script else "Give a training script to compare on.")
    for word in script[1:]:
        if word.partition("=")[0] in _OURS:
            raise ValueError(f"`{word}` is set by the comparison; leave it out. --optim goes before the script.")
    baseline = [] if any(entrant.name == BASELINE for entrant in entrants) else [Entrant(BASELINE)]
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for number, entrant in enumerate(dict.fromkeys([*baseline, *entrants])):
        places = [folder / "runs" / f"{number}-{entrant.name}-seed{seed}" for seed in seeds]
        runs = [_run(script, entrant, s, place, launcher) for s, place in zip(seeds, places, strict=True)]
        outcomes.append(Outcome(entrant, runs))
    return outcomes


def _run(script: Sequence[str], entrant: Entrant, seed: int, place: Path, launcher: Sequence[str]) -> dict[str, Any]:
    place.mkdir(parents=True, exist_ok=True)
    record = place / "record.json"
    record.unlink(missing_ok=True)
    words = [sys.executable, "-m", "hf_efcp.run", "--record", str(record), *launcher, *script]
    words += ["--output_dir", str(place / "output"), "--seed", str(seed), "--optim", entrant.name]
    words += ["--optim_args", entrant.options] if entrant.options else []
    begin = time.perf_counter()
    with open(place / "printed.txt", "w", encoding="utf-8") as printed:
        done = subprocess.run(words, stdout=printed, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUTF8": "1"})
    if done.returncode or not record.is_file():
        lines = (place / "printed.txt").read_text(encoding="utf-8").strip().splitlines() or ["it printed nothing"]
        why = lines[-1] if done.returncode else "it trains without a Trainer of transformers"
        raise ValueError(f"{entrant.label} with seed {seed} failed: {why} ({place / 'printed.txt'})")
    print(f"{entrant.label}, seed {seed}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    return json.loads(record.read_text(encoding="utf-8"))


def loss_key(outcomes: Sequence[Outcome]) -> str:
    """The loss that is compared: of the validation data where every run has evaluated."""
    return "eval_loss" if all(len(o.last("eval_loss")) == len(o.runs) for o in outcomes) else "loss"


def table(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """Header and a row for each optimizer; several seeds as mean ± standard deviation."""
    key = loss_key(outcomes)
    names = [name for name in _metric_names(outcomes) if all(o.last(name) for o in outcomes)]
    goal = statistics.fmean(_losses(outcomes[0], key))
    header = ["optimizer", "validation loss" if key == "eval_loss" else "training loss"]
    header += [name.removeprefix("eval_").replace("_", " ") for name in names]
    header += [f"steps to {outcomes[0].entrant.name}'s loss", "bytes per parameter", "seconds per step"]
    rows = [header]
    for outcome in outcomes:
        reached = outcome.steps_to(key, goal)
        rows.append(
            [
                outcome.entrant.label,
                spread(_losses(outcome, key)),
                *(spread(outcome.last(name)) for name in names),
                str(reached) if reached is not None else "not reached",
                f"{outcome.bytes_per_parameter:.2f}",
                f"{outcome.seconds_per_step:.3g}",
            ]
        )
    return rows


def _losses(outcome: Outcome, key: str) -> list[float]:
    if values := outcome.last(key):
        return values
    raise ValueError(f"{outcome.entrant.label} logged no loss; lower --logging_steps.")


def _metric_names(outcomes: Sequence[Outcome]) -> list[str]:
    entries = (entry for outcome in outcomes for run in outcome.runs for entry in run["log_history"])
    names = dict.fromkeys(name for entry in entries for name in entry if name.startswith("eval_"))
    return [name for name in names if name != "eval_loss" and not name.endswith(_BOOKKEEPING)]


def spread(values: Sequence[float]) -> str:
    """`mean ± standard deviation`, or the value where there is one."""
    mean = statistics.fmean(values)
    return f"{mean:.4g} ± {statistics.stdev(values):.2g}" if len(values) > 1 else f"{mean:.4g}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
