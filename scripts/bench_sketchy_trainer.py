"""Time of a Trainer step of MiniLM with sketchy_shampoo beside adamw_torch.

    python scripts/bench_sketchy_trainer.py --steps 20
    python scripts/bench_sketchy_trainer.py --option rank=32 --option one_sided=true,update_freq=20

Forward, backward, clipping and optimizer on batches of TREC's questions; process time on one thread, without
evaluation. Updates of the sketches are rare and dear, so it is the mean over whole periods of `update_freq` that
counts; the first step, with its exact factorisation, is left out. The optimizers take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from bench_defaults import BASELINE, minilm
from tasks import Task, trec
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging

from hf_efcp.optim.optim_args import parse_optim_args
from hf_efcp.optim.registry import list_optimizers
from hf_efcp.train import EfcpTrainer, EfcpTrainingArguments
from hf_efcp.train.run_record import OptimizerRecord

REPOSITORY = Path(__file__).resolve().parents[1]


class Stopwatch(TrainerCallback):
    """Process time of each step, and of the optimizer's part of it."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.optimizer: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begin = time.process_time()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._before = time.process_time()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.optimizer.append(time.process_time() - self._before)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(time.process_time() - self._begin)


def measure(task: Task, optimizer: str, options: dict[str, Any], steps: int) -> tuple[Stopwatch, float]:
    """The times without the first step, and the state's bytes per parameter."""
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        args = EfcpTrainingArguments(
            output_dir=folder,
            optim=optimizer,
            optim_args=options if optimizer in list_optimizers() else None,
            learning_rate=task.learning_rate,
            max_steps=steps + 1,
            per_device_train_batch_size=task.batch_size,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_steps=10**6,
        )
        set_seed(0)
        trainer = EfcpTrainer(
            model=task.new_model(),
            args=args,
            train_dataset=task.train,
            processing_class=task.tokenizer,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    record = OptimizerRecord.of(trainer.optimizer, optimizer)
    watch.steps, watch.optimizer = watch.steps[1:], watch.optimizer[1:]
    return watch, record.state_bytes / record.n_parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="a multiple of update_freq (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE,…", help="a variant; repeatable")
    parser.add_argument("--data", default=str(REPOSITORY.parent / "shared/data/trec"), help="TREC")
    parser.add_argument("--model", default=minilm(), help="the encoder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    task = trec(args.data, args.model)
    variants: dict[str, tuple[str, dict[str, Any]]] = {
        BASELINE: (BASELINE, {}),
        "sketchy_shampoo": ("sketchy_shampoo", {}),
    }
    variants |= {f"sketchy_shampoo {words}": ("sketchy_shampoo", parse_optim_args(words)) for words in args.option}
    print(
        "| optimizer | round | s / step | × adamw | optimizer's, s | bytes per parameter |\n|---|---|---|---|---|---|"
    )
    for number in range(args.rounds):
        base = None
        for label, variant in variants.items():
            watch, size = measure(task, *variant, args.steps)
            step, part = statistics.mean(watch.steps), statistics.mean(watch.optimizer)
            base = base or step
            print(f"| {label} | {number} | {step:.3f} | {step / base:.2f} | {part:.3f} | {size:.2f} |", flush=True)


if __name__ == "__main__":
    main()
