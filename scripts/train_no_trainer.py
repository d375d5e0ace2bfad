"""Train with accelerate alone: a classifier of scikit-learn's digits in a loop of its own, with any optimizer.

    python scripts/train_no_trainer.py --optim efcp_mfac --output_dir out
    torchrun --nproc_per_node 2 scripts/train_no_trainer.py --optim efcp_mfac --output_dir out
    … --resume        goes on from the last `save_state`, on any number of processes

Shows what a loop needs: `Accelerator.prepare`, `accumulate`, a scheduler, `save_state` and `load_state`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler, TensorDataset

from hf_efcp import create_optimizer, list_optimizers
from hf_efcp.optim.optim_args import parse_optim_args

BATCH = 64  # digits of a step, over all processes and micro-batches


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optim", default="efcp_mfac", choices=list_optimizers())
    parser.add_argument("--optim_args", default="", help="name=value,… as hf-efcp explain lists them")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save_at", type=int, default=30, help="the step after which the state is saved")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser.parse_args()


def digits() -> tuple[TensorDataset, TensorDataset]:
    """23 batches of digits to train on and 297 digits to test, pixels in [0, 1]."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    return TensorDataset(x[: 23 * BATCH], y[: 23 * BATCH]), TensorDataset(x[1500:], y[1500:])


def main() -> None:
    """Train, save on the way, and say how many test digits are right."""
    args = arguments()
    # With split batches a schedule counts steps, and not steps times processes: it goes on with another number of them.
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=args.accumulate,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    set_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    optimizer = create_optimizer(
        args.optim, model, lr=args.learning_rate, weight_decay=0.01, **parse_optim_args(args.optim_args)
    )
    train, test = digits()
    loader = DataLoader(train, batch_size=BATCH // args.accumulate, sampler=EpochOrder(train), drop_last=True)
    scheduler = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / args.steps))
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    step = 0
    state = args.output_dir / "state"
    if args.resume:
        accelerator.load_state(str(state))
        step = args.save_at
    batches = endless(loader, skip=step * args.accumulate)
    while step < args.steps:
        for _ in range(args.accumulate):
            x, y = next(batches)
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        step += 1
        if step == args.save_at and not args.resume:
            accelerator.save_state(str(state))
    right = accuracy(accelerator.unwrap_model(model), test)
    accelerator.print(f"{args.optim}: {right:.1%} of {len(test)} digits after {step} steps")
    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        torch.save(accelerator.unwrap_model(model).state_dict(), args.output_dir / "model.pt")
    accelerator.wait_for_everyone()
    accelerator.end_training()


class EpochOrder(Sampler):
    """Each epoch in an order of its own, the same on any number of processes."""

    def __init__(self, data: TensorDataset):
        self._size, self._epoch = len(data), 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self._size, generator=torch.Generator().manual_seed(self._epoch))
        self._epoch += 1
        return iter(order.tolist())


def endless(loader: DataLoader, skip: int) -> Iterator[list[Tensor]]:
    """Batch after batch, epoch after epoch, without the first `skip`."""
    while True:
        for batch in loader:
            if skip > 0:
                skip -= 1
            else:
                yield batch


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Share of right labels."""
    x, y = data.tensors
    predicted: Tensor = model(x).argmax(1)
    return float((predicted == y).float().mean())


if __name__ == "__main__":
    main()
