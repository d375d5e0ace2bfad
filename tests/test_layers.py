"""The layers of the package: imports point one way, each dependency has its place, files stay small."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "hf_efcp").rglob("*.py"))
LAYERS = {"ops": 0, "curvature": 1, "sparsity": 1, "parallel": 1, "optim": 2, "plot": 2, "train": 3}  # else 4
HUGGING_FACE = {"transformers", "accelerate", "datasets", "evaluate", "huggingface_hub"}
KERNELS = {"triton", "numba"}


def imported(source):
    """Every module that a file imports, anywhere in it, and every `torch.distributed` that it names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed"


def violations(path, source):
    """What a file of the package, given relative to it, imports and may not."""
    place = path.split("/")[0].removesuffix(".py")
    for module in imported(source):
        parts = module.split(".")
        if module.startswith("."):
            yield f"{path}: relative import {module}"
        elif parts[0] == "hf_efcp" and len(parts) > 1 and LAYERS.get(parts[1], 4) > LAYERS.get(place, 4):
            yield f"{path}: {module} is a higher layer"
        elif parts[0] in HUGGING_FACE and place not in ("train", "run", "cli", "memory"):
            yield f"{path}: {module} belongs in train, run, cli or memory"
        elif parts[0] in KERNELS and place != "ops":
            yield f"{path}: {module} belongs in ops"
        elif parts[:2] == ["torch", "distributed"] and place not in ("parallel", "train"):
            yield f"{path}: {module} belongs in parallel"


def test_imports_keep_to_their_layers():
    package = ROOT / "hf_efcp"
    found = [v for path in SOURCES for v in violations(path.relative_to(package).as_posix(), path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ops/a.py", "from hf_efcp.curvature import layout"),
        ("optim/a.py", "def f():\n    import hf_efcp.train"),
        ("optim/a.py", "from hf_efcp import cli"),
        ("optim/a.py", "import transformers"),
        ("plot.py", "import transformers"),
        ("curvature/a.py", "from torch import distributed"),
        ("curvature/a.py", "import torch\ntorch.distributed.barrier()"),
        ("curvature/a.py", "import triton.language as tl"),
        ("optim/a.py", "from . import mfac"),
    ],
)
def test_a_wrong_import_is_found(path, source):
    assert list(violations(path, source))


def test_files_are_small_and_named_for_what_they_hold():
    files = [*SOURCES, *(ROOT / "scripts").glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    assert len(files) > 20
    long = {str(path.relative_to(ROOT)) for path in files if len(path.read_text().splitlines()) > 300}
    vague = {str(path) for path in files if path.stem in ("utils", "helpers", "common", "misc")}
    assert not long
    assert not vague
