"""The launcher: scripts that know nothing of this package, in processes of their own."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import trainer

from hf_efcp import list_optimizers
from hf_efcp.adamw_patch import adamw_replacement, patch_adamw
from hf_efcp.optim import MFAC, get_spec
from hf_efcp.run import _OPTIONS, main, parse
from hf_efcp.train import EfcpMetricsCallback

TRAINER_SCRIPT = """
import os, torch, torch.distributed as dist
from transformers import (BertConfig, BertForSequenceClassification, HfArgumentParser, Seq2SeqTrainer, Trainer,
                          TrainingArguments, set_seed)
import neighbour

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
set_seed(0)
model = BertForSequenceClassification(BertConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1,
    num_attention_heads=2, intermediate_size=32, max_position_embeddings=16))
ids = torch.randint(5, 100, (64, 12), generator=torch.Generator().manual_seed(1))
data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[0]) % 2} for row in ids]
trainer = Trainer(model, args, train_dataset=data)
trainer.train()
world = dist.get_world_size() if dist.is_initialized() else 1
rank = dist.get_rank() if dist.is_initialized() else 0
optimizer = trainer.optimizer.optimizer
torch.save({
    "world": world, "optimizer": type(optimizer).__name__, "window": optimizer.defaults.get("window"),
    "trainers": [type(trainer).__module__, Seq2SeqTrainer.__mro__[1].__module__],
    "logged": sorted(trainer.state.log_history[0]), "name": __name__,
    "weights": [p.detach() for p in model.parameters()],
}, os.path.join(args.output_dir, f"rank{rank}.pt"))
"""
TRAINING = [
    "--use_cpu", "--report_to", "none", "--max_steps", "4", "--logging_steps", "2", "--save_strategy", "no",
    "--disable_tqdm", "true", "--per_device_train_batch_size", "8", "--learning_rate", "1e-3",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A folder with a Trainer script and its neighbour, and nothing of this package."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(TRAINER_SCRIPT)
    (tmp_path / "scripts" / "neighbour.py").write_text("")
    return tmp_path


def launch(*words, cwd, **environment):
    """Run a command; its standard error, or a failure that shows it."""
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "cpu_torchvision"), *sys.path]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]), **environment,
    }  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def test_an_unmodified_script_takes_the_optimizer(folder):
    script = ["scripts/train.py", "--output_dir", "out", "--optim", "efcp_mfac", "--optim_args", "window=3"]
    launch(sys.executable, "-m", "hf_efcp.run", *script, *TRAINING, cwd=folder)
    done = torch.load(folder / "out" / "rank0.pt")
    assert (done["optimizer"], done["window"], done["name"]) == ("MFAC", 3, "__main__")
    assert done["trainers"] == ["hf_efcp.train.trainer", "hf_efcp.train.trainer"]
    assert "optim_state_bytes" in done["logged"]


def test_the_trainer_can_be_left_alone(folder):
    """A module instead of a script, and transformers' own Trainer; the optimizer is the same."""
    words = ["--trainer", "transformers", "-m", "train", "--output_dir", "out", "--optim", "mfac"]
    launch(sys.executable, "-m", "hf_efcp.run", *words, *TRAINING, cwd=folder / "scripts")
    done = torch.load(folder / "scripts" / "out" / "rank0.pt")
    assert done["trainers"] == ["transformers.trainer", "transformers.trainer"]
    assert done["optimizer"] == "MFAC"


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_end_with_the_same_weights(launcher, folder):
    port = free_port()
    start = {
        "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port", port],
        "accelerate": ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", port],
    }[launcher]
    assert shutil.which(start[0], path=str(Path(sys.executable).parent))
    words = ["scripts/train.py", "--output_dir", "out", "--optim", "efcp_mfac", "--optim_args", "window=3"]
    launch(*start, "-m", "hf_efcp.run", *words, *TRAINING, cwd=folder, ACCELERATE_USE_CPU="true")
    one, other = (torch.load(folder / "out" / f"rank{rank}.pt") for rank in range(2))
    assert one["world"] == other["world"] == 2
    assert one["optimizer"] == "MFAC"
    for mine, theirs in zip(one["weights"], other["weights"], strict=True):
        assert torch.equal(mine, theirs)


def test_a_script_sees_its_own_words(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    script = folder / "scripts" / "words.py"
    script.write_text("import sys, neighbour; print(sys.argv[1:], __name__)")
    main(["--trainer", "transformers", str(script), "--list", "-x", "--trainer"])
    assert capsys.readouterr().out.strip() == "['--list', '-x', '--trainer'] __main__"


def test_every_trainer_of_a_script_is_asked_for_metrics(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", list(trainer.DEFAULT_CALLBACKS))
    (folder / "scripts" / "nothing.py").write_text("")
    for options, expected in (([], 0), (["--metrics"], 1)):
        main(["--trainer", "transformers", *options, str(folder / "scripts" / "nothing.py")])
        assert trainer.DEFAULT_CALLBACKS.count(EfcpMetricsCallback) == expected


@pytest.fixture
def adamw(monkeypatch):
    """torch's AdamW, put back after the test."""
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.AdamW)
    return torch.optim.AdamW


def test_adamw_of_a_script_is_replaced(folder, adamw, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    script = folder / "scripts" / "loop.py"
    script.write_text("import torch; print(torch.optim.AdamW([torch.zeros(2, requires_grad=True)]).defaults['window'])")
    main(["--patch-adamw", "efcp_mfac:window=5", "--trainer=transformers", str(script)])
    assert capsys.readouterr().out.strip() == "5"


def test_the_replacement_keeps_rates_and_groups(adamw):
    assert patch_adamw("efcp_mfac:window=5,density=0.5") is adamw
    decayed, plain = torch.nn.Linear(3, 2).parameters()
    groups = [{"params": [decayed], "weight_decay": 0.1}, {"params": [plain], "weight_decay": 0.0, "lr": 0.5}]
    optimizer = torch.optim.AdamW(groups, 0.25)
    assert isinstance(optimizer, MFAC)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["window"], optimizer.defaults["density"]) == (5, 0.5)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.25, 0.1), (0.5, 0.0)]
    unset = torch.optim.AdamW([plain]).param_groups[0]
    ours = adamw([plain]).param_groups[0]
    assert (unset["lr"], unset["weight_decay"]) == (ours["lr"], ours["weight_decay"])


def test_arguments_without_a_counterpart_are_told_once(caplog):
    cls = adamw_replacement(get_spec("efcp_mfac"), {})
    parameter = torch.nn.Parameter(torch.zeros(2))
    cls([parameter], lr=0.1, betas=(0.9, 0.999), eps=1e-8)  # AdamW's own defaults say nothing
    assert not caplog.records
    for _ in range(2):
        cls([parameter], 0.1, (0.8, 0.99), fused=True)
    (record,) = caplog.records
    assert "betas=(0.8, 0.99), fused=True" in record.getMessage()


def test_the_replacement_does_not_maximize():
    with pytest.raises(NotImplementedError, match="maximize"):
        adamw_replacement(get_spec("efcp_mfac"), {})([torch.nn.Parameter(torch.zeros(2))], maximize=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tariner", "efcp", "x.py"], "`--tariner`. Did you mean `--trainer`"),
        (["no_such_script.py"], "no file 'no_such_script.py'"),
        ([], "give a script"),
        (["-m"], "give a module"),
        (["--trainer"], "`--trainer` needs a value"),
        (["--trainer", "mine", "x.py"], "efcp or transformers"),
        (["--explain", "efcp_mfca"], "Did you mean `efcp_mfac`"),
        (["--patch-adamw", "efcp_mfac:widow=3", __file__], "Did you mean `window`"),
        (["--patch-adamw", "efcp_mfac:lr=3", __file__], "`lr`"),
        (["--patch-adamw", "MFAC:lr=3", __file__], "`lr` is set by the script"),
        (["--patch-adamw", "efcp_mfac:window=3,", __file__], "surplus comma"),
        (["--sparsity", "most", __file__], "`--sparsity` must be a number in [0, 1), got 'most'"),
        (["--sparsity", "1", __file__], "`sparsity` must be in [0, 1), got 1.0"),
        (["--sparsity", "0.9", "--sparse_method", "rigle", __file__], "Did you mean `rigl`"),
        (["--sparse_method", "rigl", __file__], "need `sparsity`"),
        (["--sparsity"], "`--sparsity` needs a value"),
        (["--gradient_correction", "agent", "--correction_args", "gama=1", __file__], "Did you mean `gamma`"),
        (["--adversary", "cw", __file__], "must be one of fgsm, pgd"),
        (["--trainer", "transformers", "--sparsity", "0.9", __file__], "leave out `--trainer transformers`"),
    ],
)
def test_mistakes_are_answered_in_a_line(words, message, capsys, adamw):
    with pytest.raises(SystemExit) as leaving:
        main(words)
    captured = capsys.readouterr()
    assert leaving.value.code == 2
    assert captured.err.startswith("hf_efcp.run: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert torch.optim.AdamW is adamw


REFUSED = """
import sys
from hf_efcp import create_optimizer
from hf_efcp.train import EfcpTrainingArguments

if "own" in sys.argv:
    raise ValueError("of the script")
EfcpTrainingArguments("out", optim="efcp_mfac", optim_args={"widow": 3}, use_cpu=True)
"""


def test_what_is_refused_while_the_script_runs_is_a_line_too(tmp_path, capsys, monkeypatch):
    """Not what the script itself raises, whose traceback its author needs."""
    monkeypatch.setattr(sys, "argv", [])
    script = tmp_path / "refused.py"
    script.write_text(REFUSED)
    with pytest.raises(SystemExit) as leaving:
        main([str(script)])
    captured = capsys.readouterr()
    assert leaving.value.code == 2
    assert captured.err.count("\n") == 1
    assert "Did you mean `window`" in captured.err
    with pytest.raises(ValueError, match="Did you mean `window`"):
        main(["--debug", str(script)])
    with pytest.raises(ValueError, match="of the script"):
        main([str(script), "own"])


def test_list_and_explain(capsys):
    main(["--list"])
    listed = capsys.readouterr().out
    assert all(re.search(rf"^{name}\b", listed, re.MULTILINE) for name in list_optimizers())
    main(["--explain=efcp_mfac"])
    assert "window" in capsys.readouterr().out


def test_help_names_every_option(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    for option in (*_OPTIONS, "torchrun", "accelerate launch"):
        assert option in text


def test_options_may_carry_their_value():
    assert parse(["--trainer=efcp", "a.py", "--trainer=no"]) == parse(["--trainer", "efcp", "a.py", "--trainer=no"])
