"""AGENT and RigL in plain float64 loops, written from the papers, and the small models that tests train."""

import math

import torch
from torch import nn

from hf_efcp.train import EfcpTrainer, EfcpTrainingArguments


class Net(nn.Module):
    """Two linear layers with the interface of transformers' models; dropout and batch norm where asked for."""

    def __init__(self, dropout=0.0, norm=False, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 4)
        self.norm = nn.BatchNorm1d(12) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.to(dtype)

    def forward(self, x, labels=None):
        logits = self.second(self.dropout(torch.tanh(self.norm(self.first(x)))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def examples(count=36, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(count, 6, generator=generator, dtype=torch.float64).to(dtype)
    return [{"x": x, "labels": int(x[:4].argmax())} for x in inputs]


def make_trainer(folder, model, data, *, momentum=0.9, optim=None, callbacks=None, cls=EfcpTrainer, **changes):
    """A quiet trainer on the CPU: SGD with a constant rate and without clipping, unless `changes` say otherwise."""
    given = {
        "output_dir": str(folder), "num_train_epochs": 4, "per_device_train_batch_size": 8, "learning_rate": 0.1,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "save_strategy": "no", "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "logging_steps": 1,
        "optim": optim or "adamw_torch",
    }  # fmt: skip
    args = EfcpTrainingArguments(**{**given, **changes})
    own = {} if optim else {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1, "momentum": momentum})}
    return cls(model, args, train_dataset=data, callbacks=callbacks, **own)


def value_and_gradient(model, weights, batch):
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    loss = torch.func.functional_call(model, leaves, (batch["x"], batch["labels"]))["loss"]
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return float(loss.detach()), dict(zip(leaves, gradients, strict=True))


def slope_coefficient(a, o, tau, *, gamma, alpha, clip):
    """τ ← (1 − α)τ + α·clip(Cov(a, o)/Var(o)); returns τ and c = γτ."""
    a, o = torch.tensor(a, dtype=torch.float64), torch.tensor(o, dtype=torch.float64)
    covariance = ((a - a.mean()) * (o - o.mean())).sum() / (len(a) - 1)
    slope = float(covariance / o.var(unbiased=True))
    tau = (1 - alpha) * tau + alpha * (min(clip[1], max(clip[0], slope)) if clip else slope)
    return tau, gamma * tau


def rigl(weight, mask, gradient, share):
    """Drop the ⌈ρk⌉ smallest active weights, grow where the dense gradient is largest; new weights are 0."""
    active = mask.flatten().nonzero().flatten().tolist()
    count = math.ceil(share * len(active))
    flat, scores = weight.flatten(), gradient.flatten().abs()
    dropped = sorted(active, key=lambda i: float(flat[i].abs()))[:count]
    kept = [i for i in active if i not in dropped]
    inactive = [i for i in range(flat.numel()) if i not in kept]
    born = sorted(inactive, key=lambda i: -float(scores[i]))[:count]
    new = torch.zeros_like(flat, dtype=torch.bool)
    new[kept + born] = True
    old = torch.zeros_like(new)
    old[kept] = True
    return new.view_as(mask), old.view_as(mask)


def train(
    model, weights, masks, batches, epochs, *, lr=0.1, momentum=0.9, share=None, agent=None, fixed=None, spare=False
):
    """Weights after each step of SGD on `d ⊙ m`, `d = g + c(u − g̃)`.

    Args:
        share: of a step's number, counted from 1: ρ where the topology changes instead of the optimizer's step.
        agent: keywords of `slope_coefficient`; `fixed`: a coefficient instead. In the first epoch c is 0.
        spare: correct no masked weight that is 0 at the snapshot.
    """
    weights = {n: w.clone() * masks.get(n, 1) for n, w in weights.items()}
    snapshot, velocity, trajectory = dict(weights), {}, []
    masks, tau, c, u = dict(masks), 0.1, 0.0, None
    for epoch in range(epochs):
        if epoch and (agent or fixed is not None):
            now = [value_and_gradient(model, weights, b) for b in batches]
            old = [value_and_gradient(model, snapshot, b)[0] for b in batches]
            u = {n: sum(g[n] for _, g in now) / len(batches) for n in weights}
            c = fixed
            if agent:
                tau, c = slope_coefficient([a for a, _ in now], old, tau, **agent)
            snapshot = dict(weights)
        for batch in batches:
            step = len(trajectory) + 1
            _, g = value_and_gradient(model, weights, batch)
            rate = share(step) if share else None
            if rate is not None:
                for n in masks:
                    masks[n], kept = rigl(weights[n], masks[n], g[n], rate)
                    weights[n] = weights[n] * kept
                    velocity[n] = velocity[n] * kept
            else:
                if u is not None:
                    _, back = value_and_gradient(model, snapshot, batch)
                    where = {n: snapshot[n] != 0 if spare and n in masks else 1 for n in g}
                    g = {n: g[n] + c * (u[n] - back[n]) * where[n] for n in g}
                for n in weights:
                    masked = g[n] * masks.get(n, 1)
                    velocity[n] = masked if n not in velocity else momentum * velocity[n] + masked
                    weights[n] = (weights[n] - lr * velocity[n]) * masks.get(n, 1)
            trajectory.append(dict(weights))
    return trajectory, masks, c
