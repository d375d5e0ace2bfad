"""The loop without a Trainer: accumulation, two processes, and a state that another number of processes loads."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_no_trainer
from accelerate.state import AcceleratorState, GradientState
from contract import assert_same

FLOAT32 = "value_dtype=float32,residual_dtype=float32,moment_dtype=float32,window=8,block_size=256"
STEPS = ["--steps", "12", "--save_at", "6", "--optim_args", FLOAT32]


@pytest.fixture
def train(monkeypatch, tmp_path):
    """A function that runs the script in this process and returns the weights."""

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", ["train", "--output_dir", str(tmp_path / name), *STEPS, *words])
        try:
            train_no_trainer.main()
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        return torch.load(tmp_path / name / "model.pt", weights_only=True)

    return run


def on_two(folder):
    """The same by torchrun, in two processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    command = [sys.executable, *words, train_no_trainer.__file__, "--output_dir", str(folder), *STEPS]
    root = str(Path(train_no_trainer.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "model.pt", weights_only=True)


def test_any_split_of_a_batch_and_a_resumed_run_end_alike(train, tmp_path):
    """To the rounding of sums in another order, through divisions by small roots."""
    whole = train("one")
    assert_same(train("one", "--resume"), whole)
    two = on_two(tmp_path / "two")
    for other in (train("split", "--accumulate", "8"), two, train("two", "--resume")):
        for name in whole:
            torch.testing.assert_close(other[name], whole[name], rtol=0, atol=2e-4)
