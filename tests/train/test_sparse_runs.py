"""Sparse training under any optimizer and precision, and what it refuses by name."""

import oracle_agent as oracle
import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_efcp.train import EfcpTrainingArguments, train_sparsely
from hf_efcp.train.sparse_options import SparseOptions, parse_settings, sparse_options

AGENT = {"gradient_correction": "agent", "correction_args": {"gamma": 0.5}}


def entries(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


RATES = {"sgd": 1.0, "sketchy_adagrad": 0.5, "efcp_mfac": 0.06}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "optim", ["adamw_torch", "sgd", "adafactor", "efcp_mfac", "efcp_ggt", "sketchy_shampoo", "sketchy_adagrad"]
)
def test_any_optimizer(optim, dtype, tmp_path):
    """Learns; the density is exact at every step; what is inactive is 0 in weights and moments."""
    trainer = oracle.make_trainer(
        tmp_path, oracle.Net(0.1, dtype=dtype), oracle.examples(dtype=dtype), optim=optim, sparsity=0.6,
        sparse_args={"interval": 3, "stop": 1.0}, max_grad_norm=1.0, gradient_accumulation_steps=2,
        num_train_epochs=8, learning_rate=RATES.get(optim, 0.03), **AGENT,
    )  # fmt: skip
    trainer.train()
    logged = entries(trainer)
    assert sum(e["loss"] for e in logged[-3:]) < 0.9 * sum(e["loss"] for e in logged[:3])
    assert {entry["sparse_density"] for entry in logged} == {logged[0]["sparse_density"]}
    assert logged[0]["sparse_density"] == round(0.4 * 120) / 120
    assert logged[-1]["agent_coefficient"] > 0
    assert logged[-1]["sparse_changes"] == 7
    states = trainer.optimizer.state
    for name, mask in trainer._sparse.sparsifier.masks.items():
        parameter = trainer.model.get_parameter(name)
        assert parameter.dtype == dtype
        assert not parameter[~mask].any()
        for key in ("exp_avg", "exp_avg_sq", "residual", "momentum_buffer"):
            value = states[parameter].get(key)
            assert value is None or value.shape != mask.shape or not value[~mask].any()


def test_hooked_statistics_are_refused(tmp_path):
    """Masks alone go with SINGD; the snapshot's passes would enter its curvature."""
    given = {"optim": "efcp_singd", "sparsity": 0.6, "learning_rate": 1e-3, "num_train_epochs": 1}
    oracle.make_trainer(
        tmp_path, oracle.Net(dtype=torch.float32), oracle.examples(dtype=torch.float32), **given
    ).train()
    trainer = oracle.make_trainer(tmp_path, oracle.Net(), oracle.examples(), **given, **AGENT)
    with pytest.raises(NotImplementedError, match="SINGD, whose curvature statistics"):
        trainer.train()


def whole_gradient(model, snapshot, data):
    """∇ of the mean loss over all data, at the snapshot."""
    batch = {"x": torch.stack([x["x"] for x in data]), "labels": torch.tensor([x["labels"] for x in data])}
    return oracle.value_and_gradient(model, {n: p.detach().clone() for n, p in snapshot.items()}, batch)[1]


def test_scaled_losses(tmp_path):
    """fp16's GradScaler, driven into overflow: u is unscaled and finite, skipped steps count for no schedule."""
    skipped, data = [], oracle.examples(40, torch.float32)

    class Watch(TrainerCallback):
        def on_optimizer_step(self, *_, optimizer, **__):
            skipped.append(optimizer.step_was_skipped)

    model = oracle.Net(dtype=torch.float32)
    trainer = oracle.make_trainer(
        tmp_path, model, data, optim="adamw_torch", learning_rate=0.01, sparsity=0.6, sparse_args={"interval": 3},
        callbacks=[Watch()], max_grad_norm=1.0, num_train_epochs=4, fp16=True, **AGENT,
    )  # fmt: skip
    # accelerate scales on accelerators alone; these two attributes put the same path on the CPU
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1)
    trainer.accelerator.native_amp = True
    trainer.train()
    core = trainer._sparse.correction.core
    assert 3 <= sum(skipped) < 15
    assert trainer._sparse.sparsifier.step == 20 - sum(skipped)
    assert core.last_refresh == 15
    expected = whole_gradient(oracle.Net(dtype=torch.float32), core.snapshot, data)
    for name, full in core.full_gradient.items():
        torch.testing.assert_close(full, expected[name], rtol=1e-2, atol=1e-3)  # half precision
    assert all(p.isfinite().all() for p in model.parameters())
    assert entries(trainer)[-1]["loss"] < entries(trainer)[0]["loss"]


def test_autocast_sees_the_swapped_weights(tmp_path, monkeypatch):
    """Autocast may serve a weight that it cast before; then g̃ would be g, and Σ(u − g̃) far from 0."""
    from hf_efcp.sparsity import GradientCorrection

    calls, measure = [], GradientCorrection.measure_

    def recording(core, gradients, at_snapshot, scale, masks):
        calls.append({n: (core.full_gradient[n] - g).double() for n, g in at_snapshot.items()})
        measure(core, gradients, at_snapshot, scale, masks)

    monkeypatch.setattr(GradientCorrection, "measure_", recording)
    trainer = oracle.make_trainer(
        tmp_path, oracle.Net(dtype=torch.float32), oracle.examples(dtype=torch.float32), bf16=True,
        gradient_correction="agent", correction_args="coefficient=grad,measure_every=1",
    )  # fmt: skip
    assert trainer.accelerator.mixed_precision == "bf16"
    trainer.train()
    assert len(calls) == 15
    for start in (0, 5, 10):
        for name in calls[0]:
            noise = torch.stack([call[name] for call in calls[start : start + 5]])
            assert noise.sum(0).norm() < 1e-5 * noise.norm(dim=0).norm()


def test_narrow_gradients_are_combined_in_float32():
    """In bfloat16 the correction at c = 0.1 would be lost to rounding in the middle; one rounding is left."""
    from hf_efcp.sparsity import CorrectionOptions, GradientCorrection

    torch.manual_seed(0)
    model = nn.Linear(30, 30, bias=False).bfloat16()
    core = GradientCorrection(model, CorrectionOptions())
    g, back = (torch.randn(30, 30).bfloat16() for _ in range(2))
    full = torch.randn(30, 30)
    core.full_gradient = {"weight": full}
    core.combine_({"weight": g}, {"weight": back}, 0.1, 4.0)
    exact = g.double() + 0.1 * (4.0 * full.double() - back.double())
    assert model.weight.grad.dtype == torch.bfloat16
    assert ((model.weight.grad.double() - exact).abs() <= 2**-8 * exact.abs() * 1.01).all()


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (
            {"is_fsdp_enabled": True},
            "does not work with FSDP, which shards parameters. Train on one process or with DDP",
        ),
        ({"is_deepspeed_enabled": True}, r"does not work with DeepSpeed \(ZeRO\)"),
    ],
)
def test_sharded_parameters_are_refused(attributes, message, tmp_path, monkeypatch):
    from hf_efcp.train.sparse import refuse_unsupported

    trainer = oracle.make_trainer(tmp_path, oracle.Net(), oracle.examples(), sparsity=0.5)
    for name, value in attributes.items():
        monkeypatch.setattr(trainer, name, value)
    with pytest.raises(NotImplementedError, match=message):
        refuse_unsupported(trainer, sparse_options(trainer.args))


@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "apollo_adamw_layerwise", "lomo"])
def test_optimizers_without_gradients_are_refused(optim, tmp_path):
    """They step inside the backward pass, before gradients can be masked or corrected."""
    from hf_efcp.train.sparse import refuse_unsupported

    trainer = oracle.make_trainer(tmp_path, oracle.Net(), oracle.examples(), sparsity=0.5)
    trainer.args.optim = optim
    with pytest.raises(NotImplementedError, match=f"needs gradients after the backward pass; {optim} keeps none"):
        refuse_unsupported(trainer, sparse_options(trainer.args))


def test_graphs_that_accelerate_was_asked_for_are_refused(tmp_path, monkeypatch):
    """`accelerate launch --dynamo_mode reduce-overhead` and the backend `cudagraphs` do not go through arguments."""
    from hf_efcp.train.sparse import refuse_unsupported

    trainer = oracle.make_trainer(tmp_path, oracle.Net(), oracle.examples(), **AGENT)
    plugin = trainer.accelerator.state.dynamo_plugin
    for name, value in (("mode", "reduce-overhead"), ("backend", "CUDAGRAPHS"), ("options", {"triton.cudagraphs": 1})):
        with monkeypatch.context() as patch:
            patch.setattr(plugin, name, value)
            with pytest.raises(NotImplementedError, match="CUDA graphs do not see"):
                refuse_unsupported(trainer, sparse_options(trainer.args))
    refuse_unsupported(trainer, sparse_options(trainer.args))


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_recorded_graphs_are_refused(mode, tmp_path):
    given = {"torch_compile_mode": mode, "sparsity": 0.5, **AGENT}
    trainer = oracle.make_trainer(tmp_path, oracle.Net(), oracle.examples())
    trainer.args.torch_compile = True
    for name, value in given.items():
        setattr(trainer.args, name, value)
    with pytest.raises(NotImplementedError, match=f"CUDA graphs do not see: use torch_compile_mode=default.*{mode}"):
        trainer.train()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsity": 1.0}, r"`sparsity` must be in \[0, 1\), got 1.0"),
        (
            {"sparsity": 0.9, "sparse_args": "initial=big"},
            "`initial` must be one of random, magnitude, zeros, got 'big'",
        ),
        ({"sparsity": "high"}, r"`sparsity` must be in \[0, 1\), got 'high'"),
        ({"gradient_correction": "agent", "correction_args": "clip=0.5"}, "`clip` must be"),
        ({"sparse_method": "rigl"}, "need `sparsity`"),
        ({"sparsity": 0.9, "sparse_method": "rigel"}, "Did you mean `rigl`"),
        ({"sparsity": 0.9, "sparse_args": "intervall=3"}, "Did you mean `interval`"),
        ({"sparsity": 0.9, "sparse_args": "interval"}, "`sparse_args` is name=value"),
        ({"sparsity": 0.9, "sparse_args": "{interval"}, "starts like JSON and is not"),
        ({"gradient_correction": "agnet"}, "Did you mean `agent`"),
        ({"correction_args": "gamma=0.1"}, "need `gradient_correction=agent`"),
        ({"gradient_correction": "agent", "correction_args": "gama=0.1"}, "Did you mean `gamma`"),
        ({"adversary": "cw"}, "must be one of fgsm, pgd"),
        ({"adversary": "pgd:step=3"}, "has no option `step`"),
        ({"adversary": "pgd:steps=0"}, "`steps` must be at least 1"),
        ({"adversary": "fgsm:epsilon=-1"}, "`epsilon` must be at least 0"),
    ],
)
def test_mistakes_are_refused_before_any_data_is_loaded(given, message, arguments):
    with pytest.raises(ValueError, match=message):
        arguments(EfcpTrainingArguments, **given)


def test_settings_are_text_json_or_a_dict():
    assert parse_settings("rate=0.5,order=after,first_dense=True,clip=none", "x") == {
        "rate": 0.5, "order": "after", "first_dense": True, "clip": None,
    }  # fmt: skip
    assert parse_settings('{"densities": {"fc": 0.5}}', "x") == {"densities": {"fc": 0.5}}
    assert parse_settings(None, "x") == {}
    assert SparseOptions(gradient_correction="agent", correction_args='{"clip": [0, 2]}').correction.clip == (0, 2)


def test_options_before_a_script_reach_its_trainer(tmp_path):
    """Whatever arguments it makes; those of its own come first."""
    train_sparsely(sparsity=0.8, sparse_method="static")
    try:
        trainer = oracle.make_trainer(tmp_path, oracle.Net(), oracle.examples(), num_train_epochs=1)
        trainer.train()
        assert trainer._sparse.sparsifier.density() == pytest.approx(0.2)
        trainer = oracle.make_trainer(tmp_path, oracle.Net(), oracle.examples(), sparsity=0.5, num_train_epochs=1)
        trainer.train()
        assert trainer._sparse.sparsifier.density() == pytest.approx(0.5)
    finally:
        train_sparsely()
    trainer = oracle.make_trainer(tmp_path, oracle.Net(), oracle.examples(), num_train_epochs=1)
    trainer.train()
    assert trainer._sparse is None


def test_a_full_gradient_that_is_not_finite_corrects_nothing(tmp_path, caplog):
    """Until the next refresh; the model trains on."""

    class Fragile(oracle.Net):
        calls = 0

        def forward(self, x, labels=None):
            outputs = super().forward(x, labels)
            self.calls += self.training
            factor = torch.nan if self.calls == 7 else 1.0  # the second batch of the first pass
            return {**outputs, "loss": outputs["loss"] * factor}

    trainer = oracle.make_trainer(
        tmp_path, Fragile(), oracle.examples(), gradient_correction="agent", num_train_epochs=3,
        correction_args="coefficient=fixed,value=0.5",
    )  # fmt: skip
    trainer.train()
    logged = [entry["agent_coefficient"] for entry in trainer.state.log_history if "agent_coefficient" in entry]
    assert logged == [0.0] * 10 + [0.5] * 5
    assert "before step 6 is not finite" in caplog.text
    assert all(p.isfinite().all() for p in trainer.model.parameters())
