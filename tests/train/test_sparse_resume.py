"""Checkpoints of sparse training: resume bit for bit, and masks that travel with the model."""

import oracle_agent as oracle
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, Trainer

from hf_efcp.sparsity import GradientCorrection
from hf_efcp.train import EfcpTrainer

AGENT = {"gradient_correction": "agent", "correction_args": {"gamma": 0.5}}


def everything(trainer):
    states = trainer.optimizer.state_dict()["state"]
    training = trainer._sparse
    own = [*training.sparsifier.masks.values(), *training.sparsifier.fired.values()]
    if training.correction is not None:
        own += [*training.correction.core.snapshot.values(), *training.correction.core.full_gradient.values()]
    return [
        *trainer.model.state_dict().values(),
        *(v for state in states.values() for v in state.values() if isinstance(v, torch.Tensor)),
        *own,
    ]


def last_logs(trainer, step):
    volatile = ("train_runtime", "train_loss", "per_second")
    entries = [e for e in trainer.state.log_history if e["step"] > step]
    return [
        {k: v for k, v in entry.items() if not any(x in k for x in volatile)} for entry in entries if "loss" in entry
    ]


@pytest.mark.parametrize(
    ("optim", "step", "changes"),
    [
        ("adamw_torch", 10, AGENT),
        ("adamw_torch", 12, AGENT),
        ("efcp_mfac", 12, AGENT),
        ("efcp_mfac", 10, {}),
        ("adamw_torch", 12, {"gradient_correction": "agent", "correction_args": "coefficient=grad,measure_every=2"}),
        (
            "adamw_torch",
            12,
            {
                "gradient_correction": "agent",
                "correction_args": "refresh=4,full_grad_batches=2",
                "sparse_method": "snfs",
            },
        ),
        ("adamw_torch", 12, {**AGENT, "sparse_method": "set", "gradient_accumulation_steps": 2}),
        ("adamw_torch", 10, {**AGENT, "accelerator_config": {"use_seedable_sampler": False}}),
    ],
)
def test_resume_is_bit_for_bit(optim, step, changes, tmp_path):
    """At an epoch's end (5 steps in one) and in its middle; dropout, batch norm, changing masks, shuffled data."""
    trainers = []
    for checkpoint in (None, str(tmp_path / f"checkpoint-{step}")):
        accumulation = changes.get("gradient_accumulation_steps", 1)
        trainer = oracle.make_trainer(
            tmp_path, oracle.Net(0.2, True, torch.float32), oracle.examples(36 * accumulation, torch.float32),
            optim=optim, sparsity=0.7, sparse_args={"interval": 3, "stop": 1.0}, save_strategy="steps", save_steps=step,
            learning_rate=0.01, max_grad_norm=1.0, **changes,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
        trainers.append(trainer)
    whole, again = trainers
    assert whole.state.global_step == again.state.global_step == 20
    assert whole._sparse.sparsifier.changes == again._sparse.sparsifier.changes == 6
    assert last_logs(whole, step) == last_logs(again, step)
    assert len(last_logs(again, step)) == 20 - step
    assert all(torch.equal(a, b) for a, b in zip(everything(whole), everything(again), strict=True))


def test_resuming_in_an_epoch_does_not_refresh(tmp_path, monkeypatch):
    """The stored snapshot and full gradient serve until the next epoch begins."""
    refreshed = []
    take = GradientCorrection.take_snapshot_
    monkeypatch.setattr(
        GradientCorrection, "take_snapshot_", lambda self, step: (refreshed.append(step), take(self, step))[1]
    )
    for checkpoint in (None, str(tmp_path / "checkpoint-7")):
        oracle.make_trainer(
            tmp_path, oracle.Net(), oracle.examples(), sparsity=0.7, save_strategy="steps", save_steps=7, **AGENT
        ).train(resume_from_checkpoint=checkpoint)
    assert refreshed == [0, 5, 10, 15, 10, 15]


def test_a_dense_checkpoint_is_refused(tmp_path):
    data = oracle.examples()
    oracle.make_trainer(tmp_path, oracle.Net(), data, save_strategy="steps", save_steps=7).train()
    with pytest.raises(RuntimeError, match="holds no masks, so it was not trained sparsely"):
        oracle.make_trainer(tmp_path, oracle.Net(), data, sparsity=0.7).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-7")
        )


def test_a_checkpoint_of_another_sparsity_is_refused(tmp_path):
    """Its masks would be gone on with, whatever was asked for."""
    data = oracle.examples()
    oracle.make_trainer(tmp_path, oracle.Net(), data, sparsity=0.8, save_strategy="steps", save_steps=7).train()
    with pytest.raises(ValueError, match=r"was trained with sparsity 0\.8000, and this run asks for 0\.5000"):
        oracle.make_trainer(tmp_path, oracle.Net(), data, sparsity=0.5).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-7")
        )


def test_a_correction_may_begin_at_a_checkpoint(tmp_path, caplog):
    data, given = oracle.examples(), {"sparsity": 0.8, "sparse_method": "static"}
    oracle.make_trainer(tmp_path, oracle.Net(), data, save_strategy="steps", save_steps=5, **given).train()
    trainer = oracle.make_trainer(tmp_path, oracle.Net(), data, **given, **AGENT)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert "begins at the second refresh" in caplog.text
    logged = [e["agent_coefficient"] for e in trainer.state.log_history if "agent_coefficient" in e]
    assert logged[:5] == [0.0] * 5
    assert min(logged[5:]) > 0


def test_a_model_saved_alone_keeps_its_masks(tmp_path, caplog):
    """`save_only_model` leaves no optimizer; the masks are beside the weights."""
    masks = []
    for checkpoint in (None, str(tmp_path / "checkpoint-15")):
        trainer = oracle.make_trainer(
            tmp_path, oracle.Net(), oracle.examples(), sparsity=0.7, save_strategy="steps", save_steps=15,
            save_only_model=True, sparse_args={"interval": 3, "stop": 0.6},
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
        masks.append(trainer._sparse.sparsifier.masks)
        assert trainer._sparse.sparsifier.step == 20
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert "snapshot and exploration begin anew" in caplog.text


def sparse_vit_run(tiny_vit, images, arguments, tmp_path, **changes):
    from hf_efcp.train import EfcpTrainingArguments

    args = arguments(
        EfcpTrainingArguments, optim="adamw_torch", sparsity=0.9, sparse_args={"interval": 2, "stop": 1.0}, **changes
    )
    return EfcpTrainer(tiny_vit(), args, train_dataset=images, eval_dataset=images[:8])


def test_a_saved_sparse_model_loads_and_trains_on(tiny_vit, images, arguments, tmp_path):
    """Plain names, no trace in the state dict; trained on, it keeps the masks that it was saved with."""
    trainer = sparse_vit_run(tiny_vit, images, arguments, tmp_path)
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "run"
    masks = trainer._sparse.sparsifier.masks
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert loaded.state_dict().keys() == tiny_vit().state_dict().keys()
    assert all("mask" not in name for name in load_file(folder / "model.safetensors"))
    again = EfcpTrainer(loaded, trainer.args, train_dataset=images)
    again.args.sparse_args = "{}"
    again.args.sparse_method = "static"
    again.train()
    for name, mask in again._sparse.sparsifier.masks.items():
        assert torch.equal(mask, masks[name])
        assert not loaded.get_parameter(name)[~mask].any()
    assert (~masks["vit.layers.0.mlp.fc1.weight"]).any()


def test_another_sparsity_than_the_saved_one_is_refused(tiny_vit, images, arguments, tmp_path):
    trainer = sparse_vit_run(tiny_vit, images, arguments, tmp_path)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    trainer.args.sparsity = 0.5
    with pytest.raises(ValueError, match=r"have sparsity 0\.8999, and training is to begin at 0\.5"):
        EfcpTrainer(loaded, trainer.args, train_dataset=images).train()
    trainer.args.sparse_args = {"initial": "magnitude"}
    EfcpTrainer(loaded, trainer.args, train_dataset=images).train()


def test_the_best_model_comes_with_its_masks(tiny_vit, images, arguments, tmp_path):
    """The first evaluation is made the best; at the end its weights and its masks are back, and saved together."""
    seen = []

    def accuracy(prediction):
        seen.append({name: mask.clone() for name, mask in trainer._sparse.sparsifier.masks.items()})
        return {"accuracy": 1.0 / len(seen)}

    trainer = sparse_vit_run(
        tiny_vit, images, arguments, tmp_path, save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=4,
        load_best_model_at_end=True, metric_for_best_model="accuracy",
    )  # fmt: skip
    trainer.compute_metrics = accuracy
    trainer.train()
    first, last = seen
    assert any(not torch.equal(first[name], last[name]) for name in first)
    for name, mask in trainer._sparse.sparsifier.masks.items():
        assert torch.equal(mask, first[name])
        assert not trainer.model.get_parameter(name)[~mask].any()
    trainer.save_model()
    best = tmp_path / "run" / "checkpoint-4" / "sparse_masks.safetensors"
    assert (tmp_path / "run" / "sparse_masks.safetensors").read_bytes() == best.read_bytes()


def test_weights_of_a_sparse_run_train_on_in_any_trainer(tiny_vit, images, arguments, tmp_path):
    sparse_vit_run(tiny_vit, images, arguments, tmp_path, save_strategy="steps", save_steps=4).train()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "checkpoint-4")
    Trainer(loaded, arguments(optim="adamw_torch", max_steps=1), train_dataset=images).train()


def test_training_twice_begins_anew(tmp_path):
    """Snapshot, coefficient, schedule and callbacks are those of the new run."""
    trainer = oracle.make_trainer(tmp_path, oracle.Net(), oracle.examples(), sparsity=0.7, **AGENT)
    trainer.train()
    first = trainer._sparse
    trainer.train()
    assert trainer._sparse is not first
    assert trainer._sparse.sparsifier.step == 20
    assert [type(c).__name__ for c in trainer.callback_handler.callbacks].count("SparseCallback") == 1
