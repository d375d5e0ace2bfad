"""Bytes, step time and communication of an optimizer on 1, 2 and 4 processes of this machine.

    python scripts/bench_scaling.py --optim efcp_mfac --size 1000000

Each process holds the same model and gradients, as after DDP. Printed for each number of processes: bytes of state of
the fullest one, median time of a step, and what a process hands to collectives in a step, beside the formula:

    its share of the weights, 4 bytes each, and 4 bytes · flags: 1, or 2 in M-FAC and GGT
    M-FAC, GGT      8 bytes · (m for the newest row of GGᵀ, m for Gx, 1 for |x|²)
    SINGD           when factors are due, and here they are at each step, 4 bytes · (d_i² + d_o² + 4) for each layer's
                    statistics and 32 for their sizes

Processes share the machine's cores, so times say what the division costs here and not how it scales on a cluster.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from hf_efcp import create_optimizer
from hf_efcp.optim import SINGD
from hf_efcp.optim.optim_args import parse_optim_args
from hf_efcp.optim.registry import get_spec
from hf_efcp.parallel import Group


def measure(rank: int, size: int, folder: str, args: argparse.Namespace) -> None:
    """One process; writes its figures to the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    sent = count_traffic()
    torch.manual_seed(0)
    side = round((args.size / 8) ** 0.5)
    model = nn.Sequential(*[nn.Linear(side, side, bias=False) for _ in range(8)])
    options = {**({"T": 1} if get_spec(args.optim).needs_model else {}), **parse_optim_args(args.optim_args)}
    optimizer = create_optimizer(args.optim, model, lr=1e-3, **options)
    times = []
    for step in range(args.steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(32, side)).square().mean().backward()
        sent.clear()
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    torch.save(
        {
            "bytes": optimizer.state_bytes(), "time": statistics.median(times[2:]), "sent": sum(sent),
            "parameters": 8 * side**2, "window": optimizer.defaults.get("window", 0),
            "statistics": 8 * (4 * (2 * side**2 + 4) + 32) if isinstance(optimizer, SINGD) else 0,
        },
        f"{folder}/{rank}.pt",
    )  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()


def count_traffic() -> list[int]:
    """A list to which each collective adds the bytes that this process hands to it."""
    sent: list[int] = []

    def counted(name: str) -> None:
        method = getattr(Group, name)

        def call(group: Group, tensor: Tensor, *rest: object) -> object:
            if group.size > 1:
                sent.append(tensor.nbytes)
            return method(group, tensor, *rest)

        setattr(Group, name, call)

    for name in ("sum_", "gather", "exchange", "broadcast_"):
        counted(name)
    return sent


def formula(figures: dict[str, int], size: int) -> int:
    """Bytes of a step by the formula above, for rows in blocks, or layers, that divide evenly."""
    if size == 1:
        return 0
    rows = 8 * (2 * figures["window"] + 1) if figures["window"] else 0
    shared = rows + (8 if figures["window"] else 4) + figures["statistics"]
    return shared + 4 * -(-figures["parameters"] // size)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optim", default="efcp_mfac")
    parser.add_argument("--optim_args", default="")
    parser.add_argument("--size", type=int, default=2**20, help="parameters, in 8 square matrices")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    print("| processes | bytes of the fullest | of one, % | step, ms | sent a step, bytes | formula |")
    print("|---|---|---|---|---|---|")
    alone = None
    for size in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(measure, (size, folder, args), nprocs=size)
            ranks = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(size)]
        fullest, sent = max(r["bytes"] for r in ranks), max(r["sent"] for r in ranks)
        alone = alone or fullest
        duration, expected = 1e3 * max(r["time"] for r in ranks), formula(ranks[0], size)
        print(f"| {size} | {fullest:,} | {fullest / alone:.1%} | {duration:.1f} | {sent:,} | {expected:,} |")


if __name__ == "__main__":
    main()
