"""What a run tells and whom: a line at its start, figures to those who report, options to those who search."""

import logging

import pytest
from transformers import Trainer

from hf_efcp.train import EfcpTrainer
from hf_efcp.train.callbacks import own_optimizer

OPTIONS = "window=3,block_size=64"


def test_the_first_step_introduces_the_optimizer(tiny_bert, texts, arguments, capsys):
    trainer = Trainer(tiny_bert(), arguments(optim="efcp_mfac", optim_args=OPTIONS, disable_tqdm=False), None, texts)
    trainer.train()
    optimizer = own_optimizer(trainer.optimizer)
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "AdamW would" in line]
    count = sum(p.numel() for p in trainer.model.parameters())
    (line,) = lines
    assert line.startswith(f"efcp_mfac, window=3: {optimizer.state_bytes() / 1e6:,.1f} MB of state for {count:,} ")
    assert line.endswith(f"{optimizer.state_bytes() / count:.2f} bytes each; AdamW would keep 8.00.")


def test_without_a_bar_the_line_is_logged(tiny_bert, texts, arguments, caplog, capsys):
    with caplog.at_level(logging.INFO, logger="hf_efcp"):
        Trainer(tiny_bert(), arguments(optim="sketchy_shampoo", max_steps=2), None, texts).train()
    assert next(r.message for r in caplog.records if "AdamW would" in r.message).startswith("sketchy_shampoo: ")
    assert "AdamW would" not in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_receives_the_metrics(tiny_bert, texts, arguments, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = Trainer(tiny_bert(), arguments(optim="efcp_mfac", report_to="tensorboard"), None, texts)
    trainer.train()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    logged = [entry for entry in trainer.state.log_history if "optim_residual_norm" in entry]
    written = events.Scalars("train/optim_residual_norm")
    assert [(event.step, event.value) for event in written] == [
        (entry["step"], pytest.approx(entry["optim_residual_norm"], rel=1e-6)) for entry in logged
    ]
    assert len(written) == 4
    assert "train/optim_state_bytes" in events.Tags()["scalars"]


@pytest.mark.filterwarnings("ignore")
def test_trackio_receives_the_metrics(tiny_bert, texts, arguments, tmp_path, monkeypatch):
    """Read back from its database, which is local where no Space is named."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    changes = {"report_to": "trackio", "project": "ours", "run_name": "one", "trackio_static_space_id": False}
    trainer = Trainer(tiny_bert(), arguments(optim="efcp_mfac", **changes), None, texts)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "optim_residual_norm" in entry]
    name = "train/optim_residual_norm"
    written = [entry for entry in SQLiteStorage.get_logs("ours", "one") if name in entry]
    assert [(entry["train/global_step"], entry[name]) for entry in written] == [
        (entry["step"], pytest.approx(entry["optim_residual_norm"], rel=1e-6)) for entry in logged
    ]
    assert len(written) == 4


@pytest.mark.filterwarnings("ignore")
def test_a_search_runs_over_options(tiny_bert, texts, arguments):
    """optuna's trials set `optim_args`, here as a dict; each run has the options of its trial."""
    pytest.importorskip("optuna")
    windows = []

    class Seen(EfcpTrainer):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            windows.append((optimizer.defaults["window"], optimizer.defaults["density"]))
            return optimizer

    def space(trial):
        window = trial.suggest_categorical("window", [2, 3])
        return {"optim_args": {"window": window, "density": trial.suggest_float("density", 0.1, 0.5)}}

    args = arguments(optim="efcp_mfac", optim_args=OPTIONS, max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer = Seen(args=args, train_dataset=texts, eval_dataset=texts[:8], model_init=tiny_bert)
    best = trainer.hyperparameter_search(hp_space=space, n_trials=3, backend="optuna", direction="minimize")
    assert len(windows) == 3
    assert (best.hyperparameters["window"], best.hyperparameters["density"]) in windows
