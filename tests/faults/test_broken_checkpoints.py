"""A checkpoint that is truncated, foreign or of other options: one error that names the file and what is wrong."""

import os
import shutil

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

import hf_efcp.train  # noqa: F401  (registers the optimizers)
from hf_efcp.train import EfcpTrainer
from hf_efcp.train.checkpoints import last_complete_checkpoint


def trainer(cls, folder, optim="efcp_mfac", width=16, **changes):
    set_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    ids = torch.randint(5, 100, (64, 12), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[0]) % 2} for row in ids]
    given = {
        "output_dir": str(folder), "optim": optim, "max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 2,
        "learning_rate": 1e-3, "logging_strategy": "no", "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return cls(BertForSequenceClassification(config), TrainingArguments(**{**given, **changes}), train_dataset=data)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Runs of three optimizers, one on a narrower model, with checkpoints after 2, 4 and 6 steps."""
    folder = tmp_path_factory.mktemp("saved")
    for optim in ("efcp_mfac", "efcp_ggt", "adamw_torch"):
        trainer(Trainer, folder / optim, optim, width=8 if optim == "adamw_torch" else 16).train()
    return folder


def contents(folder):
    return {
        os.path.join(root, name): os.path.getmtime(os.path.join(root, name))
        for root, _, names in os.walk(folder)
        for name in names
    }


def truncate(folder, name):
    path = folder / "checkpoint-4" / name
    os.truncate(path, path.stat().st_size // 2)


def take(name, folder, other):
    """A file of another run's checkpoint."""
    shutil.copy(other / "checkpoint-4" / name, folder / "checkpoint-4" / name)


def make_older(folder):
    """A state from before an option was added."""
    path = folder / "checkpoint-4" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    for group in state["param_groups"]:
        del group["moment_dtype"]
    torch.save(state, path)


OPTIMIZER, WEIGHTS = "optimizer.pt does not load into MFAC: ", "model.safetensors does not load into Bert.*: "
BROKEN = {
    "truncated": (
        lambda f, _: truncate(f, "optimizer.pt"),
        OPTIMIZER + ".*(PytorchStreamReader|zip archive|Invalid argument)",
    ),
    "foreign": (
        lambda f, o: take("optimizer.pt", f, o / "adamw_torch"),
        OPTIMIZER + "The saved state is not one of MFAC: its group 0 lacks",
    ),
    "another's": (
        lambda f, o: take("optimizer.pt", f, o / "efcp_ggt"),
        OPTIMIZER + "The saved state is not one of MFAC: its group 0 lacks `damping`",
    ),
    "older": (lambda f, _: make_older(f), OPTIMIZER + ".*its group 0 lacks `moment_dtype`"),
    "truncated weights": (lambda f, _: truncate(f, "model.safetensors"), WEIGHTS),
    "foreign weights": (lambda f, o: take("model.safetensors", f, o / "adamw_torch"), WEIGHTS + ".*size mismatch"),
    "truncated schedule": (lambda f, _: truncate(f, "scheduler.pt"), "scheduler.pt does not load: "),
    "truncated randomness": (lambda f, _: truncate(f, "rng_state.pth"), "rng_state.pth does not load: "),
    "truncated state": (lambda f, _: truncate(f, "trainer_state.json"), "trainer_state.json does not load: "),
}


@pytest.mark.parametrize("cls", [Trainer, EfcpTrainer])
@pytest.mark.parametrize("what", BROKEN)
def test_one_error_names_file_and_difference(saved, tmp_path, cls, what):
    spoil, wrong = BROKEN[what]
    folder = tmp_path / "run"
    shutil.copytree(saved / "efcp_mfac", folder)
    spoil(folder, saved)
    before = contents(folder)
    path = str(folder / "checkpoint-4")
    with pytest.raises(RuntimeError, match=f"checkpoint-4/{wrong}"):
        trainer(cls, folder).train(resume_from_checkpoint=path)
    assert contents(folder) == before
    trainer(cls, folder, save_strategy="no").train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_a_checkpoint_without_its_last_file_is_passed_over(saved, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(saved / "efcp_mfac", folder)
    assert last_complete_checkpoint(str(folder)) == str(folder / "checkpoint-6")
    os.remove(folder / "checkpoint-6" / "trainer_state.json")
    truncate(folder, "trainer_state.json")
    assert last_complete_checkpoint(str(folder)) == str(folder / "checkpoint-2")
    assert "checkpoint-6 is incomplete" in caplog.text
    assert last_complete_checkpoint(str(tmp_path / "nowhere")) is None
