"""20,000 steps of a tiny network with every optimizer: does memory stay flat, do solver and sketch keep their bounds?

    python scripts/long_run.py                              # all, one after the other
    python scripts/long_run.py --optim efcp_mfac efcp_singd --steps 2000

Printed for each optimizer: how much the process grew after step 1,000 (or the tenth of fewer steps), bytes of state,
the mean loss over the first, middle and last tenth of the steps, and the drift of what is carried from step to step
against the same thing made anew in float64:

    window     the Gram matrix against GGᵀ of the rows themselves, relative to its largest entry; where an inverse is
               kept as well, how far it is from that of the Gram matrix
    sketch     how far C exceeds M, or M exceeds C + ρI, relative to the norm of M, the sum of all gradient products
               that the sketch stands for; and how far its directions are from orthonormal
    factors    KKᵀ as it is kept against K's, or its asymmetry where it stands alone; infinite if not positive definite
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_efcp import create_optimizer, list_optimizers
from hf_efcp.curvature.structures import Dense
from hf_efcp.optim import MFAC, SINGD, SketchyAdaGrad
from hf_efcp.optim.registry import get_spec
from hf_efcp.optim.singd_state import factor_name
from hf_efcp.optim.window import WindowOptimizer

# Small enough that rings wrap, sketches are truncated and factors are updated thousands of times; from a window of 128
# on M-FAC keeps an inverse.
OPTIONS = {"density": 0.3, "rank": 2, "update_freq": 2, "window": 16}
OWN_OPTIONS = {
    "efcp_mfac": {"block_size": 8},
    "efcp_ggt": {"block_size": 8},
    "MFAC": {"window": 128, "damping": 1e-2},
}
RATES = {"sketchy_adagrad": 0.1, "MFAC": 1e-3, "singd": 1e-3}
BOUNDS = {"gram": 1e-6, "inverse": 1e-6, "sketch": 1e-5, "directions": 1e-5, "factors": 1e-4}


@dataclass(frozen=True)
class Figures:
    """What a run leaves: see above. Bytes, losses, and drift by what drifts."""

    growth: int
    state_bytes: int
    state_bytes_early: int
    losses: tuple[float, float, float]
    drift: dict[str, float]


def run(name: str, steps: int = 20_000) -> Figures:
    """Train a 9-12-3 network on the noisy outputs of another one, the rate falling to zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, 3))
    teacher = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 3)).requires_grad_(False)
    inputs = torch.randn(512, 9)
    targets = teacher(inputs) + 0.05 * torch.randn(512, 3)
    own = get_spec(name).options()
    options = {o: value for o, value in {**OPTIONS, **OWN_OPTIONS.get(name, {})}.items() if o in own}
    rate = RATES.get(name, 3e-3)
    optimizer = create_optimizer(name, model, lr=rate, weight_decay=1e-4, **options)
    watch = watcher(optimizer, model[0].weight)
    early, base, bytes_early, losses = steps // 10 if steps < 10_000 else 1000, 0, 0, []
    total = torch.zeros(())
    for step in range(steps):
        rows = torch.randint(0, 512, (16,), generator=torch.Generator().manual_seed(step))
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        loss = (model(inputs[rows]) - targets[rows]).square().mean()
        loss.backward()
        watch(False)
        optimizer.step()
        total += loss.detach()
        if (step + 1) % (steps // 10) == 0:
            losses.append(float(total) / (steps // 10))
            total.zero_()
        if step + 1 == early:
            base, bytes_early = resident(), optimizer.state_bytes()
    growth = resident() - base
    return Figures(
        growth=growth,
        state_bytes=optimizer.state_bytes(),
        state_bytes_early=bytes_early,
        losses=(losses[0], losses[len(losses) // 2], losses[-1]),
        drift=watch(True),
    )


def resident() -> int:
    """Bytes of this process in memory, after what is free has been given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def watcher(optimizer: Any, weight: Tensor) -> Callable[[bool], dict[str, float]]:
    """A function to call before each step, and with `True` at the end for the drift."""
    if isinstance(optimizer, WindowOptimizer):
        return lambda ends: window_drift(optimizer) if ends else {}
    if isinstance(optimizer, SINGD):
        return lambda ends: factor_drift(optimizer) if ends else {}
    return SketchWatch(optimizer, weight)


def window_drift(optimizer: WindowOptimizer) -> dict[str, float]:
    """Of the Gram matrix, and of the inverse of what M-FAC solves with."""
    window = optimizer.defaults["window"]
    shared = optimizer.state[optimizer._parameters()[0]]
    rows = []
    for j in range(window):
        unit = torch.zeros(1, window, dtype=torch.float64)
        unit[0, j] = 1
        parts = [torch.zeros(s.layout.size) for s in optimizer._segments]
        for segment, part in zip(optimizer._segments, parts, strict=True):
            segment.window.combine(unit, part)
        rows.append(torch.cat(parts).double())
    matrix = torch.stack(rows)
    gram = matrix @ matrix.T
    drift = {"gram": float((shared["gram"] - gram).abs().max() / gram.abs().max())}
    if "inverse" in shared and isinstance(optimizer, MFAC):
        shifted = shared["gram"] + window * optimizer.defaults["damping"] * torch.eye(window, dtype=torch.float64)
        drift["inverse"] = float((shared["inverse"] @ shifted - torch.eye(window)).abs().max())
    return drift


def factor_drift(optimizer: SINGD) -> dict[str, float]:
    """Of KKᵀ of all layers."""
    worst = 0.0
    for layer in optimizer._layers():
        state = optimizer.state[layer.weight]
        for side, structure in (("input", layer.inputs), ("output", layer.outputs)):
            kept = state[f"{side}_metric"].double().view(structure.dim, structure.dim)
            if isinstance(structure, Dense) and factor_name(side, structure).endswith("factor"):
                k = state[factor_name(side, structure)].double().view(structure.dim, structure.dim)
                fresh = k @ k.T
            else:
                fresh = kept.T
            worst = max(worst, float((kept - fresh).abs().max() / kept.abs().max()))
            if torch.linalg.eigvalsh(kept + kept.T)[0] <= 0:
                worst = math.inf
    return {"factors": worst}


class SketchWatch:
    """The sums of products that one parameter's sketches stand for, in float64."""

    def __init__(self, optimizer: Any, weight: Tensor):
        self.optimizer, self.weight = optimizer, weight
        self.sums: dict[int, Tensor] = {}

    def __call__(self, ends: bool) -> dict[str, float]:
        """Take the gradient; at the end compare."""
        if ends:
            return self._compare()
        options = self.optimizer.defaults
        gradient = self.weight.grad.double()
        if isinstance(self.optimizer, SketchyAdaGrad):
            self._add(0, gradient.reshape(-1, 1), 1.0)
            return {}
        count = int(self.optimizer.state[self.weight]["step"]) if self.optimizer.state else 0
        if count % options["update_freq"] == 0:
            decay = options["beta2"] ** (options["update_freq"] if options["beta2_per_step"] else 1)
            for axis in (0, 1):
                self._add(axis, gradient if axis == 0 else gradient.T, decay)
        return {}

    def _add(self, axis: int, matrix: Tensor, decay: float) -> None:
        product = matrix @ matrix.T
        self.sums[axis] = product if axis not in self.sums else decay * self.sums[axis] + product

    def _compare(self) -> dict[str, float]:
        state, excess, skew = self.optimizer.state[self.weight], 0.0, 0.0
        for axis, total in self.sums.items():
            adagrad = isinstance(self.optimizer, SketchyAdaGrad)
            ending = "" if adagrad else f"_0_{axis}"
            basis = state[f"basis{ending}"].double().reshape(len(total), -1)
            s, tail = state[f"singular_values{ending}"], state[f"tail{ending}"]
            kept = (basis * s.square()) @ basis.T
            norm = torch.linalg.matrix_norm(total, 2)
            over = torch.linalg.eigvalsh(kept - total)[-1]
            under = torch.linalg.eigvalsh(total - kept)[-1] - tail
            excess = max(excess, float(torch.maximum(over, under) / norm))
            used = basis[:, s > 0]
            skew = max(skew, float((used.T @ used - torch.eye(used.shape[1])).abs().max()))
        return {"sketch": excess, "directions": skew}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optim", nargs="+", default=list_optimizers(), choices=list_optimizers())
    parser.add_argument("--steps", type=int, default=20_000)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print("| optimizer | growth, bytes | state, bytes | loss of the first, middle, last tenth | drift |")
    print("|---|---|---|---|---|")
    for name in args.optim:
        found = run(name, args.steps)
        losses = ", ".join(f"{loss:.4f}" for loss in found.losses)
        drift = ", ".join(f"{what} {value:.1e}" for what, value in found.drift.items())
        print(f"| `{name}` | {found.growth:,} | {found.state_bytes:,} | {losses} | {drift} |", flush=True)


if __name__ == "__main__":
    main()
