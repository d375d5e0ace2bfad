"""The demonstration, in a few steps: what it prints is what it leaves in its folder."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from demo import Run, table
from huggingface_hub import ModelCard
from matplotlib.image import imread
from tasks import digits
from transformers import AutoModelForImageClassification

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Output folder and printed table, by optimizer, of ten steps."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(SCRIPTS / "demo.py"), "--max_steps", "10", "--output_dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n\n")[-2].splitlines()
    header, *rows = ([cell.strip() for cell in re.split("  +", line)] for line in lines)
    return folder, {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_table_compares_both_optimizers(demo):
    _, rows = demo
    assert list(rows) == ["adamw_torch", "efcp_mfac"]
    assert rows["adamw_torch"]["bytes per parameter"] == "8.0"
    assert int(rows["adamw_torch"]["steps to AdamW's loss"]) <= 10


def test_model_in_the_folder_has_the_printed_accuracy_and_loss(demo):
    folder, rows = demo
    model = AutoModelForImageClassification.from_pretrained(folder / "model").eval()
    task = digits()
    images = torch.stack([example["pixel_values"] for example in task.validation])
    labels = torch.tensor([example["labels"] for example in task.validation])
    with torch.no_grad():
        output = model(pixel_values=images, labels=labels)
    accuracy = (output.logits.argmax(-1) == labels).float().mean().item()
    assert rows["efcp_mfac"]["accuracy"] == f"{100 * accuracy:.2f} %"
    assert float(rows["efcp_mfac"]["loss"]) == pytest.approx(output.loss.item(), abs=1e-4)  # four decimals are printed


def test_card_has_the_printed_figures(demo):
    folder, rows = demo
    card = ModelCard.load(folder / "model" / "README.md")
    (result,) = card.data.eval_results
    assert f"{100 * result.metric_value:.2f} %" == rows["efcp_mfac"]["accuracy"]
    bytes_per_parameter = float(re.search(r"\| efcp_mfac \| ([0-9.]+) \|", card.text)[1])
    assert f"{bytes_per_parameter:.1f}" == rows["efcp_mfac"]["bytes per parameter"]


def test_picture_shows_a_curve_of_each_optimizer(demo):
    """Both of matplotlib's first two colours are in both halves."""
    folder, _ = demo
    pixels = imread(folder / "loss_curves.png")[:, :, :3]
    for half in np.array_split(pixels, 2, axis=1):
        for colour in ("#1f77b4", "#ff7f0e"):
            rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
            assert (np.abs(half - rgb).max(-1) < 0.02).sum() > 50


def test_digits_are_split_once_for_all():
    task = digits()
    assert (len(task.train), len(task.validation)) == (1437, 360)
    train = {example["pixel_values"].numpy().tobytes() for example in task.train}
    assert not any(example["pixel_values"].numpy().tobytes() in train for example in task.validation)
    counts = np.bincount([example["labels"] for example in task.validation])
    assert counts.min() >= 34  # each digit has its tenth of 360


def test_steps_to_a_loss():
    history = [{"step": step, "eval_loss": loss} for step, loss in ((10, 0.9), (20, 0.5), (30, 0.6))]
    run = Run(SimpleNamespace(state=SimpleNamespace(log_history=[{"step": 10, "loss": 0.1}, *history])), 0.0)
    assert run.steps_to(0.7) == 20
    assert run.steps_to(0.1) is None
    assert run.final_loss == 0.6


def test_table_columns_are_aligned():
    assert table([["a", "b"], ["long", "x"]]) == "a     b\nlong  x"
