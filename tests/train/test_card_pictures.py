"""What a card shows beside its text: pictures of the log and of tensors, results for the Hub, nobody else's markup."""

import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from transformers import Trainer

from hf_efcp.optim import create_optimizer
from hf_efcp.train.callbacks import own_optimizer
from hf_efcp.train.card_metadata import plain
from hf_efcp.train.model_card import write_model_card
from hf_efcp.train.spectrum import spectra

HOSTILE = "flowers</td><script>alert(1)</script> | [here](javascript:alert(1))\n# Heading\n```bash\nrm -rf `x`\n```"


@pytest.fixture
def trainer(tiny_vit, images, arguments):
    def train(optim="efcp_mfac", **changes):
        args = arguments(optim=optim, max_steps=4, eval_strategy="steps", eval_steps=2, **changes)

        def accuracy(prediction):
            return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

        trainer = Trainer(
            tiny_vit(), args, train_dataset=images[:32], eval_dataset=images[:8], compute_metrics=accuracy
        )
        trainer.train()
        return trainer

    return train


def test_the_card_shows_pictures_that_lie_beside_it(trainer, tmp_path):
    text = write_model_card(tmp_path, trainer(optim_args="window=3")).read_text()
    paths = re.findall(r"!\[[^]]+\]\((.*?)\)", text)
    assert paths == ["figures/loss.png", "figures/spectrum.png", "figures/memory.png"]
    for path in paths:
        with Image.open(tmp_path / path) as image:
            assert image.format == "PNG"
            assert len(image.convert("RGB").getcolors(1 << 20)) > 50  # curves and words, no blank page


def test_the_spectrum_is_that_of_the_window(trainer):
    optimizer = own_optimizer(trainer(optim_args="window=3").optimizer)
    gram = next(iter(optimizer.state.values()))["gram"]
    ((name, values),) = spectra(optimizer).items()
    assert name == "GGᵀ"
    torch.testing.assert_close(sum(values), float(gram.trace()))
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("efcp_mfac", {"window": 2, "system": "layer"}, "GGᵀ of tensor"),
        ("sketchy_shampoo", {"rank": 2, "update_freq": 1}, "sketch of tensor"),
        ("sketchy_adagrad", {"rank": 2}, "sketch of tensor"),
        ("efcp_singd", {"cache_metrics": True}, "of layer"),
    ],
)
def test_each_kind_of_optimizer_has_a_spectrum(name, options, expected):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    optimizer = create_optimizer(name, model, lr=1e-3, **options)
    assert spectra(optimizer) == {}
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(torch.randn(8, 5)), torch.randn(8, 3)).backward()
        optimizer.step()
    found = spectra(optimizer)
    assert all(expected in label for label in found)
    assert found
    assert all(min(values) > 0 for values in found.values())


def test_results_on_a_data_set_of_the_hub_stand_where_the_hub_looks(trainer, tmp_path):
    done = trainer()
    write_model_card(tmp_path, done, dataset="GLUE SST2", dataset_tags="nyu-mll/glue", dataset_args="sst2")
    (entry,) = yaml.safe_load((tmp_path / ".eval_results" / "nyu-mll_glue.yaml").read_text())
    last = [e for e in done.state.log_history if "eval_accuracy" in e][-1]
    assert entry == {
        "dataset": {"id": "nyu-mll/glue", "task_id": "sst2"}, "value": last["eval_accuracy"], "notes": "accuracy",
    }  # fmt: skip


def test_results_on_other_data_stay_in_the_card(trainer, tmp_path):
    write_model_card(tmp_path, trainer(), dataset="my flowers")
    assert not (tmp_path / ".eval_results").exists()


def test_names_from_outside_are_shown_and_not_obeyed(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_efcp.train.model_card.command_line", lambda: f"python train.py --name '{HOSTILE}'")
    done = trainer()
    plainly = write_model_card(tmp_path / "plain", done, dataset="flowers").read_text()
    card = ModelCard.load(write_model_card(tmp_path / "x", done, dataset=HOSTILE, model_name=HOSTILE, tags=HOSTILE))
    shown, plainly = (re.sub(r"(?ms)^````bash\n.*?^````$", "", text) for text in (card.text, plainly))
    assert HOSTILE in card.text  # within the fence of the command, which is longer than its own
    assert "<script>" not in shown
    assert not re.search(r"(?<!\\)\]\(javascript", shown)
    headings = re.findall(r"^#.*$", shown, re.MULTILINE)
    assert len(headings) == len(re.findall(r"^#.*$", plainly, re.MULTILINE))
    assert "Heading" not in "".join(headings[1:])
    assert HOSTILE in card.data.tags
    assert card.data.model_name == HOSTILE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("scikit-learn digits", "scikit-learn digits"),
        ("eval_f1 (0.5, macro)", "eval_f1 (0.5, macro)"),
        ("a|b", r"a\|b"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("a\n# b", r"a \# b"),
        (3, "3"),
    ],
)
def test_plain_text_stays_readable(text, expected):
    assert plain(text) == expected
