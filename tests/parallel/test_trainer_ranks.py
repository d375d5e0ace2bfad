"""Two processes of a Trainer that knows nothing of this package, by torchrun and accelerate, through the launcher."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contract import assert_same

from hf_efcp.optim.registry import create_optimizer, get_spec, list_optimizers

HERE = Path(__file__).parent
OPTIONS = {"window": 4, "block_size": 64, "density": 0.1, "rank": 2, "update_freq": 2}
NAMES = [name for name in list_optimizers() if name != "singd"]  # which is efcp_singd with other defaults


def options_of(name):
    return {option: value for option, value in OPTIONS.items() if option in get_spec(name).options()}


def launch(*words, folder, names=(), script="trainer_script.py", **environment):
    """Run a command on a script; what each rank saved."""
    folder.mkdir()
    arguments = {
        "OPTIM_ARGS_" + name: ",".join(f"{option}={value}" for option, value in options_of(name).items())
        for name in names
    }
    environment = {
        **os.environ, "OPTIMIZERS": ",".join(names), **arguments, "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent / "cpu_torchvision"), *sys.path]), **environment,
    }  # fmt: skip
    command = [sys.executable, "-m", *words, str(HERE / script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Every optimizer, with transformers' own Trainer."""
    words = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port(), "-m", "hf_efcp.run"]
    folder = tmp_path_factory.mktemp("plain") / "out"
    return launch(*words, "--trainer", "transformers", names=NAMES, folder=folder), folder


each = pytest.mark.parametrize("name", NAMES)


@each
def test_ranks_agree_and_resume_bit_for_bit(plain, name):
    (first, second), _ = plain
    assert first["trainer"].startswith("transformers")
    for key in ("weights", "resumed", "at once", "accumulated"):
        assert_same(second[name][key], first[name][key], key)
    assert_same(first[name]["resumed"], first[name]["weights"])


@each
def test_eight_micro_batches_are_one_batch(plain, name):
    """To a tenth of the learning rate: sums in another order, divided by the roots of entries that are nearly zero."""
    first = plain[0][0][name]
    torch.testing.assert_close(first["accumulated"], first["at once"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if not get_spec(name).needs_model])
def test_rank_0_saves_the_state_of_both(plain, name):
    """The file is one that a single process loads: each parameter's state whole."""
    ranks, folder = plain
    state = torch.load(folder / name / "checkpoint-3" / "optimizer.pt", weights_only=True)
    shapes = [w.shape for w in ranks[0][name]["weights"]]
    groups, sizes = [], [len(group["params"]) for group in state["param_groups"]]
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    matrices = [p for p in params if p.ndim > 1]
    assert sum(sizes) == len(params)
    groups = [{"params": matrices}, {"params": [p for p in params if p.ndim <= 1]}]
    if [len(group["params"]) for group in groups] == sizes:
        optimizer = create_optimizer(name, groups, lr=1e-3, **options_of(name))
        optimizer.load_state_dict(state)
        assert max(rank[name]["bytes"] for rank in ranks) < 0.7 * optimizer.state_bytes()


def test_logs_have_the_figures_of_the_whole_model(plain):
    log = plain[0][0]["efcp_mfac"]["log"]
    assert {"optim_gradient_norm", "optim_residual_norm", "optim_state_bytes"} <= log.keys()
    assert log == {**plain[0][1]["efcp_mfac"]["log"], "optim_state_bytes": log["optim_state_bytes"]} | {
        name: log[name] for name in log if name.startswith("optim_state")
    }


def test_accelerate_launches_what_torchrun_does(plain, tmp_path):
    words = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", free_port()]
    ranks = launch(*words, "-m", "hf_efcp.run", names=["efcp_mfac"], folder=tmp_path / "out", ACCELERATE_USE_CPU="true")
    assert ranks[0]["trainer"] == "hf_efcp.train.trainer"
    assert_same(ranks[0]["efcp_mfac"]["weights"], plain[0][0]["efcp_mfac"]["weights"])


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """FSDP2 by accelerate, in transformers' own Trainer."""
    words = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port(), "-m", "hf_efcp.run"]
    folder = tmp_path_factory.mktemp("sharded") / "out"
    return launch(*words, "--trainer", "transformers", script="fsdp_script.py", folder=folder)


@pytest.mark.parametrize("form", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
@pytest.mark.parametrize("name", ["efcp_mfac", "efcp_ggt"])
def test_fsdp2_resumes_bit_for_bit_from_both_forms_of_checkpoint(sharded, name, form):
    first, second = (rank[f"{name} {form}"] for rank in sharded)
    assert_same(second["weights"], first["weights"])
    assert_same(first["resumed"], first["weights"])
    assert {first["state"][key] for key in ("indices", "values", "residual", "exp_avg")} == {"DTensor"}


def test_fsdp2_refuses_by_name_what_needs_whole_parameters(sharded):
    for rank in sharded:
        for name, owner in (
            ("sketchy_shampoo", "SketchyShampoo"), ("sketchy_adagrad", "SketchyAdaGrad"), ("efcp_singd", "SINGD"),
            ("efcp_mfac_lowrank", "compression='lowrank'"),
        ):  # fmt: skip
            assert owner in rank[name]
            assert "efcp_mfac" in rank[name]
