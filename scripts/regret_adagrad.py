"""Regret of S-AdaGrad beside diagonal AdaGrad's, in online logistic regression on scikit-learn's data.

    python scripts/regret_adagrad.py                    # two data sets, ranks 10 and 20, a table and a picture
    python scripts/regret_adagrad.py --rank 5 --seeds 1 --output out/regret.png

At each example the learner pays its loss, then takes one step. Regret is the sum of these losses less that of the
best fixed weights in hindsight. Every method has its best learning rate and δ: of the same coarse grid, then of rates
an eighth and a sixteenth of a decade around the best, on the same orders of the examples.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor
from torch.nn.functional import softplus

from hf_efcp.optim import SketchyAdaGrad

RATES = [10**power for power in (-0.5, -0.25, 0, 0.25, 0.5, 0.75, 1)]
FINER = [10**power for power in (-0.125, -0.0625, 0.0625, 0.125)]  # times the best of these
DELTAS = [1e-8, 1e-2, 1e-1]  # what the sum of squares starts from


def data(name: str) -> tuple[Tensor, Tensor]:
    """Standardised features with a constant, scaled to a mean length of 1, and labels of ±1."""
    if name == "breast cancer":
        features, labels = load_breast_cancer(return_X_y=True)
    else:  # digits: even or odd
        features, labels = load_digits(return_X_y=True)
        labels = labels % 2
    spread = features.std(0)
    features = (features - features.mean(0)) / np.where(spread > 0, spread, 1)
    features = np.concatenate([features, np.ones((len(features), 1))], 1)
    features = features / np.linalg.norm(features, axis=1).mean()
    return torch.tensor(features, dtype=torch.float32), torch.tensor(2 * labels - 1, dtype=torch.float32)


def best_loss(features: Tensor, labels: Tensor) -> float:
    """The least sum of losses of fixed weights, by L-BFGS in float64."""
    signed = labels.double()[:, None] * features.double()
    weights = torch.zeros(signed.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=2000, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = softplus(-signed @ weights).sum() + 1e-6 * weights.square().sum()  # separable data have no minimum
        loss.backward()
        return loss

    solver.step(closure)
    return float(softplus(-signed @ weights.detach()).sum())


def online_losses(features: Tensor, labels: Tensor, make: Callable[..., torch.optim.Optimizer]) -> Tensor:
    """The loss of each example before its step, (n,)."""
    weights = torch.nn.Parameter(torch.zeros(features.shape[1]))
    optimizer = make([weights])
    losses = []
    for x, y in zip(features, labels, strict=True):
        margin = y * (x @ weights.detach())
        losses.append(softplus(-margin))
        weights.grad = -y * torch.sigmoid(-margin) * x
        optimizer.step()
    return torch.stack(losses)


def methods(ranks: list[int]) -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """Optimizers by name; called with parameters, a rate and δ."""
    sketched = {
        f"S-AdaGrad, rank {rank}": lambda params, lr, delta, rank=rank: SketchyAdaGrad(
            params, lr, rank=rank, delta=delta
        )
        for rank in ranks
    }
    return {
        **sketched,
        "diagonal AdaGrad": lambda params, lr, delta: torch.optim.Adagrad(params, lr, initial_accumulator_value=delta),
        "gradient descent": lambda params, lr, delta: torch.optim.SGD(params, lr),
    }


def regrets(name: str, ranks: list[int], seeds: int) -> dict[str, tuple[str, Tensor]]:
    """For each method its best settings and the mean cumulated regret at each example."""
    features, labels = data(name)
    orders = [torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)) for seed in range(seeds)]
    share = best_loss(features, labels) * torch.arange(1, len(labels) + 1) / len(labels)

    def regret(make: Callable[..., torch.optim.Optimizer], lr: float, delta: float) -> Tensor:
        started = partial(make, lr=lr, delta=delta)
        runs = [online_losses(features[order], labels[order], started).double().cumsum(0) for order in orders]
        return torch.stack(runs).mean(0) - share

    found = {}
    for method, make in methods(ranks).items():
        deltas = DELTAS if method != "gradient descent" else [0.0]
        tried = {(lr, delta): regret(make, lr, delta) for lr, delta in itertools.product(RATES, deltas)}
        lr, delta = min(tried, key=lambda settings: tried[settings][-1])
        tried |= {(lr * factor, delta): regret(make, lr * factor, delta) for factor in FINER}
        lr, delta = best = min(tried, key=lambda settings: tried[settings][-1])
        found[method] = (f"lr {lr:.2g}" + (f", δ {delta:g}" if delta else ""), tried[best])
    return found


def plot(results: dict[str, dict[str, tuple[str, Tensor]]], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(5 * len(results), 4), layout="constrained", squeeze=False)
    for axis, (name, found) in zip(axes[0], results.items(), strict=True):
        for method, (settings, regret) in found.items():
            axis.plot(regret, label=f"{method}, {settings}")
        axis.set(title=name, xlabel="examples", ylabel="regret")
        axis.grid(alpha=0.3)
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, nargs="+", default=[10, 20])
    parser.add_argument("--seeds", type=int, default=3, help="orders of the examples (default: %(default)s)")
    parser.add_argument("--data", nargs="+", choices=("breast cancer", "digits"), default=["breast cancer", "digits"])
    parser.add_argument("--output", type=Path, default=Path("out/regret_adagrad.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {name: regrets(name, args.rank, args.seeds) for name in args.data}
    print("| data | method | settings | regret |\n|---|---|---|---|")
    for name, found in results.items():
        for method, (settings, regret) in found.items():
            print(f"| {name} | {method} | {settings} | {regret[-1]:.1f} |")
    plot(results, args.output)
    print(f"\npicture: {args.output}")


if __name__ == "__main__":
    main()
