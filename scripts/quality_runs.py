"""Runs of the quality benchmark: what identifies one, how it is trained, and the log in which it is found again."""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import image_tasks
import text_tasks
import torch
from quality_rivals import RIVALS
from tasks import Task
from text_tasks import Sources
from transformers import PrinterCallback, TrainerCallback, set_seed

from hf_efcp.optim.registry import get_spec, list_optimizers
from hf_efcp.train import EfcpTrainer, EfcpTrainingArguments
from hf_efcp.train.run_record import OptimizerRecord, hardware

TASKS: dict[str, Callable[[Sources], Task]] = {
    "trec": text_tasks.questions,
    "cola": text_tasks.cola,
    "sst2": text_tasks.sst2,
    "stsb": text_tasks.stsb,
    "rotten_tomatoes": text_tasks.rotten_tomatoes,
    "wnut17": text_tasks.wnut17,
    "flowers5": image_tasks.flowers,
    "cifar10": image_tasks.cifar10,
    "digits": image_tasks.handwriting,
    "shakespeare": text_tasks.shakespeare,
}
EVALUATIONS = 8  # during a run, at equal distances
REPOSITORY = Path(__file__).resolve().parents[1]


@cache
def load_task(name: str, sources: Sources) -> Task:
    return TASKS[name](sources)


@dataclass(frozen=True)
class Run:
    """What is run.

    Args:
        task, optimizer: names.
        settings: every option of an optimizer of this package, as JSON, so that runs stay comparable when a default
            changes; `{}` for a rival.
        learning_rate: at the start; it falls linearly to 0.
        seed: of weights, order of the data and dropout.
        steps: length of the schedule.
        stop: steps that are run; fewer than `steps` screen a setting.
    """

    task: str
    optimizer: str
    settings: str
    learning_rate: float
    seed: int
    steps: int
    stop: int

    @classmethod
    def of(
        cls,
        task: str,
        optimizer: str,
        options: Mapping[str, Any],
        learning_rate: float,
        seed: int,
        length: tuple[int, int],
    ) -> Run:
        """`length` is (steps, stop). Options that are not given are today's defaults."""
        steps, stop = length
        if optimizer in list_optimizers():
            spec = get_spec(optimizer)
            resolved = spec.resolve(options)
            options = {name: resolved.get(name, default) for name, (_, default) in spec.options().items()}
        settings = json.dumps(options, sort_keys=True)
        return cls(task, optimizer, settings, float(f"{learning_rate:.6g}"), seed, steps, min(stop, steps))

    @property
    def is_default(self) -> bool:
        return json.loads(self.settings) == default_settings(self.optimizer)


def default_settings(optimizer: str) -> dict[str, Any]:
    """Every option at today's default; none of an optimizer that is not this package's."""
    return json.loads(Run.of("", optimizer, {}, 1.0, 0, (1, 1)).settings)


class Watch(TrainerCallback):
    """Evaluates at equal distances, ends a screen early, and measures each step without its evaluation.

    Seconds are the process's on a CPU, where several runs share the machine, and the clock's on a GPU.
    """

    def __init__(self, run: Run):
        self.every, self.stop = max(1, run.steps // EVALUATIONS), run.stop
        self.seconds: list[float] = []

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begin = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(self._now() - self._begin)
        control.should_evaluate = state.global_step % self.every == 0 or state.global_step == self.stop
        control.should_training_stop = state.global_step >= self.stop


def new_trainer(run: Run, task: Task, folder: str, watch: Watch) -> EfcpTrainer:
    is_ours = run.optimizer in list_optimizers()
    rival = RIVALS.get(run.optimizer)
    args = EfcpTrainingArguments(
        output_dir=folder,
        optim=run.optimizer if is_ours or rival.new is None else "sgd",
        optim_args=run.settings if is_ours else None,
        learning_rate=run.learning_rate,
        max_steps=run.steps,
        per_device_train_batch_size=task.batch_size,
        per_device_eval_batch_size=64,
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=run.seed,
    )
    set_seed(run.seed)
    model = task.new_model()
    trainer = EfcpTrainer(
        model=model.to(args.device),
        args=args,
        data_collator=task.collator,
        train_dataset=task.train,
        eval_dataset=task.validation,
        processing_class=task.tokenizer,
        compute_metrics=task.compute_metrics,
        preprocess_logits_for_metrics=task.prepare_logits,
        optimizers=(rival.new(model, run.learning_rate) if rival and rival.new else None, None),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(run: Run, task: Task) -> dict[str, Any]:
    """A finished run: what it was, its curves, and the optimizer's cost. A loss that is not finite is `None`."""
    watch = Watch(run)
    with tempfile.TemporaryDirectory() as folder:
        trainer = new_trainer(run, task, folder, watch)
        trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    record = OptimizerRecord.of(trainer.optimizer, run.optimizer)
    return {
        **asdict(run),
        "settings": json.loads(run.settings),
        "defaults": run.is_default,
        "at": [entry["step"] for entry in evaluations],
        "loss": [_figure(entry["eval_loss"]) for entry in evaluations],
        "metric": [_figure(entry[f"eval_{task.metric}"]) for entry in evaluations],
        "seconds": [_figure(sum(watch.seconds[: entry["step"]])) for entry in evaluations],
        "bytes_per_parameter": _figure(record.state_bytes / record.n_parameters),
        "hardware": hardware(trainer.args.device),
        "commit": _commit(),
    }


def _figure(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


@cache
def _commit() -> str:
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record, separators=(",", ":")) + "\n")


def find(run: Run, records: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The record of `run`, or of a longer one with the same schedule."""
    key = {name: getattr(run, name) for name in ("task", "optimizer", "learning_rate", "seed", "steps")}
    settings, usual = json.loads(run.settings), default_settings(run.optimizer)
    same = [
        record
        for record in records
        if record["stop"] >= run.stop
        and all(record[name] == value for name, value in key.items())
        # An option that came after the record: it ran as its default does now.
        and {**usual, **record["settings"]} == settings
    ]
    return max(same, key=lambda record: record["stop"], default=None)
