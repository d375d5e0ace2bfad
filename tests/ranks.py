"""Functions run by several processes at once, with gloo on this machine."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(function: Callable[..., Any], n_ranks: int, folder: Path, *args: Any, timeout: float = 240) -> list[Any]:
    """What `function(*args)` returns on each rank: tensors and plain containers of them.

    Args:
        function: of a module, as each process imports it anew.
        folder: empty, for the ranks' meeting and results.
        timeout: seconds until all are killed.

    Raises:
        AssertionError: a rank failed; its traceback.
    """
    context = multiprocessing.get_context("spawn")
    folder.mkdir(exist_ok=True)
    ranks = [
        context.Process(target=_rank, args=(function, rank, n_ranks, str(folder), args), daemon=True)
        for rank in range(n_ranks)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout
    failed = [folder / f"error-{rank}" for rank in range(n_ranks)]
    while any(p.is_alive() for p in ranks) and time.monotonic() < deadline and not any(f.exists() for f in failed):
        ranks[0].join(0.1)
        time.sleep(0.05)
    hung = any(p.is_alive() for p in ranks) and not any(f.exists() for f in failed)
    for process in ranks:
        process.join(5 if not hung else 0)
        process.kill()
    errors = [f.read_text() for f in failed if f.exists()]
    assert not errors, errors[0]
    assert not hung, f"{function.__name__} still ran after {timeout} s."
    return [torch.load(folder / f"result-{rank}", weights_only=True) for rank in range(n_ranks)]


def _rank(function: Callable[..., Any], rank: int, n_ranks: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(n_ranks)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=n_ranks)
        try:
            assert dist.get_world_size() == n_ranks
            torch.save(function(*args), f"{folder}/result-{rank}")
        finally:
            if not os.path.exists(f"{folder}/error-{rank}"):
                dist.destroy_process_group()
    except BaseException:
        Path(f"{folder}/error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
