"""The quality benchmark: what it need not run again, and its figures on logs whose answers are known."""

import json
import math
import sys

import bench_quality
import pytest
import quality_runs
import torch
from bench_quality import RESULTS, main
from matplotlib.image import imread
from quality_pictures import draw, draw_overview
from quality_report import BEGIN, END, published, study, update_readme
from quality_runs import REPOSITORY, Run, find, read
from quality_tables import (
    best,
    by_rate,
    gained,
    per_task,
    result_of,
    seconds_to,
    steps_to,
    summary,
    unlearned,
    whole,
    width,
)

from hf_efcp.optim.registry import get_spec


@pytest.fixture
def bench(monkeypatch, tmp_path, capsys):
    """Run the script with these flags; the printed text and the recorded runs."""
    threads = torch.get_num_threads()

    def bench(*flags):
        file = tmp_path / "runs.jsonl"
        monkeypatch.setattr(sys, "argv", ["bench_quality", "--file", str(file), "--processes", "1", *flags])
        main()
        return capsys.readouterr().out, read(file)

    yield bench
    torch.set_num_threads(threads)


def record(optimizer="adamw_torch", rate=1e-3, seed=0, loss=(3.0, 2.0, 1.0, 1.5), metric=0.8, **changes):
    """A run on digits of four evaluations, a second a step."""
    at = [10, 20, 30, 40]
    return {
        "task": "digits", "optimizer": optimizer, "settings": {}, "learning_rate": rate, "seed": seed,
        "steps": 40, "stop": 40, "defaults": True, "at": at, "loss": list(loss), "metric": [0.1, 0.2, 0.3, metric],
        "seconds": at, "bytes_per_parameter": 8.0, "hardware": "a machine", "commit": "abc", **changes,
    }  # fmt: skip


def results(*records):
    (result,) = by_rate(records, "digits", records[0]["optimizer"]).values()
    return result


def grid(optimizer, metrics, **changes):
    return [record(optimizer, 1e-3 * 2**i, metric=m, **changes) for i, m in enumerate(metrics)]


def test_a_recorded_run_is_not_run_again(bench, monkeypatch):
    flags = ["--tasks", "digits", "--steps", "2", "--optimizers", "adamw_torch", "efcp_mfac", "--rates", "1e-3"]
    _, records = bench(*flags)
    assert [r["optimizer"] for r in records] == ["adamw_torch", "efcp_mfac"]
    monkeypatch.setattr(bench_quality, "train", None)
    assert bench(*flags)[1] == records


def test_no_run_starts_after_the_budget(bench):
    printed, records = bench("--tasks", "digits", "--budget", "0")
    assert (records, printed) == ([], "no finished run\n")


def test_stages_go_on_where_the_log_ends(bench, monkeypatch):
    """AdamW's four rates come first; ours follow at the best of them, without a second call."""
    runs = []

    def train(run, task):
        runs.append(run)
        loss = abs(run.learning_rate - 2e-3)  # the third rate is the best
        return {**record(run.optimizer, run.learning_rate, run.seed), "settings": json.loads(run.settings),
                "steps": 400, "stop": 400, "loss": [loss] * 4}  # fmt: skip

    monkeypatch.setattr(bench_quality, "train", train)
    bench("--tasks", "digits")
    assert [run.learning_rate for run in runs[:4]] == [5e-4, 1e-3, 2e-3, 4e-3]
    assert {run.optimizer for run in runs[:4]} == {"adamw_torch"}
    assert [(run.optimizer, run.learning_rate) for run in runs[4:6]] == [("efcp_mfac", 2e-3), ("sketchy_shampoo", 2e-3)]
    assert [(run.optimizer, run.seed) for run in runs[6:8]] == [("adamw_torch", 1), ("adamw_torch", 2)]
    assert len(runs) == len(set(runs))


def test_an_option_at_its_default_is_no_variant():
    _, window = get_spec("efcp_mfac").options()["window"]
    usual = Run.of("digits", "efcp_mfac", {}, 1e-3, 0, (4, 4))
    assert Run.of("digits", "efcp_mfac", {"window": str(window)}, 1e-3, 0, (4, 4)) == usual
    other = Run.of("digits", "efcp_mfac", {"window": str(window + 1)}, 1e-3, 0, (4, 4))
    assert (usual.is_default, other.is_default) == (True, False)


def test_a_record_without_a_newer_option_still_serves():
    run = Run.of("digits", "efcp_mfac", {}, 1e-3, 0, (40, 40))
    settings = json.loads(run.settings)
    del settings["window"]
    old = record("efcp_mfac", settings=settings)
    assert find(run, [old]) == old
    assert find(Run.of("digits", "efcp_mfac", {"window": "7"}, 1e-3, 0, (40, 40)), [old]) is None


def test_a_loss_that_is_not_finite_is_recorded_as_none():
    assert quality_runs._figure(math.nan) is None
    assert quality_runs._figure(0.123456789) == 0.12346


def test_steps_to_adamws_best_loss():
    """AdamW's lowest is 1.0 at step 30; the other has 1.0 at step 20, another never."""
    base = results(record())
    assert steps_to(results(record("sgd", loss=(2.0, 1.0, 0.9, 0.8))), base) == pytest.approx(2 / 3)
    assert steps_to(results(record("sgd", loss=(2.0, 1.1, 1.1, 1.01))), base) is None
    assert steps_to(base, base) == 1.0


def test_a_task_that_adamw_does_not_learn_is_named_and_not_compared():
    """Its curve falls by 0.01, its seeds are 0.02 apart; with seeds alike the same fall counts."""
    flat = [record(rate=1e-3 * 2**i, seed=s, loss=(1.01 + s / 50, 1 + s / 50, 2, 2)) for i in range(4) for s in (0, 1)]
    alike = [record(rate=1e-3 * 2**i, seed=s, loss=(1.01, 1, 2, 2)) for i in range(4) for s in (0, 1)]
    ours = record("efcp_mfac", settings={"window": 32})
    assert unlearned([*flat, ours]) == ["digits"]
    assert "efcp_mfac" not in summary([*flat, ours])
    assert unlearned([*alike, ours]) == []
    assert "efcp_mfac" in summary([*alike, ours])
    assert "Not counted: digits" in published([*flat, ours])
    assert "All tasks count" in published([*alike, ours])


def test_seconds_count_to_the_same_evaluations():
    base = results(record())
    slow = results(record("sgd", loss=(2.0, 1.0, 0.9, 0.8), seconds=[30, 60, 90, 120]))
    assert seconds_to(slow, base) == pytest.approx(60 / 30)


def test_comparisons_use_the_seeds_that_both_have():
    base = results(record(seed=0, metric=0.8), record(seed=1, metric=0.6))
    other = results(record("sgd", seed=1, metric=0.7, loss=(1.0, 0.9, 0.8, 0.7)))
    assert gained(other, base) == pytest.approx(10.0)
    assert steps_to(other, base) == pytest.approx(1 / 3)


def test_best_rate_has_the_lowest_loss_and_not_a_diverged_one():
    runs = [record(rate=1e-3), record(rate=2e-3, loss=(3.0, 2.0, 0.9, 0.95)), record(rate=4e-3, loss=[None] * 4)]
    assert best(by_rate(runs, "digits", "adamw_torch")).rate == 2e-3


def test_width_in_octaves():
    """Metric 0.79, 0.80, 0.80, 0.78: an octave between the equal ones, all of that below, half of that above."""
    assert width(by_rate(grid("sgd", [0.79, 0.80, 0.80, 0.78]), "digits", "sgd")) == (pytest.approx(2.5), False)
    octaves, ends = width(by_rate(grid("sgd", [0.70, 0.80, 0.79, 0.70]), "digits", "sgd"))
    assert (octaves, ends) == (pytest.approx(0.1 + 1.0), True)


def test_own_rate_needs_four():
    runs = grid("sgd", [0.7, 0.8, 0.9])
    assert result_of(runs, "digits", "sgd", "own") is None
    assert result_of([*runs, record("sgd", 8e-3)], "digits", "sgd", "own") is not None


def test_runs_of_older_defaults_do_not_mix_with_newer():
    runs = [record("efcp_mfac", settings={"window": 16}, seed=1), record("efcp_mfac", settings={"window": 32})]
    (result,) = by_rate(runs, "digits", "efcp_mfac").values()
    assert result.records == (runs[1],)


def test_a_variant_that_became_the_default_counts():
    """It was recorded as a variant; what its settings are today decides."""
    window = get_spec("efcp_mfac").options()["window"][1]
    runs = [
        record("efcp_mfac", settings={"window": window}, defaults=False),
        record("efcp_mfac", settings={"window": 7}),
    ]
    assert whole(runs) == runs[:1]
    assert whole(runs[1:]) == runs[1:]


def test_tables_name_every_task():
    runs = [*grid("adamw_torch", [0.7, 0.8, 0.8, 0.7]), record("efcp_mfac", settings={"window": 32}, loss=(1, 1, 1, 1))]
    row = next(line for line in summary(runs).splitlines() if "efcp_mfac" in line)
    assert row.split(" | ")[2:5] == ["1 of 10", "1 of 1", "0.33"]
    table = per_task(runs, [("adamw_torch", "own"), ("efcp_mfac", "AdamW's")])
    assert [line.split(" | ")[0][2:] for line in table.splitlines()[2:]] == list(quality_runs.TASKS)
    assert "| digits | 1.000; 70.0 (1) | 1.000; 80.0 (1) |" in table
    assert "| trec | not run | not run |" in table


def test_picture_has_a_panel_a_task(tmp_path):
    runs = [*grid("adamw_torch", [0.7, 0.8, 0.8, 0.7]), record("efcp_mfac", settings={"window": 32})]
    draw(runs, tmp_path / "quality.png")
    assert imread(tmp_path / "quality.png").shape[:2] == (5.2 * 2 * 80, 3.2 * 5 * 80)


def test_overview_has_a_panel_for_each_task_that_was_run_and_one_for_memory(tmp_path):
    runs = [*grid("adamw_torch", [0.7, 0.8, 0.8, 0.7]), record("efcp_mfac", settings={"window": 32})]
    draw_overview(runs, tmp_path / "overview.png")
    assert imread(tmp_path / "overview.png").shape[:2] == (round(2.9 * 110), round(5.4 * 110))


def test_study_divides_by_the_defaults_of_the_same_seed():
    runs = [
        record("efcp_mfac", settings={"window": 32}, loss=(4, 3, 2, 2.0)),
        record("efcp_mfac", settings={"window": 64}, loss=(4, 3, 2, 1.0), defaults=False),
        record("efcp_mfac", settings={"window": 64}, loss=(4, 3, 2, 1.0), seed=1, defaults=False),
    ]
    assert "| window=64 | 0.500 (1) | 0.500 |" in study(runs, "efcp_mfac")


def test_report_goes_between_the_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}old\n{END}after\n")
    update_readme(readme, grid("adamw_torch", [0.7, 0.8, 0.8, 0.7]))
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    readme.write_text("nothing")
    with pytest.raises(ValueError, match="has no lines"):
        update_readme(readme, [])


def test_readme_says_what_the_log_says():
    """Every figure of the README's quality tables is made from the stored runs."""
    text = (REPOSITORY / "README.md").read_text()
    assert text.split(BEGIN)[1].split(END)[0] == published(read(RESULTS / "quality.jsonl"))
