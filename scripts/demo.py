"""AdamW and a second-order optimizer on handwritten digits, at the same learning rate.

Prints a table and leaves the loss curves and the model, with its card, in the output folder.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from tasks import Task, accuracy, digits
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging

from hf_efcp.train import EfcpTrainer, EfcpTrainingArguments
from hf_efcp.train.run_record import OptimizerRecord

BASELINE, OURS = "adamw_torch", "efcp_mfac"
EVALUATIONS = 40  # of the validation data in a run: the grain of "steps to AdamW's loss"


class Progress(TrainerCallback):
    """Prints a line now and then, and measures each step: forward, backward and optimizer, without evaluation."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begin)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        if state.global_step % (5 * state.eval_steps) == 0:
            loss, right = metrics["eval_loss"], metrics["eval_accuracy"]
            print(f"{args.optim.value:12} step {state.global_step:4}: validation loss {loss:.4f}, accuracy {right:.1%}")


@dataclass
class Run:
    """A finished run."""

    trainer: EfcpTrainer
    seconds_per_step: float

    @property
    def evaluations(self) -> list[dict[str, float]]:
        return [entry for entry in self.trainer.state.log_history if "eval_loss" in entry]

    @property
    def final_loss(self) -> float:
        return self.evaluations[-1]["eval_loss"]

    def steps_to(self, loss: float) -> int | None:
        """The first evaluated step whose validation loss is at most `loss`."""
        return next((entry["step"] for entry in self.evaluations if entry["eval_loss"] <= loss), None)

    def row(self, goal: float) -> list[str]:
        """Cells of the table, `goal` being AdamW's final loss."""
        record = OptimizerRecord.of(self.trainer.optimizer, self.trainer.args.optim.value)
        return [
            self.trainer.args.optim.value,
            f"{100 * self.evaluations[-1]['eval_accuracy']:.2f} %",
            f"{self.final_loss:.4f}",
            str(self.steps_to(goal) or "not reached"),
            f"{record.state_bytes / record.n_parameters:.1f}",
            f"{self.seconds_per_step:.4f}",
        ]


HEADER = ["optimizer", "accuracy", "loss", "steps to AdamW's loss", "bytes per parameter", "seconds per step"]


def train(task: Task, optimizer: str, options: argparse.Namespace) -> Run:
    """Train a new model; the seed fixes its weights and the order of the data."""
    every = max(1, options.max_steps // EVALUATIONS)
    args = EfcpTrainingArguments(
        output_dir=str(options.output_dir / "model"),
        optim=optimizer,
        learning_rate=options.learning_rate,
        max_steps=options.max_steps,
        per_device_train_batch_size=task.batch_size,
        per_device_eval_batch_size=256,
        eval_strategy="steps",
        eval_steps=every,
        logging_steps=every,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=options.seed,
    )
    set_seed(options.seed)
    progress = Progress()
    trainer = EfcpTrainer(
        model=task.new_model(),
        args=args,
        train_dataset=task.train,
        eval_dataset=task.validation,
        compute_metrics=accuracy,
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)  # it prints every log entry whole
    trainer.train()
    if trainer.state.log_history[-1]["step"] % every:
        trainer.evaluate()
    return Run(trainer, statistics.median(progress.seconds))


def plot(runs: list[Run], path: Path) -> None:
    """Training and validation loss of the runs, side by side."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, key, title in zip(axes, ("loss", "eval_loss"), ("training loss", "validation loss"), strict=True):
        for run in runs:
            entries = [entry for entry in run.trainer.state.log_history if key in entry]
            steps, losses = [e["step"] for e in entries], [e[key] for e in entries]
            axis.plot(steps, losses, label=run.trainer.args.optim.value)
        axis.set(title=title, xlabel="step", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("cross-entropy")
    axes[0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def table(rows: list[list[str]]) -> str:
    """Cells in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("out/demo"), help="for the curves and the model")
    parser.add_argument("--max_steps", type=int, help="steps of each run, by default the task's")
    parser.add_argument("--learning_rate", type=float, help="of both optimizers, by default the task's")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data order")
    return parser.parse_args()


def main() -> None:
    options, task = parse(), digits()
    options.max_steps = options.max_steps or task.steps
    options.learning_rate = options.learning_rate or task.learning_rate
    logging.disable_progress_bar()
    baseline = train(task, BASELINE, options)
    ours = train(task, OURS, options)
    ours.trainer.save_model()
    ours.trainer.save_state()
    ours.trainer.create_model_card(dataset=task.name, tasks=task.hub_task, model_name="digits-vit-efcp")
    curves = options.output_dir / "loss_curves.png"
    plot([baseline, ours], curves)
    goal = baseline.final_loss
    print()
    print(table([HEADER, baseline.row(goal), ours.row(goal)]))
    print(f"\nloss curves: {curves}\nmodel and card: {ours.trainer.args.output_dir}")


if __name__ == "__main__":
    main()
