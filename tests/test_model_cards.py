"""The published cards: metadata that the Hub reads, headings, links, and figures that stand in the stored log."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_efcp.optim import list_optimizers
from hf_efcp.train.model_card import TEMPLATE
from hf_efcp.train.run_record import log_rows

CARDS = Path(__file__).parents[1] / "model_cards"
PUBLISHED = sorted(CARDS.glob("*/README.md")) or sorted(p for p in CARDS.glob("*.md") if p.name != "template.md")
HEADINGS = ["Results", "Optimizer", "Training log", "Memory", "How to repeat it"]


def test_the_template_is_the_packages():
    assert (CARDS / "template.md").resolve() == TEMPLATE


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.relative_to(CARDS).as_posix())
class TestCard:
    def test_metadata(self, path):
        data = ModelCard.load(path).data
        assert data.library_name in ("transformers", "peft")
        assert "hf_efcp" in data.tags
        assert set(data.tags) & set(list_optimizers())
        assert all(isinstance(result.metric_value, float) for result in data.eval_results)
        assert data.base_model is None or re.fullmatch(r"[\w.-]+/[\w.-]+", data.base_model)

    def test_headings_and_links(self, path):
        text = path.read_text(encoding="utf-8")
        headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
        assert [heading for heading in headings if heading in HEADINGS] == HEADINGS
        for target in re.findall(r"\]\((.*?)\)", text):
            assert target.startswith("https://huggingface.co/") or (path.parent / target).is_file()
        assert not re.search(r"/(home|root|work|tmp)/", text)

    def test_each_figure_stands_in_the_log(self, path):
        log = path.parent / "trainer_state.json"
        if not log.is_file():
            pytest.skip("this card was published without its log")
        card = ModelCard.load(path)
        rows = {row["step"]: row for row in log_rows(json.loads(log.read_text())["log_history"])}
        section = re.search(r"^## Training log\n(.*?)^## ", card.text, re.MULTILINE | re.DOTALL)[1]
        lines = [[c.strip() for c in li.strip("|").split("|")] for li in section.splitlines() if li.startswith("| ")]
        named = {"training loss": "loss", "validation loss": "eval_loss", "step": "step", "epoch": "epoch"}
        keys = [named.get(name, f"eval_{name.replace(' ', '_')}") for name in lines[0]]
        assert len(lines) > 2
        for cells in lines[1:]:
            row = rows[int(cells[0])]
            for key, cell in zip(keys, cells, strict=True):
                assert float(cell) == pytest.approx(row[key], rel=1e-3)
        last = rows[max(rows)]
        for result in card.data.eval_results:
            assert result.metric_value == last[f"eval_{result.metric_type}"]
