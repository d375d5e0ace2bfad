"""The thin training scripts on local data: the model, the figures and the card that they leave belong together."""

import json
import sys

import numpy as np
import pytest
import torch
import train_text
import train_vision
from datasets import load_dataset
from huggingface_hub import ModelCard
from metrics import load_metrics
from PIL import Image
from sklearn.datasets import load_digits
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    EvalPrediction,
)

COMMON = ["--learning_rate=3e-3", "--use_cpu", "--report_to=none", "--save_strategy=no", "--disable_tqdm=True"]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run a script's main with these flags; the printed text and the output folder."""
    monkeypatch.chdir(tmp_path)

    def run(script, **flags):
        words = [f"--{name}={value}" for name, value in flags.items()]
        monkeypatch.setattr(sys, "argv", [script.__name__, "--output_dir=out", *COMMON, *words])
        script.main()
        return capsys.readouterr().out, tmp_path / "out"

    return run


@pytest.fixture(scope="module")
def digit_folder(tmp_path_factory):
    """Digits as PNG files in class folders, 160 to train on and 40 for validation."""
    folder = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images[:200], digits.target, strict=False)):
        place = folder / ("train" if i < 160 else "validation") / f"digit-{label}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype(np.uint8)).save(place / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def word_folder(tmp_path_factory):
    """Sentences of two docstrings: `label` says whose, `share` is the share of long words."""
    folder = tmp_path_factory.mktemp("sentences")
    rows = []
    for label, owner in (("optimizer", torch.optim.AdamW), ("array", np.ndarray)):
        sentences = [" ".join(part.split()).replace('"', "") for part in owner.__doc__.split(".")]
        rows += [(text, label) for text in sentences if len(text.split()) > 3]
    lines = [
        f'"{text}",{label},{np.mean([len(word) > 4 for word in text.split()]):.4f}'
        for text, label in rows[:40] + rows[-40:]
    ]
    for split, part in (("train", lines), ("validation", lines[::4])):
        (folder / f"{split}.csv").write_text("\n".join(["text,label,share", *part]))
    return folder


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory, word_folder):
    folder = tmp_path_factory.mktemp("bert")
    words = sorted({word for word in (word_folder / "train.csv").read_text().lower().split() if word.isalpha()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def logits(folder, texts):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=64)).logits


def test_text_classification(run, word_folder, tiny_bert):
    """Words for classes, in a CSV file: the saved model has the accuracy that the log and the card say."""
    printed, out = run(
        train_text, model_name_or_path=tiny_bert, dataset_name=word_folder, max_steps=4, max_length=64
    )  # fmt: skip
    assert "Metric accuracy: computed with scikit-learn" in printed
    validation = load_dataset(str(word_folder))["validation"]
    predicted = logits(out, list(validation["text"])).argmax(-1)
    names = AutoModelForSequenceClassification.from_pretrained(out).config.id2label
    right = np.mean([names[int(p)] == label for p, label in zip(predicted, validation["label"], strict=True)])
    written = json.loads((out / "eval_results.json").read_text())["eval_accuracy"]
    assert written == pytest.approx(right)
    card = ModelCard.load(out / "README.md")
    assert card.data.eval_results[0].metric_value == written
    assert str(word_folder.parent) not in card.content
    assert card.data.base_model is None


def test_text_regression(run, word_folder, tiny_bert):
    """Fractions are regressed: one logit, squared error, correlations."""
    _, out = run(
        train_text, model_name_or_path=tiny_bert, dataset_name=word_folder, label_column="share", max_steps=3,
        max_length=64, max_eval_samples=8,
    )  # fmt: skip
    validation = load_dataset(str(word_folder))["validation"].select(range(8))
    predicted = logits(out, list(validation["text"])).squeeze(-1)
    shares = torch.tensor(validation["share"])
    written = json.loads((out / "eval_results.json").read_text())
    assert written["eval_loss"] == pytest.approx((predicted - shares).square().mean().item(), rel=1e-3)  # batches of 8
    correlation = np.corrcoef(predicted, shares)[0, 1]
    assert written["eval_pearsonr"] == pytest.approx(correlation, abs=1e-4)  # float32 logits


def test_text_names_a_missing_column(run, word_folder, tiny_bert):
    with pytest.raises(ValueError, match="No column `body`; --text_column takes one of text, label, share"):
        run(train_text, model_name_or_path=tiny_bert, dataset_name=word_folder, text_column="body")


def test_names_a_missing_split(run, word_folder, tiny_bert):
    with pytest.raises(ValueError, match="No split `dev`"):
        run(train_text, model_name_or_path=tiny_bert, dataset_name=word_folder, validation_split="dev")


def test_vision_from_a_config_and_from_its_weights(run, digit_folder):
    """A new grey-scale ViT; then its folder is the pretrained model, and learning rate 0 keeps its figures."""
    overrides = (
        "image_size=8,patch_size=4,num_channels=1,hidden_size=16,num_hidden_layers=1,num_attention_heads=2,"
        "intermediate_size=16"
    )
    _, out = run(train_vision, config_name="vit", config_overrides=overrides, dataset_name=digit_folder, max_steps=4)
    first = json.loads((out / "eval_results.json").read_text())
    processor, model = AutoImageProcessor.from_pretrained(out), AutoModelForImageClassification.from_pretrained(out)
    assert model.config.id2label[3] == "digit-3"
    images = load_dataset("imagefolder", data_dir=str(digit_folder))["validation"]
    pixels = processor([image.convert("L") for image in images["image"]], return_tensors="pt")
    with torch.no_grad():
        predicted = model(**pixels).logits.argmax(-1)
    assert first["eval_accuracy"] == pytest.approx((predicted == torch.tensor(images["label"])).float().mean().item())
    weights = out.rename(out.parent / "weights")
    _, again = run(train_vision, model_name_or_path=weights, dataset_name=digit_folder, max_steps=1, learning_rate=0)
    assert json.loads((again / "eval_results.json").read_text())["eval_loss"] == pytest.approx(first["eval_loss"])


def test_vision_wants_weights_or_a_config(run, digit_folder):
    with pytest.raises(ValueError, match="--model_name_or_path to start from weights, or --config_name"):
        run(train_vision, dataset_name=digit_folder)


PREDICTION = EvalPrediction(
    predictions=np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 1.0, 2.0], [5.0, 1.0, 0.0]]),
    label_ids=np.array([0, 1, 1, 0]),
)


def test_metrics_without_evaluate_are_known_figures(capsys):
    """Three of four right; class 1 has recall 1/2, class 2 is predicted once and never right."""
    figures = load_metrics(["accuracy", "f1"], regression=False)(PREDICTION)
    assert figures["accuracy"] == 0.75
    assert figures["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    values = EvalPrediction(predictions=np.array([[1.0], [2.0], [4.0]]), label_ids=np.array([1.0, 2.0, 3.0]))
    figures = load_metrics(["mse", "spearmanr"], regression=True)(values)
    assert figures == pytest.approx({"mse": 1 / 3, "spearmanr": 1.0})
    assert capsys.readouterr().out.count("scikit-learn") == 4


def test_metric_in_a_local_folder_comes_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "accuracy").mkdir()
    (tmp_path / "accuracy" / "accuracy.py").write_text(
        "import datasets\nimport evaluate\n"
        "class Accuracy(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        kinds = {'predictions': datasets.Value('int32'), 'references': datasets.Value('int32')}\n"
        "        return evaluate.MetricInfo(description='', citation='', features=datasets.Features(kinds))\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'accuracy': sum(p == r for p, r in zip(predictions, references)) / len(references)}\n"
    )
    compute = load_metrics(["accuracy"], regression=False)
    assert "Metric accuracy: evaluate's" in capsys.readouterr().out
    assert compute(PREDICTION) == {"accuracy": 0.75}


def test_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="No metric acuracy; there are accuracy"):
        load_metrics(["acuracy"], regression=False)
