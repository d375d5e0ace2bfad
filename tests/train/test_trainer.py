"""Training through Trainer: metrics in the logs, tags on the model, arguments that are checked early."""

import inspect
import json
import logging
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import IntervalStrategy

import hf_efcp.train.trainer
from hf_efcp.optim import MFAC
from hf_efcp.train import EfcpTrainer, EfcpTrainingArguments
from hf_efcp.train.callbacks import own_optimizer, will_log
from hf_efcp.train.model_card import write_model_card


def training_entries(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("cls", [Trainer, EfcpTrainer])
def test_metrics_of_the_optimizer_stand_in_the_logs(cls, tiny_bert, texts, arguments):
    trainer = cls(tiny_bert(), arguments(optim="efcp_mfac"), train_dataset=texts)
    trainer.train()
    entries = training_entries(trainer)
    optimizer = own_optimizer(trainer.optimizer)
    assert [entry["step"] for entry in entries] == [2, 4, 6, 8]
    for entry in entries:
        assert entry["optim_state_bytes"] == optimizer.state_bytes()
        assert entry["optim_skipped_steps"] == 0
    assert {f"optim_{name}" for name in optimizer.metrics()} <= entries[-1].keys()


def test_later_callbacks_see_the_metrics(tiny_bert, texts, arguments):
    """TensorBoard and its like get the dict that is passed on, not the history."""
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            seen.append(dict(logs))

    Trainer(tiny_bert(), arguments(optim="mfac"), train_dataset=texts, callbacks=[Reporter]).train()
    assert all("optim_state_bytes" in logs for logs in seen if "loss" in logs)
    assert not any("optim_state_bytes" in logs for logs in seen if "loss" not in logs)


def test_metrics_are_read_at_logging_steps_alone(tiny_bert, texts, arguments, monkeypatch):
    """They wait for the device; and what they need is recorded in the steps that are logged."""
    read, recorded = [], []
    metrics, step = MFAC.metrics, MFAC.step

    def reading(self):
        read.append(self)
        return metrics(self)

    def stepping(self, closure=None):
        recorded.append(self.record_metrics)
        return step(self, closure)

    monkeypatch.setattr(MFAC, "metrics", reading)
    monkeypatch.setattr(MFAC, "step", stepping)
    monkeypatch.setattr(MFAC, "record_metrics", False, raising=False)
    args = arguments(optim="efcp_mfac", logging_steps=4, logging_first_step=True)
    Trainer(tiny_bert(), args, train_dataset=texts).train()
    assert len(read) == 3
    assert recorded == [True, False, False, True, False, False, False, True]


def test_every_step_of_an_epoch_may_be_logged(arguments):
    args = arguments(logging_strategy=IntervalStrategy.EPOCH)
    assert all(will_log(args, TrainerState(global_step=step, logging_steps=500)) for step in range(3))


def test_other_optimizers_are_left_alone(tiny_bert, texts, arguments):
    model = tiny_bert()
    trainer = EfcpTrainer(model, arguments(optim="adamw_torch"), train_dataset=texts)
    trainer.train()
    assert not any(name.startswith("optim_") for entry in training_entries(trainer) for name in entry)
    assert not model.model_tags


@pytest.mark.parametrize(("optim", "tag"), [("mfac", "mfac"), ("adamw_torch", "efcp_mfac")])
def test_the_model_is_tagged_as_its_card_is(optim, tag, tiny_bert, texts, arguments, tmp_path):
    model = tiny_bert()
    in_code = {"optimizer_cls_and_kwargs": (MFAC, {"lr": 1e-3, "window": 2})} if tag != optim else {}
    trainer = Trainer(model, arguments(optim=optim, max_steps=1), train_dataset=texts, **in_code)
    trainer.train()
    assert set(model.model_tags) == {"hf_efcp", tag}
    write_model_card(tmp_path, trainer)
    assert {"hf_efcp", tag} <= set(ModelCard.load(tmp_path / "README.md").data.tags)


def test_skipped_steps_are_reported_once(tiny_bert, texts, arguments, caplog):
    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                model.classifier.weight.grad.fill_(float("nan"))

    trainer = Trainer(tiny_bert(), arguments(optim="efcp_mfac"), train_dataset=texts, callbacks=[Poison])
    trainer.train()
    assert [entry["optim_skipped_steps"] for entry in training_entries(trainer)] == [0, 1, 1, 1]
    reports = [record.getMessage() for record in caplog.records if record.name.startswith("hf_efcp")]
    assert len(reports) == 1
    assert "1 of the steps up to 4" in reports[0]


def test_arguments_default_to_an_optimizer_of_ours(tiny_bert, arguments):
    args = arguments(EfcpTrainingArguments, optim_args={"window": 3, "value_dtype": torch.bfloat16, "density": 0.5})
    optimizer = EfcpTrainer(tiny_bert(), args).create_optimizer()
    settings = [optimizer.defaults[name] for name in ("compression", "window", "value_dtype", "density")]
    assert settings == ["topk", 3, "bfloat16", 0.5]
    json.dumps(args.to_dict())


def test_arguments_parse_from_a_command_line(tmp_path):
    parser = HfArgumentParser(EfcpTrainingArguments)
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--optim_args", "window=3", "--weight_decay", "0.1"]
    (args,) = parser.parse_args_into_dataclasses(words)
    assert (args.optim, args.optim_args, args.weight_decay) == ("efcp_mfac", "window=3", 0.1)


@pytest.mark.parametrize("given", ["widow=3", {"widow": 3}])
def test_misspelt_options_are_refused_before_any_data_is_loaded(given, arguments):
    with pytest.raises(ValueError, match=r"no option `widow`\. Did you mean `window`"):
        arguments(EfcpTrainingArguments, optim_args=given)


def test_arguments_leave_other_optimizers_their_options(arguments):
    assert arguments(EfcpTrainingArguments, optim="adamw_torch", optim_args="fused=False").optim_args == "fused=False"


def test_the_card_of_another_optimizer_is_trainers(tiny_bert, texts, arguments, tmp_path):
    trainer = EfcpTrainer(tiny_bert(), arguments(optim="adamw_torch", max_steps=1), train_dataset=texts)
    trainer.train()
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "generated_from_trainer" in card
    assert "hf_efcp" not in card


def test_the_card_tells_the_optimizer_and_keeps_what_it_is_given(tiny_bert, texts, arguments, tmp_path):
    trainer = EfcpTrainer(tiny_bert(), arguments(optim="efcp_mfac", max_steps=1), train_dataset=texts)
    trainer.train()
    trainer.create_model_card("en", model_name="mine")
    card = ModelCard.load(tmp_path / "run" / "README.md").data
    assert (card.language, card.model_name) == ("en", "mine")
    assert {"hf_efcp", "efcp_mfac"} <= set(card.tags)


def test_without_jinja2_the_card_is_trainers(tiny_bert, texts, arguments, tmp_path, monkeypatch, caplog):
    trainer = EfcpTrainer(tiny_bert(), arguments(optim="efcp_mfac", max_steps=1), train_dataset=texts)
    trainer.train()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with caplog.at_level(logging.WARNING, logger="hf_efcp"):
        trainer.create_model_card(model_name="mine")
    assert "pip install jinja2" in caplog.text
    assert "generated automatically" in (tmp_path / "run" / "README.md").read_text()


def test_the_trainer_overrides_little():
    """Each override is a seam that a new transformers may move."""
    own = {name for name, value in vars(EfcpTrainer).items() if inspect.isfunction(value)}
    assert {name for name in own if hasattr(Trainer, name)} == {
        "_load_from_checkpoint",
        "_load_best_model",
        "_issue_warnings_after_load",
        "create_model_card",
        "init_hf_repo",
        "push_to_hub",
        "_push_from_checkpoint",
        "__init__",
        "train",
        "_prepare_for_training",
        "training_step",
        "log",
        "_save",
        "_save_optimizer_and_scheduler",
        "_load_rng_state",
    }
    assert own - set(dir(Trainer)) == {"_restoring", "_repository"}
    assert hf_efcp.train.trainer.EfcpTrainer is EfcpTrainer
