"""Over HTTP to a Hub and back: weights, card and checkpoint as they were; and what a user reads where it fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from loopback_hub import TOKEN, Fault, LoopbackHub
from safetensors.torch import load

from hf_efcp.train.hub import PushError, message, told_plainly

REPOSITORY = "tester/tiny-bert"
TRAIN = """
import os, torch
from transformers import (BertConfig, BertForSequenceClassification, HfArgumentParser, Trainer, TrainingArguments,
                          set_seed)

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
set_seed(0)
model = BertForSequenceClassification(BertConfig(vocab_size=100, hidden_size=16, num_hidden_layers=2,
    num_attention_heads=2, intermediate_size=32, max_position_embeddings=16))
ids = torch.randint(5, 100, (64, 12), generator=torch.Generator().manual_seed(1))
data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[0]) % 2} for row in ids]
trainer = Trainer(model, args, train_dataset=data, eval_dataset=data[:8])
trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
if args.push_to_hub:
    trainer.push_to_hub(dataset="random words")
torch.save({name: p.detach() for name, p in model.named_parameters()}, args.output_dir + ".pt")
"""
RUN = [
    "--use_cpu", "--report_to", "none", "--max_steps", "8", "--logging_steps", "2", "--save_steps", "4",
    "--eval_strategy", "steps", "--eval_steps", "4", "--disable_tqdm", "true", "--per_device_train_batch_size", "8",
    "--learning_rate", "1e-3", "--optim", "efcp_mfac", "--optim_args", "window=3", "--dataloader_pin_memory", "false",
]  # fmt: skip
LOAD = """
import json, os, sys, torch
from huggingface_hub import ModelCard, model_info, snapshot_download
from transformers import AutoModelForSequenceClassification

repository, revision, *words = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(repository)
card = ModelCard.load(repository)
folder = snapshot_download(repository, revision=revision)
torch.save({name: p.detach() for name, p in model.named_parameters()}, "loaded.pt")
facts = {"tags": card.data.tags, "library": card.data.library_name, "pushed": "random words" in card.text,
         "files": [file.rfilename for file in model_info(repository).siblings]}
print(json.dumps(facts))
from hf_efcp.run import main
main([*words, "--resume_from_checkpoint", os.path.join(folder, "last-checkpoint")])
"""
FAIL = """
import huggingface_hub.utils._http as http, json, sys
http.time.sleep = lambda seconds: None  # it waits 15 s before it gives up
import logging, os, torch
logging.basicConfig(format="%(name)s: %(message)s")
from hf_efcp.train import EfcpTrainer, EfcpTrainingArguments
from transformers import ViTConfig, ViTForImageClassification

model = ViTForImageClassification(ViTConfig(image_size=4, patch_size=2, num_channels=1, hidden_size=8,
    num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=2))
data = [{"pixel_values": torch.full((1, 4, 4), i / 8), "labels": i % 2} for i in range(8)]
def trainer(**more):
    args = EfcpTrainingArguments("out", max_steps=2, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, **more)
    return EfcpTrainer(model, args, train_dataset=data)
def error(push):
    try:
        push()
    except RuntimeError as raised:
        return f"{type(raised).__name__}: {raised}"
refused = error(lambda: trainer(push_to_hub=True, hub_token="hf_refused"))
pushes = trainer(push_to_hub=True, hub_strategy="every_save")  # each push during training fails
result = pushes.train()
local = trainer()
local.train()
found = {"refused": refused, "steps": result.global_step}
for name in ("closed", "broken", "lost", "sound"):
    local.args.hub_model_id, local.hub_model_id = "tester/" + name, None
    found[name] = error(lambda: local.push_to_hub(token="hf_refused" if name == "closed" else None))
    found[name + " files"] = sorted(os.listdir("out"))
print(json.dumps(found))
"""


def start(program, words, cwd, hub):
    """Run a program as a client of the Hub; its output."""
    (cwd / "program.py").write_text(program)
    environment = {
        **os.environ, **hub.environment(cwd / "cache"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1] / "cpu_torchvision"), *sys.path]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def run(tmp_path_factory, hub):
    """The folder of a run that an unmodified script pushed through the launcher, its checkpoints too."""
    folder = tmp_path_factory.mktemp("run")
    push = ["--push_to_hub", "--hub_model_id", REPOSITORY, "--hub_strategy", "checkpoint", "--hub_always_push", "true"]
    start(TRAIN, ["-m", "hf_efcp.run", "program.py", "--output_dir", "out", *RUN, *push], folder, hub)
    return folder


def test_what_was_pushed_is_what_was_trained(hub, run):
    """Weights bit by bit, and nothing that belongs to this machine alone."""
    files = hub.store.files(REPOSITORY)
    trained = torch.load(run / "out.pt")
    pushed = load(files["model.safetensors"])
    assert pushed.keys() == trained.keys()
    assert all(torch.equal(pushed[name], trained[name]) for name in trained)
    assert {"README.md", "config.json", "training_args.bin", "last-checkpoint/optimizer.pt"} <= files.keys()
    assert {"figures/loss.png", "figures/spectrum.png", "figures/memory.png"} <= files.keys()
    assert not [path for path in files if path.startswith("checkpoint-")]
    everything = b"".join(content for path, content in files.items() if path.endswith((".md", ".json")))
    assert TOKEN.encode() not in everything
    assert str(run).encode() not in files["README.md"]


def test_the_card_of_an_unmodified_script_is_ours(hub, run):
    card = ModelCard(hub.store.files(REPOSITORY)["README.md"].decode())
    assert {"hf_efcp", "efcp_mfac"} <= set(card.data.tags)
    assert "python -m hf_efcp.run program.py" in card.text
    assert "random words" in card.text


def test_the_way_back_and_on(hub, run, tmp_path):
    """`from_pretrained` gives the trained weights; a checkpoint from the Hub resumes to the bit."""
    (tmp_path / "train.py").write_text(TRAIN)
    halfway = next(c for c in hub.store.repositories[REPOSITORY] if "step 4, checkpoint" in c.title)
    words = ["program.py", REPOSITORY, halfway.oid, "train.py", "--output_dir", "on", *RUN]
    done = start(LOAD, words, tmp_path, hub)
    facts = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"tags"')))
    assert "efcp_mfac" in facts["tags"]
    assert (facts["library"], facts["pushed"]) == ("transformers", True)
    assert "last-checkpoint/optimizer.pt" in facts["files"]
    trained = torch.load(run / "out.pt")
    for name in ("loaded.pt", "on.pt"):
        weights = torch.load(tmp_path / name)
        assert all(torch.equal(weights[key], trained[key]) for key in trained), name
    state = json.loads((tmp_path / "on" / "checkpoint-8" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [2, 4, 6, 8]


def test_failures_are_told_and_leave_the_run_whole(hub, tmp_path):
    """A refused token before any step; in a push, a 500 after the large files are up, and a connection that is lost."""
    commit = "POST /api/models/tester/{}/commit"
    answers = {"out": 403, "broken": 500, "lost": 0}
    hub.store.faults[:] = [Fault(commit.format(name), status) for name, status in answers.items()]
    done = start(FAIL, ["program.py"], tmp_path, hub)
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("refused", "closed"):
        assert found[name].startswith("PushError: The Hub refused the token for ")
        assert "hf auth login" in found[name]
        assert "hf_refused" not in found[name]
    for name, what in (("broken", "500"), ("lost", "isconnected")):
        assert found[name].startswith(f"PushError: The push to tester/{name} did not get through: ")
        assert what in found[name]
        assert f"hf upload tester/{name} out" in found[name]
        assert {"README.md", "model.safetensors", "checkpoint-2"} <= set(found[f"{name} files"])
        assert hub.store.files(f"tester/{name}").keys() == {".gitattributes"}
    assert found["sound"] is None
    assert "model.safetensors" in hub.store.files("tester/sound")
    assert found["steps"] == 2
    assert "Training goes on" in done.stderr


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError), told_plainly("a/b", "out"):
        _ = 1 / 0


def test_a_long_reason_is_cut_and_paths_are_quoted():
    text = message(ConnectionError("x" * 1000), "a/b", "my run")
    assert len(text) < 600
    assert "'my run'" in text


def test_an_inner_failure_is_found():
    """The client wraps what happened to a large file."""

    def upload():
        try:
            raise ConnectionError("gone")
        except ConnectionError as error:
            raise RuntimeError("Error while uploading a file") from error

    with pytest.raises(PushError, match="a/b did not get through: gone"), told_plainly("a/b", "out"):
        upload()
