"""What `bench_gpu.py` measures: copies, kernels, optimizer steps and Trainer steps on one device."""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from published_mfac import PublishedMFAC
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, ViTConfig
from transformers import ViTForImageClassification as ViT

from hf_efcp import create_optimizer, ops
from hf_efcp.curvature.layout import Layout
from hf_efcp.curvature.window import BlockTopKWindow
from hf_efcp.ops import backend
from hf_efcp.optim.registry import list_optimizers
from hf_efcp.train.run_record import OptimizerRecord

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How large everything is: as published figures need it, or small enough for an interpreter on the CPU."""

    device: str
    vit: dict[str, int]
    batch: int
    large: list[tuple[int, int]]  # shapes of the larger model
    windows: tuple[int, ...]
    block_size: int
    copy_entries: int
    repeats: int


GPU = Sizes("cuda", {"num_labels": 1000}, 64, [(4096, 4096)] * 60, (128, 256, 1024), 2048, 1 << 30, 20)
TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
DRY = Sizes(
    "cpu", {**TINY, "image_size": 8, "patch_size": 4, "num_labels": 3}, 2, [(16, 16)], (2, 3, 4), 256, 1 << 10, 1
)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], Any], sizes: Sizes) -> float:
    """Median over repeats, by the device's own clock, after three that are not counted."""
    times = []
    for _ in range(sizes.repeats + (3 if sizes.device == "cuda" else 0)):
        if sizes.device == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            begin = time.perf_counter()
            run()
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times[-sizes.repeats :])


class Peak:
    """Bytes of the device in use at most, since the object was made."""

    def __init__(self, device: str):
        self.device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None


def copy_bandwidth(sizes: Sizes) -> float:
    """Bytes per second of a copy on the device, read and written."""
    x = torch.randn(sizes.copy_entries, device=sizes.device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / milliseconds(lambda: y.copy_(x), sizes) * 1e3


def vit_shapes(sizes: Sizes) -> list[torch.Size]:
    with torch.device("meta"):
        shapes = [p.shape for p in ViT(ViTConfig(**sizes.vit)).parameters()]
    return shapes if sizes.device == "cuda" else shapes[:3]  # an interpreter is slow


def models(sizes: Sizes) -> dict[str, list[torch.Size]]:
    """Shapes of the parameters of ViT-B and of a model of a billion."""
    return {"ViT-B": vit_shapes(sizes), "1B": [torch.Size(shape) for shape in sizes.large]}


def kernels(name: str, shapes: list[torch.Size], window: int, sizes: Sizes) -> Iterator[Row]:
    """Time and bytes of each kernel, over random rows that were pushed; bfloat16 rows and residual, density 1 %.

    "combine and step" is the end of a step with Adam's moments, float32 weights among it, in one launch.
    """
    layout = Layout(shapes, sizes.block_size)
    bfloat16 = {"value_dtype": torch.bfloat16, "residual_dtype": torch.bfloat16}
    ring = BlockTopKWindow(layout, window, density=0.01, device=torch.device(sizes.device), **bfloat16)
    new = {"device": sizes.device}
    gradient, yes = torch.randn(layout.size, **new), torch.ones((), dtype=torch.bool, **new)
    scratch = torch.empty_like(gradient)
    for number in range(window):
        ring.push(gradient.normal_(), torch.tensor(number, **new), yes, scratch)
    blocks = (layout.n_blocks, sizes.block_size)
    residual, dense, out = ring.residual.view(blocks), gradient.view(blocks), scratch.view(blocks)
    rows, row, step = (ring.indices, ring.values), torch.zeros((), dtype=torch.int64, **new), torch.ones((), **new)
    weights = torch.randn(window, **new)
    moments = [torch.zeros(layout.size, dtype=torch.bfloat16, **new) for _ in range(2)]
    weights_of = parameters(shapes, sizes.device)
    pieces = [number for number, span in enumerate(layout.blocks) for _ in span]
    finish = ops.Weights(
        torch.tensor(pieces, dtype=torch.int32, **new),
        ops.weight_table(weights_of, layout.blocks, [0] * len(weights_of), torch.device(sizes.device)),
        torch.tensor([[1e-9, 1.0]], **new),
        frozenset({torch.float32}),
        stochastic=True,
    )
    combine_step_ = ops.combine_step_for(ring.values)
    row_bytes = ring.indices.nbytes + ring.values.nbytes
    # Bytes that have to move: each input read once, each output written once.
    cases: list[tuple[str, int, Callable[[], Any]]] = [
        (
            "push",
            2 * residual.nbytes + dense.nbytes + row_bytes // window,
            lambda: ops.push_topk_(*rows, row, residual, dense, yes),
        ),
        ("row dots", row_bytes, lambda: ops.row_dots(*rows, row, out)),
        ("window dots", row_bytes + dense.nbytes, lambda: ops.window_dots(*rows, dense)),
        ("window combine", row_bytes + 2 * out.nbytes, lambda: ops.window_combine_(out, *rows, weights)),
        (
            "combine and step",
            row_bytes + dense.nbytes + 4 * moments[0].nbytes + 2 * sum(p.nbytes for p in weights_of),
            lambda: combine_step_(
                *(out, step.long(), yes),
                pieces=finish.pieces,
                rows=ops.Rows(*rows, None, weights[None], 1.0),
                moments=ops.Moments(*moments, 0.9, 0.999),
                weights=finish,
            ),
        ),
        (
            "adam",
            2 * gradient.nbytes + 4 * moments[0].nbytes,
            lambda: ops.adam_(gradient, *moments, step.long(), yes, beta1=0.9, beta2=0.999),
        ),
    ]
    for kernel, n_bytes, run in cases:
        ms = milliseconds(run, sizes)
        yield {"model": name, "kernel": kernel, "window": window, "ms": ms, "bytes_per_second": n_bytes / ms * 1e3}


def use_backend(name: str | None) -> None:
    """Serve the window operations by another implementation from now on."""
    os.environ.pop(backend.VARIABLE, None)
    if name:
        os.environ[backend.VARIABLE] = name
    backend.cpu_backend.cache_clear()
    backend.cuda_backend.cache_clear()


def parameters(shapes: list[torch.Size], device: str) -> list[Tensor]:
    params = [torch.nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 0.01
    return params


def optimizer_step(model: str, shapes: list[torch.Size], optimizer: str, window: int | None, sizes: Sizes) -> Row:
    """One optimizer's step alone: AdamW fused, S-M-FAC on Triton or torch, the published formula written plainly."""
    peak, params = Peak(sizes.device), parameters(shapes, sizes.device)
    name, _, served_by = optimizer.partition(", ")
    if name == "AdamW fused":
        chosen = torch.optim.AdamW(params, lr=1e-6, fused=True)
    elif name == "published step":
        chosen = PublishedMFAC(params, 1e-6, window=window, damping=1e-4, density=0.01)
        chosen.fill(torch.Generator(sizes.device).manual_seed(0))
    else:
        chosen = create_optimizer(name, params, 1e-6, window=window, block_size=sizes.block_size)
        for _ in range(window):  # every row full
            chosen.step()
        use_backend(served_by if served_by == "torch" or sizes.device == "cpu" else None)
    ms = milliseconds(chosen.step, sizes)
    return {"model": model, "optimizer": optimizer, "window": window, "ms": ms, "peak_bytes": peak.bytes()}


class Watch(TrainerCallback):
    """Seconds of each step on the wall, the device finished."""

    def __init__(self, device: str):
        self.device, self.seconds = device, []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        synchronize(self.device)
        self._begin = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - self._begin)


TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw_torch_fused": ("adamw_torch_fused", {}),
    "efcp_mfac": ("efcp_mfac", {}),
    "efcp_mfac window=256": ("efcp_mfac", {"window": 256}),
    "efcp_mfac window=1024": ("efcp_mfac", {"window": 1024}),
    "efcp_ggt": ("efcp_ggt", {}),
    "efcp_ggt basis_every=10": ("efcp_ggt", {"basis_every": 10}),
    "efcp_singd T=10": ("efcp_singd", {"T": 10, "warm_steps": 0}),
    "sketchy_shampoo update_freq=10": ("sketchy_shampoo", {"update_freq": 10}),
}


def trainer_step(label: str, sizes: Sizes, n_steps: int = 23) -> Row:
    """A step of ViT under Trainer, bfloat16, random weights and images: median and mean of whole periods of ten."""
    optim, options = TRAINED[label]
    if sizes.device == "cpu":
        use_backend("torch")  # the interpreter is for kernels and steps
        options, n_steps = {name: min(value, 3) for name, value in options.items()}, 4
    config = ViTConfig(**sizes.vit)
    image = torch.randn(3, config.image_size, config.image_size)
    data = [{"pixel_values": image, "labels": number % config.num_labels} for number in range(sizes.batch * n_steps)]
    peak, watch = Peak(sizes.device), Watch(sizes.device)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            optim=optim,
            optim_args=",".join(f"{name}={value}" for name, value in options.items()) or None,
            bf16=sizes.device == "cuda",
            use_cpu=sizes.device == "cpu",
            learning_rate=1e-4,
            max_steps=n_steps,
            per_device_train_batch_size=sizes.batch,
            dataloader_pin_memory=sizes.device == "cuda",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=10**6,
        )
        trainer = Trainer(ViT(config), args, train_dataset=data, callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    counted = watch.seconds[3:]
    state = OptimizerRecord.of(trainer.optimizer, optim).state_bytes if optim in list_optimizers() else None
    return {
        "trainer": label,
        "ms": statistics.median(counted) * 1e3,
        "mean_ms": statistics.mean(counted) * 1e3,
        "peak_bytes": peak.bytes(),
        "state_bytes": state,
    }
