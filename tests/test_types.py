"""The package's annotations hold: pyright finds nothing with its basic rules."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_pyright_finds_nothing():
    pytest.importorskip("pyright")
    words = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stdout
