"""A small ResNet on CIFAR-10 at 90 % and 98 % sparsity: RigL alone, with AGENT, and alone for AGENT's compute.

    python scripts/train_sparse.py --data ../shared/data/cifar10             # every run, then table and picture
    python scripts/train_sparse.py --sparsities 0.9 --seeds 0 --arms agent   # one of them
    python scripts/train_sparse.py --report                                  # table and picture of what is there

A fixed subset, images halved to 16×16, so a run takes a minute or a few on one core. Each finished run is a JSON line
of `--file`, which is kept with the code; one that stands there is not run again. Compute is counted in forward passes
over a batch, a backward pass as two: RigL takes 3 for a batch, AGENT 6, and for the full gradient and the losses at the
old snapshot 4 more from the second epoch on. `longer` is RigL trained for as many passes as AGENT took, its schedules
stretched alike. `spared` is AGENT that leaves weights alone which are 0 at the snapshot (`correct_grown=False`), `bold`
does so with γ = 1 in place of the published 0.1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from datasets import load_dataset
from result_cards import CARDS, write_sparse
from sparse_report import draw, table
from tasks import accuracy
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, default_data_collator, set_seed
from transformers.utils import logging

from hf_efcp.sparsity import VarianceProbe
from hf_efcp.train import EfcpTrainer, EfcpTrainingArguments
from hf_efcp.train.random_state import preserved_random_state
from hf_efcp.train.run_record import hardware

CORRECTED = {"agent": {}, "spared": {"correct_grown": False}, "bold": {"correct_grown": False, "gamma": 1.0}}
ARMS = ("rigl", *CORRECTED, "longer")
REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "scripts" / "results" / "sparse.jsonl"
PICTURE = REPOSITORY / "scripts" / "figures" / "sparse.png"
TRAIN, TEST, BATCH = 4000, 2000, 64
INTERVAL = 30  # steps between changes of the masks; published for runs a hundred times as long: 100


class Block(nn.Module):
    """Two 3×3 convolutions with batch norm, and a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int):
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(inner, outer, 3, stride, 1, bias=False),
            nn.Conv2d(outer, outer, 3, 1, 1, bias=False),
        )
        self.first_norm, self.second_norm = nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)
        self.shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inner, h, w) → (batch, outer, h/stride, w/stride)."""
        inside = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(inside)) + self.shortcut(x))


class ResNet8(nn.Module):
    """Three blocks of 16, 32 and 64 channels: 78 000 parameters, of which sparse training masks all but 500."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, classes)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Logits, and their cross entropy where there are labels."""
        features = self.blocks(torch.relu(self.norm(self.stem(pixel_values))))
        logits = self.head(features.mean((2, 3)))
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


class Mirrored(torch.utils.data.Dataset):
    """Images, each mirrored or not whenever it is read."""

    def __init__(self, examples: list[dict[str, Any]]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        if torch.rand(()) < 0.5:
            return example
        return {**example, "pixel_values": example["pixel_values"].flip(2)}


def load(data: str, split: str, count: int) -> list[dict[str, Any]]:
    """The first `count` images of a fixed shuffle, 16×16 and normalized, with their labels."""
    rows = load_dataset(data, split=split).shuffle(seed=0).select(range(count)).with_format("torch")
    pixels = torch.stack([row["img"] for row in rows]).float() / 255
    pixels = nn.functional.avg_pool2d((pixels - 0.47) / 0.25, 2)
    return [{"pixel_values": x, "labels": int(row["label"])} for x, row in zip(pixels, rows, strict=True)]


class NoiseProbe(TrainerCallback):
    """In the middle of epochs: the variance of the corrected gradient over that of the plain one, active weights."""

    def __init__(self, trainer: EfcpTrainer, steps_per_epoch: int, batches: int = 24):
        self.figures: list[dict[str, float]] = []
        self._trainer, self._steps_per_epoch, self._batches = trainer, steps_per_epoch, batches

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Measure, and leave weights, statistics, generators and gradients as they were."""
        correction = self._trainer._sparse.correction
        if state.global_step % self._steps_per_epoch != self._steps_per_epoch // 2 or not correction.core.full_gradient:
            return
        probe, at_zeros, model = VarianceProbe(), VarianceProbe(), self._trainer.model
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        order = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(state.global_step)).tolist()
        with preserved_random_state():
            for start in range(0, min(self._batches * BATCH, TRAIN), BATCH):
                batch = default_data_collator([self._trainer.train_dataset[i] for i in order[start : start + BATCH]])
                now = self._gradients(model, batch)
                with correction.core.swapped():
                    old = self._gradients(model, batch)
                probe.add(now, old)
                at_zeros.add(now, {name: g * (correction.core.snapshot[name] == 0) for name, g in old.items()})
        model.load_state_dict(buffers, strict=False)
        c = correction.coefficient
        figures = {"epoch": state.epoch, "c": c, "ratio": probe.ratio(c), "best_c": probe.best()}
        shares = {"best_ratio": probe.ratio(probe.best()), "at_zeros": at_zeros.traces()[1] / probe.traces()[1]}
        self.figures.append({**figures, **shares})

    def _gradients(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        names, weights = zip(*model.named_parameters(), strict=True)
        masks = self._trainer._sparse.sparsifier.masks
        gradients = torch.autograd.grad(model(**batch)["loss"], weights)
        return {name: g * masks.get(name, 1) for name, g in zip(names, gradients, strict=True)}


def passes(arm: str, epochs: int, steps: int) -> int:
    """Forward passes over a batch, a backward pass as two."""
    return steps * (3 * epochs + 7 * (epochs - 1) if arm in CORRECTED else 3 * epochs)


def run(arm: str, sparsity: float, seed: int, epochs: int, data: tuple[list, list], folder: Path) -> dict[str, Any]:
    """Train, and return what a line of the file holds."""
    train, test = data
    steps = -(-len(train) // BATCH)
    trained = round(passes("agent", epochs, steps) / (3 * steps)) if arm == "longer" else epochs
    set_seed(seed)
    args = EfcpTrainingArguments(
        str(folder), num_train_epochs=trained, per_device_train_batch_size=BATCH, learning_rate=0.1, seed=seed,
        lr_scheduler_type="cosine", max_grad_norm=0.0, optim="adamw_torch", eval_strategy="epoch", save_strategy="no",
        per_device_eval_batch_size=500, report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False, logging_strategy="epoch", sparsity=sparsity, sparse_method="rigl",
        sparse_args={"interval": INTERVAL * trained // epochs},
        gradient_correction="agent" if arm in CORRECTED else None,
        correction_args=CORRECTED.get(arm) or None,
    )  # fmt: skip
    sgd = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    trainer = EfcpTrainer(
        ResNet8(), args, train_dataset=Mirrored(train), eval_dataset=test,
        optimizer_cls_and_kwargs=(torch.optim.SGD, sgd), compute_metrics=accuracy,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    probe = NoiseProbe(trainer, steps)
    if arm in CORRECTED:
        trainer.add_callback(probe)
    result = trainer.train()
    log = trainer.state.log_history
    return {
        "arm": arm, "sparsity": sparsity, "seed": seed, "epochs": trained, "of": epochs, "steps": steps,
        "passes": passes(arm, trained, steps), "accuracy": [e["eval_accuracy"] for e in log if "eval_accuracy" in e],
        "loss": [e["loss"] for e in log if "loss" in e], "density": trainer._sparse.sparsifier.density(),
        "noise": probe.figures, "seconds": result.metrics["train_runtime"], "commit": commit(),
        "hardware": hardware(trainer.args.device),
    }  # fmt: skip


def commit() -> str:
    """The repository's commit."""
    words = ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def finished(file: Path) -> list[dict[str, Any]]:
    """The runs that stand in the file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def main(argv: Iterable[str] | None = None) -> None:
    """Run what is missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(REPOSITORY.parent / "shared" / "data" / "cifar10"))
    parser.add_argument("--file", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--sparsities", nargs="+", type=float, default=(0.9, 0.98))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--report", action="store_true", help="Only table and picture.")
    options = parser.parse_args(argv)
    logging.set_verbosity_error()
    options.file.parent.mkdir(parents=True, exist_ok=True)
    done = {(r["arm"], r["sparsity"], r["seed"], r["of"]) for r in finished(options.file)}
    arms = [arm for arm in ARMS if arm in options.arms]
    wanted = [(a, s, n, options.epochs) for n in options.seeds for s in options.sparsities for a in arms]
    missing = [] if options.report else [key for key in wanted if key not in done]
    data = (load(options.data, "train", TRAIN), load(options.data, "test", TEST)) if missing else None
    for key in missing:
        with tempfile.TemporaryDirectory() as folder:
            line = run(*key, data, Path(folder))
        with options.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(
            f"{key[0]:7} {key[1]:.2f} seed {key[2]}: {line['accuracy'][-1]:.4f} in {line['seconds']:.0f} s", flush=True
        )
    runs = [r for r in finished(options.file) if r["of"] == options.epochs]
    print(table(runs))
    print(draw(runs, options.picture))
    if options.file == RESULTS:
        print(write_sparse(finished(options.file), CARDS))


if __name__ == "__main__":
    main()
