"""`bench_gpu.py` where there is no GPU: its refusal, and all that it does, in small."""

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
    assert kernels == {"push", "row dots", "window dots", "window combine", "adam"}
    steps = {(row["model"], row["optimizer"].split(",")[0]) for row in rows if "optimizer" in row}
    assert {("ViT-B", "AdamW fused"), ("ViT-B", "efcp_mfac"), ("1B", "efcp_mfac"), ("ViT-B", "published step")} <= steps


@pytest.mark.slow
def test_a_dry_run_measures_steps_under_trainer(tmp_path):
    rows = dry_run(tmp_path, "--sections", "trainer")
    trained = [row["trainer"].split()[0] for row in rows if "trainer" in row]
    assert set(trained) == {"adamw_torch_fused", "efcp_mfac", "efcp_ggt", "efcp_singd", "sketchy_shampoo"}
    assert "| adamw_torch_fused |" in (tmp_path / "bench_gpu.md").read_text()
    assert (tmp_path / "bench_gpu.png").stat().st_size > 10_000
