"""The model card: metadata that the Hub accepts, figures that stand in the log or in tensors, nothing private."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from hf_efcp.optim import MFAC, get_spec
from hf_efcp.train import EfcpTrainer
from hf_efcp.train.model_card import write_model_card
from hf_efcp.train.run_record import OptimizerRecord, command_line, log_rows

OPTIONS = {"window": 5, "damping": 0.37, "density": 0.03}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """Twelve steps of a tiny ViT on digits, evaluated three times."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    rows = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images[:128], digits.target, strict=False)]
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=10,
    )  # fmt: skip
    args = TrainingArguments(
        output_dir=tmp_path_factory.mktemp("run") / "tiny-digits",
        max_steps=12, eval_steps=4, eval_strategy="steps", logging_steps=2, per_device_train_batch_size=16,
        learning_rate=3e-3, weight_decay=0.01, seed=7, use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip

    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = Trainer(
        ViTForImageClassification(config),
        args,
        train_dataset=rows[:96],
        eval_dataset=rows[96:],
        compute_metrics=accuracy,
        optimizer_cls_and_kwargs=(MFAC, {"lr": args.learning_rate, **get_spec("efcp_mfac").resolve(OPTIONS)}),
    )
    trainer.train()
    return trainer


@pytest.fixture
def card(trainer, tmp_path):
    def write(**facts):
        write_model_card(tmp_path / "tiny-digits", trainer, **facts)
        return ModelCard.load(tmp_path / "tiny-digits" / "README.md")

    return write


def table(card, heading):
    """The rows below a heading, as lists of cells, header first."""
    section = re.search(rf"^## {heading}\n((?:(?!^## ).*\n?)*)", card.text, re.MULTILINE)[1]
    lines = [line for line in section.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_metadata_is_what_the_hub_reads(card):
    data = card(dataset="scikit-learn digits", tags="handwriting", language="en", license="apache-2.0").data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "image-classification"
    assert {"hf_efcp", "efcp_mfac", "handwriting"} <= set(data.tags)
    assert (data.language, data.license) == ("en", "apache-2.0")
    assert data.base_model is None


def test_title_is_the_folder_or_the_given_name(card):
    assert card().text.lstrip().startswith("# tiny-digits\n")
    assert card(model_name="digits-vit").text.lstrip().startswith("# digits-vit\n")


def test_model_index_is_the_last_evaluation(trainer, card):
    data = card(dataset="scikit-learn digits").data
    last = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry][-1]
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", last["eval_accuracy"])
    assert (result.task_type, result.dataset_name) == ("image-classification", "scikit-learn digits")
    assert data.model_name == "tiny-digits"


def test_results_are_of_the_last_evaluation_even_if_training_went_on(trainer, card, monkeypatch):
    history = [{"step": 4, "eval_loss": 2.0, "eval_f1": 0.5}, {"step": 8, "loss": 1.0}]
    monkeypatch.setattr(trainer.state, "log_history", history)
    assert "At step 4:" in card().text
    assert card().data.eval_results[0].metric_value == 0.5


def test_optimizer_section_has_the_changed_options_alone_and_the_paper(card):
    shown = {name.removesuffix(" (option)"): value for name, value in table(card(), "Optimizer") if "(option)" in name}
    assert {name: float(value) for name, value in shown.items()} == OPTIONS
    assert get_spec("efcp_mfac").paper in card().text


def test_settings_are_the_arguments_of_the_run(card):
    settings = dict(table(card(), "Optimizer")[1:])
    assert float(settings["learning rate"]) == 3e-3
    assert float(settings["weight decay"]) == 0.01
    assert settings["batch"] == "16"
    assert "norm 1," in settings["gradients clipped at"]


def test_the_learning_rate_is_the_one_that_the_optimizer_had(trainer, card, monkeypatch):
    """`lr` among the options wins over the default of `--learning_rate`; a schedule has moved `lr` since."""
    monkeypatch.setattr(trainer.args, "learning_rate", 5e-5)
    assert trainer.optimizer.param_groups[0]["lr"] < 3e-3
    assert dict(table(card(), "Optimizer")[1:])["learning rate"] == "0.003"


def test_training_log_is_the_log_history(trainer, card):
    header, *rows = table(card(), "Training log")
    assert header == ["step", "epoch", "training loss", "validation loss", "accuracy"]
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [row[0] for row in rows] == ["4", "8", "12"]
    for row, entry in zip(rows, evaluations, strict=True):
        assert float(row[3]) == pytest.approx(entry["eval_loss"], rel=1e-3)  # four digits are printed
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert [float(row[2]) for row in rows] == pytest.approx([losses[step] for step in (4, 8, 12)], rel=1e-3)


def test_long_log_keeps_first_and_last_row(trainer, card, monkeypatch):
    history = [{"step": step, "epoch": step / 10, "eval_loss": 1 / step} for step in range(1, 101)]
    monkeypatch.setattr(trainer.state, "log_history", history)
    _, *rows = table(card(), "Training log")
    assert len(rows) == 20
    assert (rows[0][0], rows[-1][0]) == ("1", "100")
    assert "20 of 100 entries" in card().text


def test_memory_is_measured_from_tensors_beside_adamw(trainer, card):
    n_parameters = sum(p.numel() for p in trainer.model.parameters())
    adamw = torch.optim.AdamW(trainer.model.parameters())
    trainer.model(pixel_values=torch.zeros(1, 1, 8, 8), labels=torch.tensor([0])).loss.backward()
    adamw.step()
    trainer.model.zero_grad()
    moments = sum(
        s[name].numel() * s[name].element_size() for s in adamw.state.values() for name in s if name != "step"
    )
    ours = trainer.optimizer.optimizer.state_bytes()
    rows = table(card(), "Memory")
    assert [row[1] for row in rows[1:]] == [f"{size / n_parameters:.2f}" for size in (ours, moments)]
    assert f"{n_parameters:,} parameters" in card().text


def test_other_optimizers_are_measured_too():
    """AdamW's own record is its two moments and a step counter."""
    parameter = torch.nn.Parameter(torch.ones(1000))
    adamw = torch.optim.AdamW([parameter], eps=1e-6)
    parameter.grad = torch.ones_like(parameter)
    adamw.step()
    record = OptimizerRecord.of(adamw, "adamw_torch")
    assert (record.name, record.options, record.paper) == ("AdamW", {"eps": 1e-6}, "")
    assert record.adamw_bytes <= record.state_bytes <= record.adamw_bytes + 8


def test_card_without_training_has_no_figures(trainer, card, monkeypatch):
    monkeypatch.setattr(trainer.state, "log_history", [])
    monkeypatch.setattr(trainer, "optimizer", None)
    text = card().text
    assert "## Optimizer" in text
    assert not re.search("^## (Memory|Training log|Results)$", text, re.MULTILINE)
    assert card().data.eval_results is None


@pytest.mark.parametrize(
    ("given", "commit", "expected"),
    [
        ("google/vit-base-patch16-224", "f00", "google/vit-base-patch16-224"),
        ("google/vit-base-patch16-224", None, "google/vit-base-patch16-224"),
        ("tests/a-folder-that-is-gone", None, None),  # looks like an id, but `tests` is a folder here
        ("a-folder-that-is-gone", None, None),
        ("gpt2", "f00", "gpt2"),
        ("/home/somebody/vit", "f00", None),
        ("tests/train", "f00", None),  # exists here
        (None, None, None),
    ],
)
def test_base_model_is_a_hub_id_or_absent(trainer, card, monkeypatch, given, commit, expected):
    monkeypatch.chdir(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
    monkeypatch.setattr(trainer.model.config, "_commit_hash", commit, raising=False)
    written = card(finetuned_from=given)
    assert written.data.base_model == expected
    if given and not expected:
        assert given not in written.data.to_yaml()


def test_data_set_in_a_local_folder_is_named_without_its_path(card, tmp_path):
    (tmp_path / "flowers").mkdir()
    written = card(dataset=str(tmp_path / "flowers"), dataset_tags=str(tmp_path / "flowers"))
    assert written.data.datasets is None
    assert written.data.eval_results[0].dataset_name == "flowers"
    assert str(tmp_path) not in written.content


def test_hub_data_set_is_in_the_metadata(card):
    data = card(dataset="GLUE SST2", dataset_tags="nyu-mll/glue", dataset_args="sst2").data
    assert data.datasets == ["nyu-mll/glue"]
    validate_repo_id(data.datasets[0])
    assert (data.eval_results[0].dataset_type, data.eval_results[0].dataset_config) == ("nyu-mll/glue", "sst2")


def test_card_names_seed_hardware_and_versions(trainer, card):
    facts = dict(table(card(), "How to repeat it"))
    assert facts["seed"] == "7"
    assert f"torch {torch.__version__}" in facts["software"]
    assert f"{torch.get_num_threads()} thread" in facts["hardware"]


def test_command_is_the_one_typed():
    argv = [
        sys.executable,
        "-m",
        "hf_efcp.run",
        "glue.py",
        "--optim_args",
        "window=8,density=0.1",
        "--name",
        "two words",
    ]
    expected = "python -m hf_efcp.run glue.py --optim_args window=8,density=0.1 --name 'two words'"
    assert command_line(argv, {}) == expected


def test_command_of_the_console_script_and_of_torchrun(monkeypatch):
    monkeypatch.chdir(Path(sys.executable).parents[1])  # an environment within the working directory
    console = os.path.join(os.path.dirname(sys.executable), "hf-efcp")
    assert command_line([sys.executable, console, "run", "glue.py"], {}) == "hf-efcp run glue.py"
    elastic = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}
    expected = "torchrun --nproc_per_node 2 -m hf_efcp.run glue.py"
    assert command_line([sys.executable, "-u", "-m", "hf_efcp.run", "glue.py"], elastic) == expected


def test_command_has_no_token_and_no_path_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    token = "hf_" + "a1B2" * 8
    argv = [
        "python", str(tmp_path / "train.py"), "--hub_token", "secret", f"--push_to_hub_token={token}", "--note", token,
        "--output_dir=/home/somebody/out/run", "--data", "/home/somebody/data", "--tokenizer_name", "bert",
    ]  # fmt: skip
    expected = (
        "python train.py --hub_token $HF_TOKEN --push_to_hub_token=$HF_TOKEN --note $HF_TOKEN "
        "--output_dir=run --data data --tokenizer_name bert"
    )
    assert command_line(argv, {}).replace("'", "") == expected


def test_notebook_has_no_command():
    assert command_line(["python", "-m", "ipykernel_launcher", "-f", "kernel.json"], {}) is None


def test_log_of_a_run_without_evaluation_is_its_losses():
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "train_runtime": 9.0}]
    assert [(row["step"], row["loss"]) for row in log_rows(history)] == [(1, 3.0), (2, 2.0)]


def test_log_of_a_run_evaluated_at_its_end_is_its_losses_and_that():
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "eval_loss": 1.0, "eval_runtime": 9.0}]
    assert [(row["step"], row["loss"], row.get("eval_loss")) for row in log_rows(history)] == [
        (1, 3.0, None), (2, 2.0, None), (3, 2.0, 1.0),
    ]  # fmt: skip


def test_trainer_writes_this_card(trainer):
    """`EfcpTrainer.create_model_card`, which `push_to_hub` calls, is `write_model_card` into the output folder."""
    ours = EfcpTrainer(
        trainer.model,
        trainer.args,
        train_dataset=trainer.train_dataset,
        eval_dataset=trainer.eval_dataset,
        optimizers=(trainer.optimizer, None),
    )
    ours.create_model_card(dataset="scikit-learn digits", tags="handwriting")
    card = ModelCard.load(f"{trainer.args.output_dir}/README.md")
    assert {"efcp_mfac", "handwriting"} <= set(card.data.tags)
    assert "scikit-learn digits" in card.text
