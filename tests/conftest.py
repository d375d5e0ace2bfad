"""What every test needs before it imports a library."""

import os
import runpy
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
runpy.run_path(str(Path(__file__).parent / "cpu_torchvision" / "sitecustomize.py"))

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read at Triton's import

# The same examples at every run, and no deadline: test machines are shared.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")
