"""AGENT in Trainer against a float64 oracle, and the invariants that the correction must keep."""

import math

import oracle_agent as oracle
import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_efcp.train.random_state import random_state

AGENT = {"gamma": 0.4, "alpha": 0.3, "clip": (0.0, 1.0)}
AGENT_ARGS = {"gamma": 0.4}


class Weights(TrainerCallback):
    """Copies of the parameters after each step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, *_, model, **__):
        self.steps.append({n: p.detach().clone() for n, p in model.named_parameters()})


def batches_of(data, size=8):
    rows = [data[i : i + size] for i in range(0, len(data), size)]
    return [
        {"x": torch.stack([r["x"] for r in part]), "labels": torch.tensor([r["labels"] for r in part])} for part in rows
    ]


def first_masks(trainer):
    """Masks of a run before its first step: the trainer's own rule, run on a copy of its model."""
    from hf_efcp.sparsity import Sparsifier

    return Sparsifier(oracle.Net(), trainer.args.sparsity, "static", seed=trainer.args.seed).masks


@pytest.mark.parametrize("sparsity", [None, 0.7])
@pytest.mark.parametrize("kind", ["loss", "unclipped", "fixed", "spared"])
def test_a_run_is_the_papers(kind, sparsity, tmp_path):
    """Every weight after every step, RigL's changes included, to 1e-12."""
    data, spy = oracle.examples(), Weights()
    correction = {
        "loss": {"gamma": 0.4},
        "unclipped": {"gamma": 0.4, "clip": None},
        "fixed": {"coefficient": "fixed", "value": 0.6},
        "spared": {"gamma": 0.4, "correct_grown": False},
    }[kind]
    trainer = oracle.make_trainer(
        tmp_path, oracle.Net(), data, callbacks=[spy], gradient_correction="agent",
        train_sampling_strategy="sequential", correction_args=correction,
        sparsity=sparsity, sparse_args={"interval": 4, "stop": 1.0} if sparsity else None,
    )  # fmt: skip
    masks = first_masks(trainer) if sparsity else {}
    trainer.train()
    total = len(spy.steps)

    def share(step):
        due = step % 4 == 0 and step < total
        return 0.3 * (1 + math.cos(math.pi * step / (total - 1))) / 2 if due else None

    agent = {**AGENT, "clip": None if kind == "unclipped" else (0.0, 1.0)} if kind != "fixed" else None
    start = {n: p.detach() for n, p in oracle.Net().named_parameters()}
    expected, final_masks, c = oracle.train(
        oracle.Net(), start, masks, batches_of(data), 4, share=share if sparsity else None, agent=agent,
        fixed=0.6 if kind == "fixed" else None, spare=kind == "spared",
    )  # fmt: skip
    assert c != 0
    assert len(expected) == total == 20
    for ours, theirs in zip(spy.steps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    if sparsity:
        assert trainer._sparse.sparsifier.changes == 4
        for name, mask in final_masks.items():
            assert torch.equal(trainer._sparse.sparsifier.masks[name], mask)


def everything(trainer):
    states = trainer.optimizer.state_dict()["state"]
    return [
        *trainer.model.state_dict().values(),
        *(v for state in states.values() for v in state.values() if isinstance(v, torch.Tensor)),
    ]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("value", [0.0, 1e-300])
def test_a_coefficient_of_zero_is_the_plain_sparse_run(value, accumulation, tmp_path):
    """Bit for bit: data order, dropout, running statistics, log, generators; 1e-300 takes all the passes there are."""
    runs = []
    for correction in ({}, {"gradient_correction": "agent", "correction_args": f"coefficient=fixed,value={value}"}):
        trainer = oracle.make_trainer(
            tmp_path, oracle.Net(0.3, True, torch.float32), oracle.examples(dtype=torch.float32), sparsity=0.8,
            sparse_args="interval=3", gradient_accumulation_steps=accumulation, max_grad_norm=0.5, **correction,
        )  # fmt: skip
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs.append((trainer, everything(trainer), losses, random_state()["cpu"]))
    (plain, ours, losses, generator), (corrected, theirs, other_losses, other_generator) = runs
    assert corrected._sparse.correction.core.full_gradient
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert losses == other_losses
    assert torch.equal(generator, other_generator)
    assert plain.model.norm.num_batches_tracked > 0


class Recorder:
    """What `measure_` is given at each step: g and g̃ apart."""

    def __init__(self, monkeypatch):
        from hf_efcp.sparsity import GradientCorrection

        self.calls = []
        measure = GradientCorrection.measure_

        def recording(core, gradients, at_snapshot, scale, masks):
            copies = [{n: g.clone() for n, g in gs.items()} for gs in (gradients, at_snapshot, core.full_gradient)]
            self.calls.append((core.last_refresh, *copies))
            measure(core, gradients, at_snapshot, scale, masks)

        monkeypatch.setattr(GradientCorrection, "measure_", recording)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_correction_has_no_mean(accumulation, tmp_path, monkeypatch):
    """Σ(u − g̃) = 0 over each epoch: the pass sees the epoch's own batches, shuffled and partial ones included."""
    record = Recorder(monkeypatch)
    oracle.make_trainer(
        tmp_path, oracle.Net(), oracle.examples(), gradient_correction="agent", sparsity=0.5,
        sparse_method="static", correction_args="coefficient=grad,measure_every=1",
        gradient_accumulation_steps=accumulation,
    ).train()  # fmt: skip
    periods = {}
    for refreshed, _, old, full in record.calls:
        periods.setdefault(refreshed, []).append({n: full[n] - old[n] for n in full})
    assert len(periods) == 3
    for noise in periods.values():
        assert len(noise) == 5 if accumulation == 1 else 3
        for name in noise[0]:
            assert noise[0][name].abs().max() > 1e-4
            assert sum(x[name] for x in noise).abs().max() < 1e-12


def test_both_passes_have_the_same_dropout(tmp_path, monkeypatch):
    """At a rate of 0 the snapshot is the model itself, and so are its gradients, to the bit."""
    record = Recorder(monkeypatch)
    oracle.make_trainer(
        tmp_path, oracle.Net(0.5, True), oracle.examples(), gradient_correction="agent", momentum=0.0,
        correction_args="coefficient=grad,measure_every=1", optim="sgd", learning_rate=0.0,
    ).train()  # fmt: skip
    assert len(record.calls) == 15
    for _, now, old, _ in record.calls:
        assert all(torch.equal(now[name], old[name]) for name in now)


def test_accumulated_batches_are_one_batch(tmp_path):
    """Two micro-batches of 4 are a batch of 8, snapshot and full gradient included."""
    weights = []
    for size, accumulation in ((8, 1), (4, 2)):
        trainer = oracle.make_trainer(
            tmp_path, oracle.Net(), oracle.examples(32), gradient_correction="agent", correction_args=AGENT_ARGS,
            sparsity=0.6, sparse_args={"interval": 3, "order": "after"}, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        weights.append(dict(trainer.model.named_parameters()))
        assert trainer._sparse.correction.core.slope.slope != 0.1
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-12)


def test_clipping_sees_the_corrected_masked_gradient(tmp_path, monkeypatch):
    """The norm that is logged is that of `d ⊙ m`."""
    record, norms = Recorder(monkeypatch), []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, *_, model, **__):
            norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters())))

    trainer = oracle.make_trainer(
        tmp_path, oracle.Net(), oracle.examples(), gradient_correction="agent", sparsity=0.7, sparse_method="static",
        correction_args="coefficient=grad,measure_every=1,initial=0", max_grad_norm=1e-3, callbacks=[Norms()],
    )  # fmt: skip
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry][5:]
    masks = trainer._sparse.sparsifier.masks
    assert norms == pytest.approx([1e-3] * 20, rel=1e-4)  # clip_grad_norm_ adds 1e-6 to the norm
    assert max(entry["agent_coefficient"] for entry in logged) > 0.1
    for entry, (_, now, old, full) in zip(logged, record.calls, strict=True):
        c = entry["agent_coefficient"]
        d = [(now[n] + c * (full[n] - old[n])) * masks.get(n, 1) for n in now]
        assert entry["grad_norm"] == pytest.approx(math.sqrt(sum(float(x.square().sum()) for x in d)), rel=1e-6)


def test_refreshes_may_come_in_steps_and_from_some_batches(tmp_path, monkeypatch):
    """Every 3 steps, from 2 batches: those that come next, or the epoch's last."""
    record = Recorder(monkeypatch)
    trainer = oracle.make_trainer(
        tmp_path, oracle.Net(), oracle.examples(40), gradient_correction="agent", num_train_epochs=2,
        correction_args="coefficient=grad,measure_every=1,refresh=3,full_grad_batches=2",
    )  # fmt: skip
    trainer.train()
    assert [refreshed for refreshed, *_ in record.calls] == [3, 3, 3, 6, 6, 6, 9]
    by_step = dict(zip(range(3, 10), record.calls, strict=True))
    for first, period in ((3, 3), (6, 6)):  # the pass before step 3 saw batches 3 and 4, that before 6 those of 1 and 2
        pair = [by_step[first][2], by_step[first + 1][2]]
        for name, full in by_step[period][3].items():
            torch.testing.assert_close((pair[0][name] + pair[1][name]) / 2, full, rtol=0, atol=1e-12)


def test_the_linear_coefficient_falls_to_zero(tmp_path):
    trainer = oracle.make_trainer(
        tmp_path, oracle.Net(), oracle.examples(), gradient_correction="agent",
        correction_args="coefficient=linear,value=0.8",
    )  # fmt: skip
    trainer.train()
    logged = [entry["agent_coefficient"] for entry in trainer.state.log_history if "agent_coefficient" in entry]
    assert logged == pytest.approx([0.0] * 5 + [0.8 * (1 - step / 20) for step in range(5, 20)])


def test_gradient_checkpointing_changes_nothing(tiny_vit, images, tmp_path):
    """A recomputed forward pass ends before the weights are swapped."""
    runs = []
    for checkpointing in (False, True):
        trainer = oracle.make_trainer(
            tmp_path, tiny_vit().double(), [{**x, "pixel_values": x["pixel_values"].double()} for x in images],
            gradient_correction="agent", correction_args=AGENT_ARGS, sparsity=0.8, sparse_args="interval=3",
            activation_checkpointing=checkpointing, activation_checkpointing_kwargs={"use_reentrant": False},
            num_train_epochs=2,
        )  # fmt: skip
        trainer.train()
        runs.append(dict(trainer.model.named_parameters()))
        assert trainer._sparse.correction.coefficient > 0
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=1e-12)


@pytest.mark.slow
def test_compiled_models_see_the_swapped_weights(tmp_path):
    """Swapping pointers must not leave a compiled forward pass with the weights that it was traced with."""
    runs = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        trainer = oracle.make_trainer(
            tmp_path, oracle.Net(0.0, True), oracle.examples(), gradient_correction="agent", sparsity=0.6,
            correction_args=AGENT_ARGS, sparse_args={"interval": 3, "order": "after"}, **compiled,
        )  # fmt: skip
        trainer.train()
        runs.append(trainer.model.state_dict())
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=1e-12)


def test_workers_are_no_obstacle(tmp_path, monkeypatch):
    """Persistent ones have a single iterator, which the epoch is using."""
    record = Recorder(monkeypatch)
    oracle.make_trainer(
        tmp_path, oracle.Net(), oracle.examples(), gradient_correction="agent", num_train_epochs=2,
        correction_args="coefficient=grad,measure_every=1", dataloader_num_workers=1,
        dataloader_persistent_workers=True,
    ).train()  # fmt: skip
    assert len(record.calls) == 5
    for name in record.calls[0][1]:
        assert sum(full[name] - old[name] for _, _, old, full in record.calls).abs().max() < 1e-12


def test_frozen_layers_are_left_out(tmp_path):
    model = oracle.Net()
    model.first.requires_grad_(False)
    before = model.first.weight.clone()
    trainer = oracle.make_trainer(
        tmp_path, model, oracle.examples(), gradient_correction="agent", correction_args=AGENT_ARGS, sparsity=0.5
    )
    trainer.train()
    assert torch.equal(model.first.weight, before)
    assert list(trainer._sparse.sparsifier.masks) == ["second.weight"]
    assert isinstance(model.first, nn.Linear)
