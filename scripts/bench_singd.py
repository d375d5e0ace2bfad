"""Time of training steps with SINGD beside AdamW and the singd package, and bytes per parameter, in one table.

    python scripts/bench_singd.py                                # five structures, AdamW, the package where installed
    python scripts/bench_singd.py --structures dense --steps 60
    pip install --no-deps singd einops einconv                   # the rival

A ViT (hidden 192, 4 layers, 65 tokens) at batch 16 on one thread: forward, backward and step in process time, which a
busy machine disturbs least. Each round is one step of every optimizer, each over a model of its own. Medians; the
ratio to AdamW is amortised over T = 10 steps, one of which updates the factors. Bytes are counted from the tensors
that live between steps.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from hf_efcp.optim.optim_args import parse_optim_args
from hf_efcp.optim.registry import create_optimizer

T = 10
STRUCTURES = ("dense", "hierarchical15_15", "block30diagonal", "diagonal", "triltoeplitz")
FACTORS = ("Ks", "Cs", "m_Ks", "m_Cs")  # where the package keeps what it does not keep in its state
HEADER = ("optimizer", "structure", "ordinary step, ms", "T-step, ms", "× AdamW", "bytes per parameter")
FIGURES = {"ordinary": 1, "due": 1, "ratio": 2, "bytes_per_parameter": 2}  # with digits


def new_model() -> ViTForImageClassification:
    """The same weights at every call."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32,
        patch_size=4,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=768,
        num_labels=10,
    )
    return ViTForImageClassification(config).train()


def batch(number: int, size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "pixel_values": torch.randn(size, 3, 32, 32, generator=generator),
        "labels": torch.randint(10, (size,), generator=generator),
    }


class Runner:
    """One optimizer over a model of its own.

    Args:
        name, structure: as the table prints them.
        build: makes the optimizers of a model; the package leaves some of its parameters to another.
    """

    def __init__(self, name: str, structure: str, build: Callable[[nn.Module], list[Any]]):
        self.name, self.structure, self.model = name, structure, new_model()
        self.optimizers = build(self.model)
        self.times: dict[bool, list[float]] = {True: [], False: []}

    def step(self, inputs: dict[str, Tensor], is_due: bool, is_warm: bool) -> None:
        """A training step; its time counts once warm."""
        start = time.process_time()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.model(**inputs).loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        if is_warm:
            self.times[is_due].append(time.process_time() - start)

    def row(self, baseline: float | None) -> dict[str, Any]:
        """A line of the table; `baseline` is AdamW's amortised time."""
        ordinary, due = (statistics.median(self.times[kind]) * 1e3 for kind in (False, True))
        mean = due / T + ordinary * (T - 1) / T
        numel = sum(p.numel() for p in self.model.parameters())
        return {
            "optimizer": self.name,
            "structure": self.structure,
            "ordinary": ordinary,
            "due": due,
            "amortised": mean,
            "ratio": mean / (baseline or mean),
            "bytes_per_parameter": self._bytes() / numel,
        }

    def _bytes(self) -> int:
        found = [t for optimizer in self.optimizers for t in tensors(optimizer.state)]
        found += [t for optimizer in self.optimizers for name in FACTORS for t in tensors(getattr(optimizer, name, ()))]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors inside of dicts, lists and objects' attributes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "values"):
        for item in value.values():
            yield from tensors(item)
    elif hasattr(value, "__dict__"):
        yield from tensors(vars(value))


def adamw(model: nn.Module) -> list[Any]:
    return [torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)]


def ours(structure: str, options: dict[str, Any]) -> Callable[[nn.Module], list[Any]]:
    return lambda model: [create_optimizer("efcp_singd", model, lr=1e-4, structures=structure, T=T, **options)]


def package(structure: str) -> Callable[[nn.Module], list[Any]]:
    """The singd package, which trains linear layers and 2-d convolutions, and AdamW for all other parameters."""
    from singd.optim.optimizer import SINGD

    def build(model: nn.Module) -> list[Any]:
        optimizer = SINGD(model, lr=1e-4, structures=(structure, structure), T=T, warn_unsupported=False)
        its_own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        rest = [p for p in model.parameters() if id(p) not in its_own]
        return [optimizer, torch.optim.AdamW(rest, lr=1e-4, foreach=True)]

    return build


def has_package() -> bool:
    return all(importlib.util.find_spec(name) for name in ("singd", "einops", "einconv"))


def measure(runners: list[Runner], size: int, steps: int) -> list[dict[str, Any]]:
    """Rounds of one step of each; the first T of them, which also update the factors, warm everything up."""
    for number in range(T + steps):
        inputs = batch(number, size)
        for runner in runners:
            runner.step(inputs, is_due=number % T == 0, is_warm=number >= T)
    rows = [runners[0].row(None)]
    return rows + [runner.row(rows[0]["amortised"]) for runner in runners[1:]]


def line(row: dict[str, Any]) -> str:
    figures = [f"{row[key]:.{digits}f}" for key, digits in FIGURES.items()]
    return f"| {' | '.join([row['optimizer'], row['structure'], *figures])} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--structures", nargs="+", default=list(STRUCTURES))
    parser.add_argument("--rivals", nargs="*", default=["dense", "hierarchical15_15", "block30diagonal", "diagonal"])
    parser.add_argument("--optim_args", help="options of efcp_singd, as for training")
    parser.add_argument("--steps", type=int, default=40, help="a multiple of T = 10 (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    if options.steps < T or options.steps % T:
        parser.error(f"--steps must be a multiple of {T}, got {options.steps}")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    runners = [Runner("AdamW", "", adamw)]
    given = parse_optim_args(options.optim_args)
    runners += [Runner("efcp_singd", structure, ours(structure, given)) for structure in options.structures]
    if options.rivals and not has_package():
        print("The singd package is not installed: pip install --no-deps singd einops einconv\n")
    elif options.rivals:
        runners += [Runner("singd package", structure, package(structure)) for structure in options.rivals]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print(f"torch {torch.__version__}, batch {options.batch}, one thread, {commit.stdout.strip()}\n")
    rows = measure(runners, options.batch, options.steps)
    print(f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER), *map(line, rows), sep="\n")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"commit": commit.stdout.strip(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
