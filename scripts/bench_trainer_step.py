"""Time of a whole Trainer step of MiniLM beside adamw_torch: forward, backward, clipping and optimizer.

    python scripts/bench_trainer_step.py --option window=256 --length 16
    python scripts/bench_trainer_step.py --optimizer sketchy_shampoo --option rank=32 --option one_sided=true

Batches of TREC's questions, padded to the longest or, with `--length`, cut and padded to so many tokens. Process time
on one thread, without evaluation. The optimizers take turns, the first steps of each turn are left out. Medians count
where all steps cost the same; where some are rare and dear, as updates of sketches, means over whole periods.

After its first step a window is filled with random entries at random places, too small to turn an update. A full one
costs no more for what it holds, but empty rows, whose entries all lie at the start of a block, cost less. A step that
is skipped, as of a gradient that is not finite, would cost nothing: then there is an error.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from quality_rivals import BASELINE
from tasks import Task, trec
from text_tasks import minilm
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging

from hf_efcp.optim.optim_args import parse_optim_args
from hf_efcp.optim.registry import list_optimizers
from hf_efcp.train import EfcpTrainer, EfcpTrainingArguments
from hf_efcp.train.run_record import OptimizerRecord

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = 1e-12  # beside gradients of 1e-4; far from what a float32 holds no more
HEADER = "| optimizer | median s / step | mean | × adamw, median | mean | optimizer's, s | bytes per parameter |"


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

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.steps.append(time.process_time() - self._begin)
        if len(self.steps) == 1:
            fill(optimizer)


def fill(optimizer: Any) -> None:
    """Put random entries into all rows of block-wise windows."""
    if getattr(optimizer, "optimizer", None) is not None:  # accelerate's wrapper
        optimizer = optimizer.optimizer
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            if "indices" in state and state["indices"].dim() == 3:
                width = min(group["block_size"], p.numel())
                state["indices"].random_(0, max(1, width))
                state["values"].copy_(TINY * torch.randn(state["values"].shape))


def check_no_step_was_skipped(optimizer: Any) -> None:
    """Raise `RuntimeError` if one of ours was."""
    while getattr(optimizer, "optimizer", None) is not None:  # accelerate's wrapper
        optimizer = optimizer.optimizer
    if skipped := getattr(optimizer, "skipped_steps", 0):
        raise RuntimeError(f"{skipped} steps were skipped; their time says nothing.")


def of_length(task: Task, length: int) -> Task:
    """The task with every training example cut and padded to `length` tokens."""
    pad = task.tokenizer.pad_token_id

    def fit(name: str, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return value[:length] + [pad if name == "input_ids" else 0] * (length - len(value))

    return replace(task, train=[{name: fit(name, v) for name, v in example.items()} for example in task.train])


def measure(task: Task, optimizer: str, options: dict[str, Any], steps: int, warm: int) -> tuple[Stopwatch, float]:
    """The times without the first `warm` steps, and the state's bytes per parameter."""
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        args = EfcpTrainingArguments(
            output_dir=folder,
            optim=optimizer,
            optim_args=options if optimizer in list_optimizers() else None,
            learning_rate=task.learning_rate,
            max_steps=steps + warm,
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
    check_no_step_was_skipped(trainer.optimizer)
    record = OptimizerRecord.of(trainer.optimizer, optimizer)
    watch.steps, watch.optimizer = watch.steps[warm:], watch.optimizer[warm:]
    return watch, record.state_bytes / record.n_parameters


def rows(watches: dict[str, Stopwatch], bytes_of: dict[str, float]) -> Iterable[str]:
    """The table's lines."""
    base = watches[BASELINE].steps
    for label, watch in watches.items():
        median, mean = statistics.median(watch.steps), statistics.mean(watch.steps)
        part = statistics.mean(watch.optimizer)
        yield (
            f"| {label} | {median:.3f} | {mean:.3f} | {median / statistics.median(base):.2f} "
            f"| {mean / statistics.mean(base):.2f} | {part:.3f} | {bytes_of[label]:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", default="efcp_mfac", help="compared with AdamW (default: %(default)s)")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE,…", help="a variant; repeatable")
    parser.add_argument("--steps", type=int, default=20, help="of a turn (default: %(default)s)")
    parser.add_argument("--warm", type=int, default=2, help="steps of a turn before them (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--length", type=int, help="tokens of every example")
    parser.add_argument("--data", default=str(REPOSITORY.parent / "shared/data/trec"), help="TREC")
    parser.add_argument("--model", default=minilm(), help="the encoder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    task = trec(args.data, args.model)
    if args.length:
        task = of_length(task, args.length)
    variants: dict[str, tuple[str, dict[str, Any]]] = {BASELINE: (BASELINE, {})}
    words_of = args.option or [""]
    variants |= {f"{args.optimizer} {words}".strip(): (args.optimizer, parse_optim_args(words)) for words in words_of}
    watches, bytes_of = {label: Stopwatch() for label in variants}, {}
    for _ in range(args.rounds):
        for label, variant in variants.items():
            watch, bytes_of[label] = measure(task, *variant, args.steps, args.warm)
            watches[label].steps += watch.steps
            watches[label].optimizer += watch.optimizer
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    shape = f"{task.batch_size} × {args.length or 'the longest'} tokens"
    print(f"{commit.stdout.strip()}, batches of {shape}, {args.rounds} rounds of {args.steps} steps\n")
    print(HEADER, "|---|---|---|---|---|---|---|", *rows(watches, bytes_of), sep="\n")


if __name__ == "__main__":
    main()
