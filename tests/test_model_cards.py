"""The published cards: metadata that the Hub reads, headings, links, and figures that stand in the stored log."""

import json
import re
import statistics
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from quality_runs import default_settings
from result_cards import RESULTS, SUBJECTS, is_published, read, write_quality, write_sparse
from sparse_report import LABELS

from hf_efcp.optim import list_optimizers
from hf_efcp.train.model_card import TEMPLATE
from hf_efcp.train.run_record import log_rows

CARDS = Path(__file__).parents[1] / "model_cards"
PUBLISHED = sorted(CARDS.glob("*/README.md"))
RUNS = [path for path in PUBLISHED if (path.parent / "trainer_state.json").is_file()]
QUALITY = [path for path in PUBLISHED if path.parent.name.startswith("quality-")]
SPARSE = [path for path in PUBLISHED if path.parent.name.startswith("sparse-")]
HEADINGS = ["Results", "Optimizer", "Training log", "Memory", "How to repeat it"]


def name(path):
    return path.parent.name


def section(card, heading):
    """The cells of the table below a heading, header first."""
    text = re.search(rf"^## {heading}\n((?:(?!^## ).*\n?)*)", card.text, re.MULTILINE)[1]
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip().strip("`") for cell in line.strip().strip("|").split("|")] for line in lines]


def log_of(path):
    """The stored lines that a card of a result says it is made of."""
    file, count = re.search(
        r"computed from `scripts/results/(\w+\.jsonl)`, lines 1 to (\d+);", path.read_text()
    ).groups()
    return read(RESULTS / file)[: int(count)]


def test_the_template_is_the_packages():
    assert (CARDS / "template.md").resolve() == TEMPLATE


def test_every_result_with_a_log_has_its_card():
    records = read(RESULTS / "quality.jsonl")
    assert {f"quality-{task}" for task in SUBJECTS if is_published(records, task)} == set(map(name, QUALITY))
    assert len(SPARSE) <= (RESULTS / "sparse.jsonl").is_file()
    assert len(RUNS) + len(QUALITY) + len(SPARSE) == len(PUBLISHED) == len(list(CARDS.rglob("*.md"))) - 2


@pytest.mark.parametrize("path", PUBLISHED, ids=name)
class TestCard:
    def test_metadata(self, path):
        data = ModelCard.load(path).data
        assert data.library_name in ("transformers", "peft")
        assert "hf_efcp" in data.tags
        assert set(data.tags) & {*list_optimizers(), "agent"}
        assert data.eval_results
        assert all(isinstance(result.metric_value, float) for result in data.eval_results)
        assert data.base_model is None or re.fullmatch(r"[\w.-]+/[\w.-]+", data.base_model)
        assert data.model_name == path.parent.name

    def test_headings_and_links(self, path):
        text = path.read_text(encoding="utf-8")
        headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
        wanted = [heading for heading in HEADINGS if heading != "Memory" or path not in SPARSE]
        assert [heading for heading in headings if heading in HEADINGS] == wanted
        for target in re.findall(r"\]\((.*?)\)", text):
            assert target.startswith("https://huggingface.co/") or (path.parent / target).is_file()
        assert not re.search(r"/(home|root|work|tmp)/", text)

    def test_pictures_show_something(self, path):
        pictures = re.findall(r"!\[.*?\]\((.*?)\)", path.read_text(encoding="utf-8"))
        assert "figures/loss.png" in pictures
        for picture in pictures:
            with Image.open(path.parent / picture) as image:
                assert len(image.convert("RGB").getcolors(1 << 20)) > 50


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_each_figure_of_a_run_stands_in_its_log(path):
    card = ModelCard.load(path)
    rows = {
        row["step"]: row
        for row in log_rows(json.loads((path.parent / "trainer_state.json").read_text())["log_history"])
    }
    header, *lines = section(card, "Training log")
    named = {"training loss": "loss", "validation loss": "eval_loss", "step": "step", "epoch": "epoch"}
    keys = [named.get(title, f"eval_{title.replace(' ', '_')}") for title in header]
    assert len(lines) > 2
    for cells in lines:
        row = rows[int(cells[0])]
        for key, cell in zip(keys, cells, strict=True):
            assert float(cell) == pytest.approx(row[key], rel=1e-3)
    last = rows[max(rows)]
    for title, value in section(card, "Results")[1:]:
        assert float(value) == pytest.approx(last[named.get(title, f"eval_{title}")], rel=1e-3)
    for result in card.data.eval_results:
        assert result.metric_value == last[f"eval_{result.metric_type}"]


@pytest.mark.parametrize("path", QUALITY, ids=name)
def test_each_figure_of_a_benchmark_stands_in_its_log(path):
    """Means over the seeds of runs with one optimizer, learning rate and set of options."""
    card, task = ModelCard.load(path), path.parent.name.removeprefix("quality-")
    sizes = dict(section(card, "Memory")[1:])
    header, *log = section(card, "Training log")
    (_, *optimizers) = section(card, "Results")
    metrics = {r.metric_name.split(" with ")[1]: r.metric_value for r in card.data.eval_results}
    for label, rate, seeds, lowest, metric in optimizers:
        groups = {}
        for record in log_of(path):
            if (record["task"], record["optimizer"], record["learning_rate"]) == (
                task,
                label.split(",")[0],
                float(rate),
            ):
                settings = {**default_settings(record["optimizer"]), **record["settings"]}  # lacks what came later
                groups.setdefault(json.dumps([settings, record["stop"]], sort_keys=True), []).append(record)
        column = [float(row[header.index(label)]) for row in log]
        (same,) = [
            g for g in groups.values() if len(g) == int(seeds) and _mean(g, "loss") == pytest.approx(column, rel=1e-3)
        ]
        assert [int(row[0]) for row in log] == same[0]["at"]
        assert float(lowest.split(" ")[0]) == pytest.approx(statistics.mean(min(r["loss"]) for r in same), abs=6e-4)
        assert float(metric.split(" ")[0]) == pytest.approx(_mean(same, "metric")[-1], abs=6e-5)
        assert metrics[label] == pytest.approx(_mean(same, "metric")[-1], abs=1e-5)
        assert float(sizes[label]) == pytest.approx(same[0]["bytes_per_parameter"], abs=6e-3)


@pytest.mark.parametrize("path", SPARSE, ids=name)
def test_each_figure_of_sparse_runs_stands_in_its_log(path):
    """Means over the seeds, by method and sparsity."""
    card, runs = ModelCard.load(path), [run for run in log_of(path) if run["of"] == 8]
    header, *log = section(card, "Training log")
    for column, label in enumerate(header[1:], start=1):
        method, sparsity = label.rsplit(", ", 1)
        arms = [arm for arm, words in LABELS.items() if words == method]
        same = [run for run in runs if run["arm"] in arms and run["sparsity"] == float(sparsity)]
        shown = [float(row[column]) for row in log if row[column]]
        assert shown == pytest.approx(_mean(same, "accuracy"), rel=1e-3)
        (value,) = [r.metric_value for r in card.data.eval_results if r.metric_name == f"accuracy with {label}"]
        assert value == pytest.approx(_mean(same, "accuracy")[-1], abs=1e-5)


def _mean(records, key):
    return [statistics.mean(values) for values in zip(*(record[key] for record in records), strict=True)]


@pytest.mark.parametrize("path", QUALITY + SPARSE, ids=name)
def test_the_script_writes_the_card_again(path, tmp_path):
    """Nothing in it is typed in."""
    records = log_of(path)
    written = (
        write_sparse(records, tmp_path) if path in SPARSE
        else write_quality(records, path.parent.name.removeprefix("quality-"), tmp_path)
    )  # fmt: skip
    assert written.read_text() == path.read_text()
