"""The benchmark of defaults, in a few steps: what it records, what it need not run again, and its table."""

import json
import sys
from dataclasses import asdict

import bench_defaults
import pytest
import torch
from bench_defaults import Run, find, main, table, train
from tasks import digits, trec
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from hf_efcp.optim.registry import get_spec

QUESTIONS = ["who is it", "where is it now", "who was it", "where was it then", "who", "where are they all now"]


@pytest.fixture
def bench(monkeypatch, tmp_path, capsys):
    """Run the script with these flags; the printed text and the recorded runs."""
    threads = torch.get_num_threads()

    def bench(*flags):
        file = tmp_path / "runs.jsonl"
        monkeypatch.setattr(sys, "argv", ["bench_defaults", "--file", str(file), *flags])
        main()
        return capsys.readouterr().out, [json.loads(line) for line in file.read_text().splitlines()]

    yield bench
    torch.set_num_threads(threads)


def test_a_recorded_run_is_not_run_again(bench, monkeypatch):
    flags = ["--tasks", "digits", "--steps", "2", "--seeds", "0"]
    printed, records = bench(*flags)
    assert [record["optimizer"] for record in records] == ["adamw_torch", "efcp_mfac"]
    assert [line.split(" | ")[0] for line in printed.splitlines()[2:4]] == ["| adamw_torch", "| efcp_mfac"]
    monkeypatch.setattr(bench_defaults, "train", None)
    assert bench(*flags) == (printed, records)


def test_no_run_starts_after_the_time(bench, tmp_path):
    (tmp_path / "runs.jsonl").touch()
    printed, records = bench("--tasks", "digits", "--seeds", "0", "--minutes", "-1")
    assert records == []
    assert "digits: no finished run" in printed
    assert "0 of 2 runs finished" in printed


def test_a_screen_is_the_beginning_of_the_run(monkeypatch):
    """Same schedule, data and weights; so the whole run's record serves where a screen is asked for."""
    monkeypatch.setitem(bench_defaults.EVALUATED, "digits", (2, 4))
    task = digits()
    whole, screen = (train(Run.of("digits", "efcp_mfac", {}, 0, 4, stop), task) for stop in (4, 2))
    assert list(whole["loss"]) == [2, 4]
    assert screen["loss"] == {2: whole["loss"][2]}
    assert find(Run.of("digits", "efcp_mfac", {}, 0, 4, 2), [screen, whole]) == whole
    assert find(Run.of("digits", "efcp_mfac", {}, 0, 4, 4), [screen]) is None


def test_an_option_at_its_default_is_no_variant():
    _, window = get_spec("efcp_mfac").options()["window"]
    usual = Run.of("digits", "efcp_mfac", {}, 0, 4, 4)
    assert Run.of("digits", "efcp_mfac", {"window": str(window)}, 0, 4, 4) == usual
    other = Run.of("digits", "efcp_mfac", {"window": str(window + 1)}, 0, 4, 4)
    assert other != usual
    assert (usual.label, other.label) == ("efcp_mfac", f"efcp_mfac window={window + 1}")


def test_a_record_without_a_newer_option_still_serves():
    run = Run.of("digits", "efcp_mfac", {}, 0, 4, 4)
    settings = json.loads(run.settings)
    del settings["window"]
    record = {**asdict(run), "settings": json.dumps(settings)}
    assert find(run, [record]) == record
    assert find(Run.of("digits", "efcp_mfac", {"window": "7"}, 0, 4, 4), [record]) is None


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
    record = train(Run.of("trec", "adamw_torch", {}, 0, 4, 2), task)
    assert list(record["loss"]) == [2]
    assert record["accuracy"][2] in [right / 6 for right in range(7)]


def test_table_of_known_figures():
    """Mean and sample deviation; the ratio is over the seeds that AdamW has too."""
    records = [
        {
            "task": "digits", "optimizer": "adamw_torch", "settings": "{}", "seed": seed, "steps": 100, "stop": 100,
            "loss": {"100": loss}, "accuracy": {"100": 0.95}, "bytes_per_parameter": 8.0, "seconds_per_step": 0.5,
        }
        for seed, loss in ((0, 0.1), (1, 0.3))
    ]  # fmt: skip
    records.append({**records[0], "optimizer": "sgd", "loss": {"100": 0.2}})
    runs = [Run.of("digits", name, {}, seed, 100, 100) for name in ("adamw_torch", "sgd") for seed in (0, 1)]
    _, _, adamw, sgd = table("digits", runs, records).splitlines()
    assert adamw == "| adamw_torch | 2 | 0.2000 ± 0.1414 | 95.00 ± 0.00 | 1.000 | 8.0 | 0.500 |"
    assert sgd == "| sgd | 1 | 0.2000 ± 0.0000 | 95.00 ± 0.00 | 2.000 | 8.0 | 0.500 |"
