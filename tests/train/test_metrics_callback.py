"""`EfcpMetricsCallback`: what the optimizer knows of its curvature, in Trainer's logs, where it is asked for."""

import logging
import math

import pytest
from transformers import Trainer, TrainerCallback, trainer

from hf_efcp.optim import MFAC
from hf_efcp.train import EfcpMetricsCallback, EfcpTrainer, log_diagnostics
from hf_efcp.train.callbacks import own_optimizer

FIGURES = {
    "optim_effective_rank", "optim_eigenvalue_1", "optim_eigenvalue_2", "optim_preconditioning_scale",
    "optim_preconditioning_cosine", "optim_residual_over_gradient",
}  # fmt: skip


class Reporter(TrainerCallback):
    """Keeps what TensorBoard and its like are given."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.seen.append(dict(logs))


def entries(of):
    return [entry for entry in of.state.log_history if "loss" in entry]


@pytest.mark.parametrize("cls", [Trainer, EfcpTrainer])
@pytest.mark.parametrize("optim", ["efcp_mfac", "efcp_ggt_lowrank"])
def test_the_figures_stand_in_the_log_and_before_the_reporters(cls, optim, tiny_bert, texts, arguments, monkeypatch):
    reporter = Reporter()
    monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, reporter])
    run = cls(
        tiny_bert(), arguments(optim=optim, optim_args="window=4"), train_dataset=texts,
        callbacks=[EfcpMetricsCallback()],
    )  # fmt: skip
    run.train()
    logged = [entry for entry in reporter.seen if "loss" in entry]
    assert len(entries(run)) == len(logged) == 4
    for entry, reported in zip(entries(run), logged, strict=True):
        assert entry.keys() >= FIGURES
        assert reported.keys() >= FIGURES
        assert all(math.isfinite(entry[name]) for name in FIGURES)
        assert -1 <= entry["optim_preconditioning_cosine"] <= 1
        assert 1 <= entry["optim_effective_rank"] <= 4
        assert entry["optim_eigenvalue_1"] >= entry["optim_eigenvalue_2"] >= 0
        ratio = entry["optim_residual_norm"] / entry["optim_gradient_norm"]
        assert entry["optim_residual_over_gradient"] == pytest.approx(ratio)


def test_they_are_the_optimizers_diagnostics(tiny_bert, texts, arguments):
    run = Trainer(
        tiny_bert(), arguments(optim="efcp_mfac"), train_dataset=texts, callbacks=[EfcpMetricsCallback]
    )  # fmt: skip
    run.train()
    for name, value in own_optimizer(run.optimizer).diagnostics().items():
        assert entries(run)[-1][f"optim_{name}"] == value


def test_without_the_callback_nothing_is_computed(tiny_bert, texts, arguments, monkeypatch):
    monkeypatch.setattr(MFAC, "diagnostics", lambda self: pytest.fail("not asked for"))
    run = Trainer(tiny_bert(), arguments(optim="efcp_mfac"), train_dataset=texts)
    run.train()
    assert not FIGURES & entries(run)[-1].keys()


def test_an_optimizer_goes_on_without_it_in_the_next_trainer(tiny_bert, texts, arguments):
    first = Trainer(
        tiny_bert(), arguments(optim="efcp_mfac"), train_dataset=texts, callbacks=[EfcpMetricsCallback()]
    )  # fmt: skip
    first.train()
    again = Trainer(
        first.model, arguments(), train_dataset=texts, optimizers=(own_optimizer(first.optimizer), None)
    )  # fmt: skip
    again.train()
    assert entries(first)[-1].keys() >= FIGURES
    assert not FIGURES & entries(again)[-1].keys()


def test_every_trainer_logs_them_after_log_diagnostics(tiny_bert, texts, arguments, monkeypatch):
    """What `--metrics` of the launcher does."""
    monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", list(trainer.DEFAULT_CALLBACKS))
    log_diagnostics()
    log_diagnostics()
    assert trainer.DEFAULT_CALLBACKS.count(EfcpMetricsCallback) == 1
    run = Trainer(tiny_bert(), arguments(optim="mfac", optim_args="window=4"), train_dataset=texts)
    run.train()
    assert entries(run)[-1].keys() >= FIGURES - {"optim_residual_over_gradient"}  # dense rows leave nothing behind


def test_an_optimizer_without_diagnostics_is_named_once(tiny_bert, texts, arguments, caplog):
    run = Trainer(
        tiny_bert(), arguments(optim="adamw_torch"), train_dataset=texts, callbacks=[EfcpMetricsCallback()]
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="hf_efcp"):
        run.train()
    assert caplog.text.count("AdamW has no diagnostics") == 1
    assert not any(name.startswith("optim_") for name in entries(run)[-1])
