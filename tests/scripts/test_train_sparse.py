"""The comparison of sparse runs: compute counted by hand, figures of known runs, and tiny runs that go on."""

import json

import pytest
import sparse_report
import torch
import train_sparse


def known(arm, accuracy, seed=0, noise=()):
    epochs = len(accuracy)
    return {
        "arm": arm, "sparsity": 0.9, "seed": seed, "epochs": epochs, "of": 2, "steps": 10, "accuracy": accuracy,
        "passes": train_sparse.passes(arm, epochs, 10), "noise": list(noise),
    }  # fmt: skip


def test_compute_is_counted_in_passes():
    """A step is 1 forward and 1 backward (2): 3; AGENT's two of each 6, and 4 for the pass before all but the first."""
    assert train_sparse.passes("rigl", 8, 63) == 8 * 63 * 3
    assert train_sparse.passes("agent", 1, 63) == 63 * 3
    assert train_sparse.passes("agent", 8, 63) == 63 * (3 + 7 * (6 + 4))
    run = known("agent", [0.1, 0.2, 0.3])
    assert [sparse_report.passes_at(run, epoch) for epoch in (1, 2, 3)] == [30, 130, 230]


def test_the_table_says_when_an_accuracy_is_reached():
    noise = [{"epoch": 1.5, "c": 0.05, "ratio": 0.9, "best_c": 0.8, "best_ratio": 0.4, "at_zeros": 0.25}]
    runs = [
        known("rigl", [0.3, 0.5]), known("rigl", [0.3, 0.4], 1),
        known("agent", [0.3, 0.5], noise=noise), known("agent", [0.3, 0.39], 1),
        known("longer", [0.3, 0.45, 0.6]), known("longer", [0.3, 0.4, 0.5], 1),
    ]  # fmt: skip
    table = sparse_report.table(runs)
    assert "| 0.9 | RigL | 2 | 2 | 60 | 45.0 ± 7.1 | 45.0 ± 7.1 | 2.0 epochs, 60 passes (2 of 2) |" in table
    assert "| 0.9 | RigL + AGENT | 2 | 2 | 130 | 44.5 ± 7.8 | 44.5 ± 7.8 | 2.0 epochs, 130 passes (1 of 2) |" in table
    assert "2.5 epochs, 75 passes (2 of 2)" in table
    assert "| 0.9 | RigL + AGENT | 1.5 | 0.050 | 0.900 | 0.900 | 0.400 | 0.250 |" in table


def test_runs_go_on_where_they_ended(tmp_path, monkeypatch, capsys):
    """Five tiny runs, then none again; the corrected one measured its noise, and the long one took its passes."""

    def load(data, split, count):
        pixels = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        return [{"pixel_values": x, "labels": i % 10} for i, x in enumerate(pixels)]

    monkeypatch.setattr(train_sparse, "load", load)
    for name, value in (("TRAIN", 32), ("TEST", 16), ("BATCH", 8)):
        monkeypatch.setattr(train_sparse, name, value)
    file = tmp_path / "runs.jsonl"
    picture = ["--picture", str(tmp_path / "runs.png")]
    words = ["--file", str(file), *picture, "--sparsities", "0.9", "--seeds", "0", "--epochs", "2"]
    train_sparse.main([*words, "--arms", "agent", "longer", "spared"])
    train_sparse.main(words)
    runs = [json.loads(line) for line in file.read_text().splitlines()]
    assert [run["arm"] for run in runs] == ["agent", "spared", "longer", "rigl", "bold"]
    agent, spared, longer, *_ = runs
    assert longer["epochs"] == round(agent["passes"] / (3 * 4)) == 4
    assert all(run["density"] == pytest.approx(0.1, abs=1e-4) for run in runs)
    assert all(len(run["accuracy"]) == run["epochs"] for run in runs)
    for run in (agent, spared):
        (noise,) = run["noise"]
        assert noise["ratio"] >= noise["best_ratio"]
        assert 0 <= noise["at_zeros"] <= 1
    assert noise["at_zeros"] == 0
    assert (tmp_path / "runs.png").stat().st_size > 10_000
    assert "RigL, for AGENT's compute" in capsys.readouterr().out
