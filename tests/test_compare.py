"""`hf-efcp compare`: figures are those of the runs, the page shows them in a browser and needs nothing but itself."""

import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from hf_efcp.cli import main
from hf_efcp.compare import Entrant, Outcome, aligned, compare, table
from hf_efcp.compare_page import page_text, write_comparison

SCRIPT = """
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed
from sklearn.datasets import load_digits

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
rows = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images[:160], digits.target)]
set_seed(args.seed)
model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, hidden_size=16,
    num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=10))
def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
trainer = Trainer(model, args, train_dataset=rows[:128], eval_dataset=rows[128:], compute_metrics=accuracy)
trainer.train()
"""
FLAGS = [
    "--max_steps", "8", "--eval_strategy", "steps", "--eval_steps", "2", "--logging_steps", "2",
    "--save_strategy", "no", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--learning_rate", "1e-2",
    "--dataloader_pin_memory", "false",
]  # fmt: skip
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome"))), None)


def record(losses, optimizer="adamw_torch", seed=0, **more):
    history = [{"step": step, "loss": 2 * loss, "epoch": 1.0} for step, loss in enumerate(losses, start=1)]
    history += [
        {"step": step, "eval_loss": loss, "eval_f1": loss, "eval_runtime": 1.0} for step, loss in enumerate(losses, 1)
    ]
    facts = {
        "optimizer": optimizer, "options": {}, "state_bytes": 800, "n_parameters": 100, "seconds_per_step": 0.5,
        "hardware": "a machine", "seed": seed, "learning_rate": 1e-3, "command": "python train.py", **more,
    }  # fmt: skip
    return {**facts, "log_history": history}


OUTCOMES = [
    Outcome(Entrant("adamw_torch"), [record([4.0, 2.0, 1.0]), record([6.0, 4.0, 3.0], seed=1)]),
    Outcome(Entrant("efcp_mfac", "window=3"), [record([3.0, 1.0, 0.5]), record([3.0, 2.0, 1.5], seed=1)]),
]


def test_the_table_is_mean_and_deviation_over_the_seeds():
    header, adamw, mfac = table(OUTCOMES)
    assert header == [
        "optimizer", "validation loss", "f1", "steps to adamw_torch's loss", "bytes per parameter", "seconds per step",
    ]  # fmt: skip
    assert adamw == ["adamw_torch", "2 ± 1.4", "2 ± 1.4", "3", "8.00", "0.5"]
    assert mfac == ["efcp_mfac (window=3)", "1 ± 0.71", "1 ± 0.71", "2", "8.00", "0.5"]


def test_a_curve_is_mean_and_range():
    assert OUTCOMES[0].curve("eval_loss") == [(1, 5.0, 4.0, 6.0), (2, 3.0, 2.0, 4.0), (3, 2.0, 1.0, 3.0)]


def test_without_evaluation_the_training_loss_is_compared():
    runs = record([2.0, 1.0])
    runs["log_history"] = [entry for entry in runs["log_history"] if "loss" in entry]
    header, row = table([Outcome(Entrant("adamw_torch"), [runs])])
    assert (header[1], row[1]) == ("training loss", "2")


def test_what_a_run_says_is_text_on_the_page():
    hostile = Outcome(Entrant("adamw_torch", "a=<script>"), [record([2.0, 1.0], command="<b>", hardware="<i>")])
    text = page_text([hostile], [])
    assert "<script>" not in text
    assert "<b>" not in text
    assert "<i>" not in text


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of two optimizers by the command, its folder and what it printed."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "train.py").write_text(SCRIPT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ["compare", "--optim", "efcp_mfac:window=4", "--seeds", "3", "--output", "out", "train.py", *FLAGS]
        assert main(words) == 0
    return folder


def test_each_optimizer_ran_the_script_with_the_same_seed(compared):
    adamw, mfac = (json.loads(path.read_text()) for path in sorted(compared.glob("out/runs/*/record.json")))
    assert (adamw["optimizer"], mfac["optimizer"]) == ("AdamW", "efcp_mfac")
    assert mfac["options"] == {"window": 4}
    assert adamw["seed"] == mfac["seed"] == 3
    first = [next(e["loss"] for e in run["log_history"] if "loss" in e) for run in (adamw, mfac)]
    assert first[0] == pytest.approx(first[1], rel=0.2)  # the same weights and batches, one step apart
    moments = 2 * 4 * adamw["n_parameters"]
    assert moments <= adamw["state_bytes"] <= 1.02 * moments
    with Image.open(compared / "out" / "compare.png") as image:
        assert image.convert("L").getextrema() == (0, 255)


def test_the_page_needs_nothing_but_itself(compared):
    page = (compared / "out" / "compare.html").read_text()
    assert page.count("src='data:image/png;base64,") == len(re.findall("<img", page)) == 3
    assert not re.search(r"https?://|<link|<script|@import|url\(", page)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium on PATH, such as Debian's chromium-headless-shell")
def test_a_browser_shows_table_and_figures(compared, tmp_path):
    """Chromium draws the page; a script that is added here reports what stands where."""
    page = (compared / "out" / "compare.html").read_text()
    report = """<script>addEventListener('load', () => { document.body.dataset.seen = JSON.stringify({
        figures: [...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width]),
        cells: [...document.querySelectorAll('td, th')].map(c => c.innerText)}) })</script>"""
    (tmp_path / "page.html").write_text(page.replace("</body>", report + "</body>"))
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,2200", "--hide-scrollbars"]
    place = (tmp_path / "page.html").as_uri()
    done = subprocess.run([*words, "--dump-dom", place], capture_output=True, text=True, timeout=120)
    seen = re.search(r'data-seen="(.*?)"', done.stdout)
    assert seen, done.stderr
    seen = json.loads(seen[1].replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert len(seen["figures"]) == 3
    assert all(complete and natural > 300 and width > 300 for complete, natural, width in seen["figures"])
    assert {"adamw_torch", "efcp_mfac (window=4)", "accuracy"} <= set(seen["cells"])
    picture = tmp_path / "page.png"
    subprocess.run([*words, f"--screenshot={picture}", place], capture_output=True, timeout=120, check=True)
    with Image.open(picture) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 22)}
    assert {(0x4C, 0x78, 0xA8), (31, 119, 180), (255, 127, 14)} <= colours  # the bars, and a curve for each


def test_pictures_of_several_seeds(tmp_path):
    picture, page = write_comparison(OUTCOMES, tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "efcp_mfac (window=3)" in page.read_text()


def test_text_columns_line_up():
    assert aligned([["a", "bb"], ["ccc", "d"]]) == "a    bb\nccc  d"


def test_a_run_that_fails_is_told_with_its_last_words(tmp_path):
    (tmp_path / "train.py").write_text("raise SystemExit('no data here')")
    with pytest.raises(ValueError, match=r"adamw_torch with seed 0 failed: no data here \(.*printed.txt\)"):
        compare([str(tmp_path / "train.py")], [], [0], tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.py"], "No training script 'missing.py'"),
        ([], "Give a training script"),
        ([__file__, "--seed=3"], "`--seed=3` is set by the comparison"),
        (["--optim", "efcp_mfac:widow=3", __file__], "Did you mean `window`"),
        (["--optim", "efcp_mfca", __file__], "Did you mean `efcp_mfac`"),
        (["--seeds", "a", __file__], "`--seeds` must be whole numbers"),
        (["--seeds", "1,1", __file__], "`--seeds` must be different numbers"),
    ],
)
def test_mistakes_are_answered_in_a_line(words, message, tmp_path, capsys):
    assert main(["compare", "--output", str(tmp_path), *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err
