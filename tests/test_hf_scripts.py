"""Unmodified Hugging Face example scripts, from huggingface/transformers `examples/pytorch`, with our optimizers.

HF_EXAMPLES_DIR=…/transformers/examples/pytorch pytest -m hf_scripts tests/test_hf_scripts.py
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from loopback_hub import TOKEN, LoopbackHub
from safetensors.torch import load

HERE = Path(__file__).parent
EXAMPLES = os.environ.get("HF_EXAMPLES_DIR")
DATA = HERE.parent.parent / "shared" / "data"

pytestmark = [
    pytest.mark.hf_scripts,
    pytest.mark.skipif(not EXAMPLES, reason="HF_EXAMPLES_DIR names no folder with examples/pytorch of transformers"),
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets in {DATA}"),
]

TRAINING = ["--do_train", "--do_eval", "--use_cpu", "--report_to", "none", "--logging_steps", "5", "--seed", "42"]
# Script, model, its arguments, an evaluation metric, and what the last entry of the training loss must fall below:
# about halfway from its first entry to the last of a run with seed 42.
SCRIPTS = {
    "run_glue": (
        "text-classification/run_glue.py", "bert",
        ["--train_file", "train.json", "--validation_file", "validation.json", "--max_seq_length", 24,
         "--max_steps", 60],
        "eval_accuracy", 1.6,
    ),
    "run_image_classification": (
        "image-classification/run_image_classification.py", "vit",
        ["--dataset_name", DATA / "digits8x8", "--label_column_name", "label", "--remove_unused_columns", "False",
         "--max_eval_samples", 64, "--per_device_train_batch_size", 32, "--max_steps", 150],
        "eval_accuracy", 2.28,  # random crops of 8x8 digits: AdamW is at 2.29 then
    ),
    "run_qa": (
        "question-answering/run_qa.py", "bert",
        ["--dataset_name", DATA / "xquad_en", "--max_seq_length", 128, "--doc_stride", 64,
         "--max_train_samples", 64, "--max_eval_samples", 16, "--max_steps", 20],
        "eval_f1", 3.5,
    ),
    "run_clm": (
        "language-modeling/run_clm.py", "gpt2",
        ["--dataset_name", DATA / "tinyshakespeare", "--block_size", 32,
         "--max_train_samples", 640, "--max_eval_samples", 16, "--max_steps", 40],
        "eval_accuracy", 5.6,
    ),
    "run_ner": (
        "token-classification/run_ner.py", "bert",
        ["--dataset_name", DATA / "wnut17", "--max_train_samples", 320, "--max_eval_samples", 32, "--max_steps", 20],
        "eval_accuracy", 1.5,
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders with tiny models, made from config classes, and tokenizers, trained on the data."""
    from datasets import load_dataset
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.implementations import BertWordPieceTokenizer
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        GPT2Config,
        GPT2LMHeadModel,
        PreTrainedTokenizerFast,
        ViTConfig,
        ViTForImageClassification,
        ViTImageProcessor,
        set_seed,
    )

    set_seed(0)
    folder = tmp_path_factory.mktemp("models")
    sentences = load_dataset(str(DATA / "trec"), split="train")["text"]
    lines = load_dataset(str(DATA / "tinyshakespeare"), split="train[:4000]")["text"]

    words = BertWordPieceTokenizer()
    words.train_from_iterator(sentences, vocab_size=1000)
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=words._tokenizer, **special).save_pretrained(folder / "bert")
    bert = BertConfig(
        vocab_size=1000, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )  # fmt: skip
    BertForMaskedLM(bert).save_pretrained(folder / "bert")

    bytes_ = ByteLevelBPETokenizer()
    bytes_.train_from_iterator(lines, vocab_size=500, special_tokens=["<|endoftext|>"])
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    PreTrainedTokenizerFast(tokenizer_object=bytes_._tokenizer, **ends).save_pretrained(folder / "gpt2")
    GPT2LMHeadModel(
        GPT2Config(vocab_size=500, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(folder / "gpt2")

    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / "vit")
    ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=2, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                  intermediate_size=64, num_labels=10)
    ).save_pretrained(folder / "vit")  # fmt: skip
    return folder


@pytest.fixture
def launch(tmp_path):
    """A function that runs the launcher in a folder where `evaluate` finds its metrics, with the questions of TREC."""
    from datasets import load_dataset

    shutil.copytree(HERE / "metrics", tmp_path, dirs_exist_ok=True)
    for split, rows in (("train", "train[:1280]"), ("validation", "test[:200]")):
        questions = load_dataset(str(DATA / "trec"), split=rows).rename_column("coarse_label", "label")
        questions.select_columns(["text", "label"]).to_json(tmp_path / f"{split}.json")

    def run(*words, before=(sys.executable,), hub=None):
        if any("image-classification" in str(word) for word in words) and not find_spec("torchvision"):
            pytest.skip("the image scripts import torchvision, which is not installed")
        environment = {
            **os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join([str(HERE / "cpu_torchvision"), *sys.path]),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            **(hub.environment(tmp_path / "cache") if hub else {}),
        }  # fmt: skip
        command = [*before, "-m", "hf_efcp.run", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=550)
        assert done.returncode == 0, done.stderr[-5000:]
        return done.stderr

    return run


def log_of(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_with_trainer(name, models, launch, tmp_path):
    script, model, words, metric, bar = SCRIPTS[name]
    launch(
        Path(EXAMPLES) / script, "--model_name_or_path", models / model, "--per_device_train_batch_size", 16, *words,
        *TRAINING, "--learning_rate", "3e-3", "--optim", "efcp_mfac", "--optim_args", "window=16",
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    losses = [entry["loss"] for entry in log_of(tmp_path / "out") if "loss" in entry]
    logged = [entry for entry in log_of(tmp_path / "out") if "optim_skipped_steps" in entry]
    assert len(losses) == len(logged) >= 4
    assert not any(entry["optim_skipped_steps"] for entry in logged)
    assert losses[-1] < bar, losses
    assert metric in json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert torch.load(tmp_path / "out" / "training_args.bin", weights_only=False).optim == "efcp_mfac"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "efcp_mfac" in card
    assert str(tmp_path) not in card


def test_run_glue_pushes_our_card(models, launch, tmp_path):
    """`--push_to_hub` of the unmodified script: weights bit for bit, and the card with what the script knows."""
    script, model, words, *_ = SCRIPTS["run_glue"]
    with LoopbackHub(tmp_path / "hub") as hub:
        launch(
            Path(EXAMPLES) / script, "--model_name_or_path", models / model, *words, *TRAINING, "--max_steps", 10,
            "--optim", "efcp_mfac", "--optim_args", "window=4", "--output_dir", tmp_path / "out", "--push_to_hub",
            "--hub_model_id", "tester/glue", hub=hub,
        )  # fmt: skip
        files = hub.store.files("tester/glue")
    trained = load((tmp_path / "out" / "model.safetensors").read_bytes())
    pushed = load(files["model.safetensors"])
    assert pushed.keys() == trained.keys()
    assert all(torch.equal(pushed[name], trained[name]) for name in trained)
    assert {"figures/loss.png", "figures/spectrum.png", "figures/memory.png"} <= files.keys()
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-classification")
    assert {"hf_efcp", "efcp_mfac"} <= set(card.data.tags)
    assert card.data.base_model is None
    measured = json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_accuracy"]
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("accuracy", measured)]
    assert "| window (option) | 4 |" in card.text
    assert "run_glue.py" in card.text
    assert TOKEN not in card.content
    assert str(tmp_path) not in card.content


@pytest.mark.parametrize("name", ["run_glue", "run_clm"])
def test_resume_of_a_script_is_bit_for_bit(name, models, launch, tmp_path):
    script, model, words, *_ = SCRIPTS[name]
    ends = []
    for out, more in (("whole", []), ("again", ["--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-6"])):
        launch(
            Path(EXAMPLES) / script, "--model_name_or_path", models / model, *words, *TRAINING, "--save_steps", 6,
            "--learning_rate", "2e-3", "--max_steps", 12, "--optim", "efcp_mfac", "--optim_args", "window=4",
            "--output_dir", tmp_path / out, *more,
        )  # fmt: skip
        ends.append((tmp_path / out / "model.safetensors").read_bytes())
    assert ends[0] == ends[1]


def test_published_command_of_mfac(models, launch, tmp_path):
    script, model, words, *_ = SCRIPTS["run_glue"]
    published = '{"lr": 1e-4, "num_grads": 512, "damp": 1e-6}'
    launch(
        Path(EXAMPLES) / script, "--model_name_or_path", models / model, *words, *TRAINING, "--max_steps", 10,
        "--optim", "MFAC", "--optim_args", published, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    rates = [entry["learning_rate"] for entry in log_of(tmp_path / "out") if "loss" in entry]
    assert rates[0] == pytest.approx(1e-4 * 6 / 10)


@pytest.mark.parametrize(
    "before",
    [("torchrun", "--nproc_per_node", "2"), ("accelerate", "launch", "--multi_gpu", "--num_processes", "2")],
    ids=["torchrun", "accelerate"],
)
def test_two_processes(before, models, launch, tmp_path):
    script, model, words, *_ = SCRIPTS["run_glue"]
    launch(
        Path(EXAMPLES) / script, "--model_name_or_path", models / model, *words, *TRAINING, "--max_steps", 10,
        "--optim", "efcp_mfac", "--output_dir", tmp_path / "out", before=before,
    )  # fmt: skip
    assert torch.load(tmp_path / "out" / "training_args.bin", weights_only=False).optim == "efcp_mfac"
    assert log_of(tmp_path / "out")[0]["epoch"] == 5 * 16 / 1280  # batches of 8 in two processes


@pytest.mark.parametrize(
    ("script", "model", "words"),
    [
        ("text-classification/run_glue_no_trainer.py", "bert",
         ["--train_file", "train.json", "--validation_file", "validation.json", "--max_length", 24]),
        (
            "image-classification/run_image_classification_no_trainer.py", "vit",
            ["--dataset_name", DATA / "digits8x8", "--label_column_name", "label", "--max_train_samples", 320],
        ),
    ],
)  # fmt: skip
def test_script_without_trainer(script, model, words, models, launch, tmp_path):
    err = launch(
        "--patch-adamw", "efcp_mfac:window=8", Path(EXAMPLES) / script, "--model_name_or_path", models / model, *words,
        "--max_train_steps", 10, "--learning_rate", "1e-3", "--weight_decay", "0.01", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert "torch.optim.AdamW is efcp_mfac" in err
    assert (tmp_path / "out" / "model.safetensors").exists()
