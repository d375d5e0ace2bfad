"""What the README prints, run: every code block, but for those that say why they cannot be.

`UPDATE_README=1 pytest tests/test_readme.py` writes the outputs of `hf-efcp` into it.
"""

import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_efcp import list_optimizers
from hf_efcp.cli import main
from hf_efcp.memory import footprint, meta_model
from hf_efcp.train.callbacks import own_optimizer

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")
NOT_RUN_TAG = r"(?:<!-- not run: (?P<reason>.*?) -->\n)?"
BLOCK = re.compile(NOT_RUN_TAG + r"^```(?P<kind>\w+)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = [match.groupdict() for match in BLOCK.finditer(TEXT)]
NOT_RUN = 4  # set-up commands, example scripts of transformers, our scripts on data of the Hub, a GPU

TRAIN = """
import torch
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, Trainer, TrainingArguments

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
args.max_steps, args.report_to, args.disable_tqdm, args.dataloader_pin_memory = 2, [], True, False
config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
ids = torch.randint(5, 50, (16, 8))
data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": 0} for row in ids]
trainer = Trainer(BertForSequenceClassification(config), args, train_dataset=data)
trainer.train()
optimizer = trainer.optimizer.optimizer
print(f"trained by {[c.__name__ for c in type(optimizer).__mro__]} {optimizer.defaults}\\n", end="")
"""
TRAIN_NO_TRAINER = """
import torch

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model(torch.ones(2, 4)).sum().backward()
optimizer.step()
print(f"trained by {[c.__name__ for c in type(optimizer).__mro__]} {optimizer.defaults}\\n", end="")
"""


def runnable(kind):
    return [block["body"] for block in BLOCKS if block["kind"] == kind and block["reason"] is None]


def commands():
    """The lines of the shell blocks, continued ones joined, comments dropped."""
    lines = "".join(runnable("bash")).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def test_blocks_that_are_not_run_are_counted():
    reasons = [block["reason"] for block in BLOCKS if block["reason"] is not None]
    assert len(reasons) == NOT_RUN == TEXT.count("<!-- not run")
    assert TEXT.count("\n```") == 2 * len(BLOCKS)
    assert {block["kind"] for block in BLOCKS} == {"bash", "python", "console"}


def test_links_lead_somewhere():
    """To a heading, as GitHub names it, or to a file of the repository; a picture stands near the top."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"(?ms)^```.*?^```$", "", TEXT), re.MULTILINE)
    places = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\((.*?)\)", TEXT):
        assert target.startswith("https://") or target.removeprefix("#") in places or (README.parent / target).is_file()
    assert TEXT.index("![") < TEXT.index("\n## ")


OWN_OPTIMIZER = next(code for code in runnable("python") if "register(OptimizerSpec" in code)  # `test_shell` runs it


@pytest.mark.parametrize(
    "code", [c for c in runnable("python") if c != OWN_OPTIMIZER], ids=lambda code: code.split("\n")[0]
)
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # torch's, without a GPU
def test_python(code, tmp_path, monkeypatch, capsys):
    """Each block stands alone, given a `model` and a `train_dataset`; those that train change the model."""
    monkeypatch.chdir(tmp_path)
    if "optuna" in code:
        pytest.importorskip("optuna")
        warnings.simplefilter("ignore")  # what optuna says of itself
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ids = torch.randint(5, 50, (16, 8))
    model = BertForSequenceClassification(config)
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": 0} for row in ids]
    names = {"model": model, "train_dataset": data}
    exec(compile(code, str(README), "exec"), names)
    if "best" in names:
        assert names["best"].hyperparameters["window"] in (16, 32, 64)
        return
    optimizer = names["optimizer"] if "optimizer" in names else names["trainer"].optimizer
    assert own_optimizer(optimizer).state_bytes() > 0
    if "mse_loss" in code:
        assert names["loss"].item() < 0.5 * names["targets"].var().item()


@pytest.mark.parametrize("command", commands())
def test_shell(command, tmp_path):
    """The launcher on a script of a few lines. Each prints the optimizer that it trained with."""
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "signum.py").write_text(OWN_OPTIMIZER)
    (tmp_path / "train_no_trainer.py").write_text(TRAIN_NO_TRAINER)
    environment = {
        **os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",  # two processes share a pipe: whole writes do not mix, parts of a buffer would
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    done = subprocess.run(
        shlex.split(command), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    if "compare" in command:
        assert re.search(r"^adamw_torch +[0-9.]+ .*\nefcp_mfac +[0-9.]+ ", done.stdout, re.MULTILINE)
        assert (tmp_path / "out" / "compare" / "compare.html").is_file()
        return
    # Two processes may print between each other's line and its end.
    printed = re.findall(r"trained by (.*?)(?=trained by|$)", done.stdout, re.MULTILINE)
    assert len(printed) == (2 if "nproc_per_node 2" in command else 1)
    name = "Signum" if "signum" in command else "MFAC"
    assert all(f"'{name}'" in line for line in printed)
    assert ("optim_effective_rank" in done.stdout) == ("--metrics" in command)
    for name, value in re.findall(r"(window|density|momentum)=([0-9.]+)", command):
        assert f"'{name}': {value}" in printed[0]


MEMORY = re.findall(r"^\| (`.*?`) \| ([0-9.]+) \| (\d+) \|$", TEXT, re.MULTILINE)


@pytest.mark.parametrize(("names", "per_parameter", "megabytes"), MEMORY, ids=[row[0] for row in MEMORY])
def test_table_of_memory(names, per_parameter, megabytes):
    """Each figure is what `hf-efcp memory bert` counts today."""
    model, _ = meta_model("bert")
    for name in names.replace("`", "").split(", "):
        counted = footprint(model, name, {})
        assert (f"{counted.state / counted.n_trained:.2f}", f"{counted.state / 1e6:.0f}") == (per_parameter, megabytes)


def test_table_of_memory_has_every_optimizer():
    counted = {name for row in MEMORY for name in row[0].replace("`", "").split(", ")}
    assert counted >= {*list_optimizers()} - {"MFAC"}  # `mfac` by another name


@pytest.mark.parametrize("block", runnable("console"), ids=lambda block: block.split("\n")[0])
def test_console(block, capsys):
    """The printed output is today's."""
    line, _, printed = block.partition("\n")
    program, *words = shlex.split(line.removeprefix("$ "))
    assert program == "hf-efcp"
    assert main(words) == 0
    output = capsys.readouterr().out
    if os.environ.get("UPDATE_README"):
        README.write_text(README.read_text(encoding="utf-8").replace(block, f"{line}\n{output}"), encoding="utf-8")
    else:
        assert printed == output, "UPDATE_README=1 pytest tests/test_readme.py -k console"
