"""Sparse training in processes of its own: two that are one, and unmodified scripts behind the launcher."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from transformers import AutoModelForImageClassification

TESTS = Path(__file__).parents[1]

TWO = """
import os, sys, torch, torch.distributed as dist
import oracle_agent as oracle
from transformers import TrainerCallback

class Count(TrainerCallback):
    "All-reduces of gradients: DDP's own, and others."
    def on_train_begin(self, args, state, control, **kwargs):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
        wrapped = trainer.model_wrapped
        if not hasattr(wrapped, "register_comm_hook"):
            return
        def hook(group, bucket):
            reduced.append(trainer.state.global_step)
            return allreduce_hook(group, bucket)
        wrapped.register_comm_hook(None, hook)

world = int(os.environ.get("WORLD_SIZE", 1))
results = {}
for name, changes in {
    "plain": {"gradient_correction": None, "correction_args": None},
    "replace": {},
    "after": {"sparse_args": {"interval": 3, "order": "after"}, "gradient_accumulation_steps": 2},
    "grad": {"correction_args": "coefficient=grad,measure_every=2"},
    "random": {"sparse_method": "set", "sparse_args": {"interval": 3}},
}.items():
    reduced = []
    accumulation = changes.get("gradient_accumulation_steps", 1)
    given = {"sparsity": 0.6, "sparse_args": {"interval": 3}, "gradient_correction": "agent",
             "correction_args": {"gamma": 0.5}, "per_device_train_batch_size": 8 // world // accumulation,
             "num_train_epochs": 3, **changes}
    trainer = oracle.make_trainer(sys.argv[1], oracle.Net(), oracle.examples(32), callbacks=[Count()], **given)
    trainer.train()
    assert trainer.args.world_size == world
    results[name] = {
        "world": dist.get_world_size() if dist.is_initialized() else 1, "type": type(trainer.model_wrapped).__name__,
        "weights": {n: p.detach() for n, p in trainer.model.named_parameters()},
        "masks": trainer._sparse.sparsifier.masks, "changes": trainer._sparse.sparsifier.changes,
        "coefficient": trainer._sparse.correction.coefficient if trainer._sparse.correction else None,
        "reduced": [reduced.count(step) for step in range(12)],
    }
states = []
for changes in ({}, {"gradient_correction": "agent",
                     "correction_args": "coefficient=fixed,value=1e-300,refresh=2,full_grad_batches=2"}):
    trainer = oracle.make_trainer(
        sys.argv[1], oracle.Net(0.3, True), oracle.examples(36), sparsity=0.6, per_device_train_batch_size=4,
        num_train_epochs=2, **changes)
    trainer.train()
    states.append(trainer.model.state_dict())
results["normed"] = states
torch.save(results, os.path.join(sys.argv[1], f"world{world}-rank{os.environ.get('RANK', 0)}.pt"))
if dist.is_initialized():
    dist.destroy_process_group()
"""

SCRIPT = """
import torch
from sklearn.datasets import load_digits
from transformers import HfArgumentParser, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
set_seed(0)
data = load_digits(n_class=4)
pixels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
rows = [{"pixel_values": x, "labels": int(y)} for x, y in zip(pixels, data.target)]
config = ViTConfig(image_size=8, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=1,
                   num_attention_heads=2, intermediate_size=64, num_labels=4)
trainer = Trainer(ViTForImageClassification(config), args, train_dataset=rows)
trainer.train()
trainer.save_model()
trainer.save_state()
"""


def launch(*words, cwd, **environment):
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS / "cpu_torchvision"), *sys.path]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]), "OMP_NUM_THREADS": "1",
        **environment,
    }  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of the program on one process, and of both ranks of two."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "program.py").write_text(TWO)
    assert shutil.which("torchrun", path=str(Path(sys.executable).parent))
    launch(sys.executable, "program.py", str(folder), cwd=folder)
    start = ["torchrun", "--nproc_per_node", "2", "--master_port", free_port()]
    launch(*start, "program.py", str(folder), cwd=folder, ACCELERATE_USE_CPU="true")
    return [torch.load(folder / name) for name in ("world1-rank0.pt", "world2-rank0.pt", "world2-rank1.pt")]


@pytest.mark.parametrize("name", ["plain", "replace", "after", "grad", "random"])
def test_two_processes_are_one(name, runs):
    """Half the batch each: the same weights as one process to 1e-12, and the same masks on all, bit for bit."""
    alone, first, second = (run[name] for run in runs)
    assert (alone["world"], first["world"], second["world"]) == (1, 2, 2)
    assert first["type"] == "DistributedDataParallel"
    assert alone["changes"] == first["changes"] == second["changes"] >= 2
    for layer, mask in alone["masks"].items():
        assert torch.equal(mask, first["masks"][layer])
        assert torch.equal(mask, second["masks"][layer])
    for weight, value in first["weights"].items():
        assert torch.equal(value, second["weights"][weight])
        torch.testing.assert_close(value, alone["weights"][weight], rtol=0, atol=1e-12)
    if name != "plain":
        assert first["coefficient"] == second["coefficient"] != 0
        assert first["coefficient"] == pytest.approx(alone["coefficient"], abs=1e-12)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_coefficient_of_zero_changes_no_rank(rank, runs):
    """Bit for bit on each, running statistics included, which DDP sends around before some forward passes."""
    plain, corrected = runs[rank]["normed"]
    assert all(torch.equal(value, corrected[name]) for name, value in plain.items())


def test_gradients_are_exchanged_once_a_step(runs):
    """As often as without the correction; the full gradient, before steps 4 and 8, is exchanged outside of DDP."""
    plain, corrected = runs[1]["plain"]["reduced"], runs[1]["replace"]["reduced"]
    assert corrected == plain
    assert set(plain) == {1}


def test_the_command_trains_a_script_sparsely(tmp_path):
    """An unmodified script, real digits: it learns, the saved weights have the density, and load as ever."""
    (tmp_path / "train.py").write_text(SCRIPT)
    words = [
        "--sparsity", "0.9", "--sparse_method", "rigl", "--gradient_correction", "agent", "train.py",
        "--output_dir", "out", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--num_train_epochs", "4",
        "--learning_rate", "1e-2", "--per_device_train_batch_size", "48", "--logging_steps", "15",
        "--save_strategy", "no", "--dataloader_pin_memory", "false",
    ]  # fmt: skip
    launch(sys.executable, "-m", "hf_efcp.run", *words, cwd=tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    masked = [m.weight for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    density = sum(int((w != 0).sum()) for w in masked) / sum(w.numel() for w in masked)
    assert 0.097 < density <= 0.1
    data = load_digits(n_class=4)
    with torch.no_grad():
        logits = model(torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1).logits
    assert (logits.argmax(-1).numpy() == data.target).mean() > 0.6
    assert "agent_coefficient" in (tmp_path / "out" / "trainer_state.json").read_text()
