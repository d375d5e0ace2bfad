"""SIGKILL at any moment costs the steps since the last checkpoint and nothing else."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from contract import Case, assert_same, backward, small, tiny_model
from ranks import run_ranks

from hf_efcp.optim.registry import get_spec, list_optimizers

sys.path.insert(0, str(Path(__file__).parent))


def in_nursery(folder, name, options, n_kills):
    """Weights of a run killed `n_kills` times and of one that nobody killed."""
    context = multiprocessing.get_context("spawn")
    nursery = context.Process(target=_nursery, args=(str(folder), name, options, n_kills))
    nursery.start()
    nursery.join(400)
    nursery.kill()
    assert nursery.exitcode == 0
    return [torch.load(folder / which / "weights.pt", weights_only=True) for which in ("killed", "whole")]


def _nursery(folder, name, options, n_kills):
    import victim

    assert not victim.forked(folder=f"{folder}/whole", name=name, options=options)
    os.makedirs(f"{folder}/killed")
    assert victim.kill_often(f"{folder}/killed", name, options, n_kills) == n_kills


def options_of(name):
    options = {"window": 4, "block_size": 64, "density": 0.1, "rank": 2, "update_freq": 2}
    return {option: value for option, value in options.items() if option in get_spec(name).options()}


def test_twenty_kills_change_no_bit(tmp_path):
    killed, whole = in_nursery(tmp_path, "efcp_mfac", options_of("efcp_mfac"), 20)
    assert_same(killed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", list_optimizers())
def test_kills_change_no_bit_with_any_optimizer(name, tmp_path):
    killed, whole = in_nursery(tmp_path, name, options_of(name), 20)
    assert_same(killed, whole)


def lose_a_rank():
    """Rank 1 dies before its fourth step; rank 0 does not know."""
    model = tiny_model()
    optimizer = Case("efcp_mfac", small("efcp_mfac").options).build(model)
    for step in range(6):
        if step == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        backward(model, step)
        optimizer.step()


def test_a_rank_that_dies_ends_the_others_with_an_error(tmp_path):
    with pytest.raises(AssertionError, match=r"rank 0:[\s\S]*(Connection|connection|peer)"):
        run_ranks(lose_a_rank, 2, tmp_path / "ranks", timeout=60)
