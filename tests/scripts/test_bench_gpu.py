"""`bench_gpu.py` where there is no GPU: its refusal, and all that it does, in small."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_gpu.py"


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_measures_nothing():
    done = run()
    assert done.returncode != 0
    assert "torch sees none here" in done.stderr
    assert "--dry-run" in done.stderr


def dry_run(folder, *arguments):
    pytest.importorskip("triton", reason="needs triton, which has wheels for Linux")
    done = run("--dry-run", "--out", folder, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (folder / "bench_gpu.jsonl").read_text().splitlines()]
    assert [row for row in rows if "left_out" in row] == []
    assert all(row["ms"] > 0 for row in rows if "ms" in row)
    return rows


def test_a_dry_run_measures_kernels_and_steps(tmp_path):
    rows = dry_run(tmp_path, "--sections", "copy", "kernels", "steps")
    kernels = {row["kernel"] for row in rows if "kernel" in row}
    assert kernels == {"push", "row dots", "window dots", "window combine", "combine and step", "adam"}
    steps = {(row["model"], row["optimizer"].split(",")[0]) for row in rows if "optimizer" in row}
    assert {("ViT-B", "AdamW fused"), ("ViT-B", "efcp_mfac"), ("1B", "efcp_mfac"), ("ViT-B", "published step")} <= steps

    before = (tmp_path / "bench_gpu.jsonl").read_text()
    assert dry_run(tmp_path, "--sections", "copy", "kernels", "steps") == rows
    assert (tmp_path / "bench_gpu.jsonl").read_text() == before


@pytest.fixture
def bench():
    pytest.importorskip("triton", reason="needs triton, which has wheels for Linux")
    return importlib.import_module("bench_gpu")


def measured(bench, monkeypatch, jobs, done=(), minutes=1.0):
    monkeypatch.setattr(bench, "jobs", lambda *_: iter(jobs))
    monkeypatch.setattr(bench, "use_backend", lambda *_: None)
    args = argparse.Namespace(sections=[], minutes=minutes)
    return list(bench.measure(args, bench.DRY, "triton", set(done)))


def test_a_job_out_of_memory_costs_no_other_its_turn(bench, monkeypatch):
    def fails():
        yield {"kernel": "first"}
        raise torch.OutOfMemoryError("CUDA out of memory")

    rows = measured(bench, monkeypatch, [("a", fails), ("b", lambda: [{"ms": 1.0}])])
    assert rows[0] == {"job": "a", "kernel": "first"}
    assert rows[1] == {"left_out": "a", "why": "OutOfMemoryError: CUDA out of memory"}
    assert rows[2:] == [{"job": "b", "ms": 1.0}, {"finished": "b"}]


def test_what_there_is_no_time_for_is_told(bench, monkeypatch):
    rows = measured(bench, monkeypatch, [("a", list)], minutes=0.0)
    assert rows == [{"left_out": "a", "why": "0.0 minutes are over"}]


def test_a_run_goes_on_where_another_was_cut_off(bench, monkeypatch, tmp_path):
    """With whole jobs: rows of one that failed or was killed are dropped, and so are those of another commit."""
    common, path = {"commit": "abc"}, tmp_path / "rows.jsonl"
    rows = [common, {"job": "a", "ms": 1.0}, {"finished": "a"}, {"job": "b", "ms": 2.0}, {"left_out": "b", "why": "x"}]
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"job": "c", "m')
    kept = bench.finished(path, common)
    assert kept == rows[1:3]
    assert bench.finished(path, {"commit": "def"}) == bench.finished(tmp_path / "none", common) == []
    taken = measured(bench, monkeypatch, [("a", list), ("b", list)], done={"a"})
    assert taken == [{"finished": "b"}]


def test_every_measurement_of_the_plan_is_a_job(bench):
    """And the tables name the shares that are aimed at."""
    names = [name for name, _ in bench.jobs(bench.DRY, list(bench.SECTIONS), "triton")]
    assert names[0] == "copy"
    assert len(names) == len(set(names)) == 1 + 3 + len(bench.TRAINED) + 13
    assert set(bench.OVERHEADS) <= set(bench.TRAINED)


@pytest.mark.slow
def test_a_dry_run_measures_steps_under_trainer(tmp_path):
    rows = dry_run(tmp_path, "--sections", "trainer")
    trained = [row["trainer"].split()[0] for row in rows if "trainer" in row]
    assert set(trained) == {"adamw_torch_fused", "efcp_mfac", "efcp_ggt", "efcp_singd", "sketchy_shampoo"}
    assert "| adamw_torch_fused |" in (tmp_path / "bench_gpu.md").read_text()
    assert (tmp_path / "bench_gpu.png").stat().st_size > 10_000
