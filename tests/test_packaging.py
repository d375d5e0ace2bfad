"""The wheel holds the whole package and nothing else; the version stands in one place and in the list of changes."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import hf_efcp

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the wheel and the source distribution of a copy."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "hf_efcp", copy / "hf_efcp", ignore=shutil.ignore_patterns("__pycache__"))
    program = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"
    done = subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return copy / "dist"


@pytest.fixture(scope="module")
def wheel(built):
    """The names in the wheel, and its metadata."""
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        files = {name.removeprefix(f"{info}/"): archive.read(name) for name in names if name.startswith(info)}
    return names, files


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    names, files = wheel
    package = {path for path in (ROOT / "hf_efcp").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path.relative_to(ROOT).as_posix() for path in package} == {n for n in names if n.startswith("hf_efcp/")}
    assert "licenses/LICENSE" in files


def test_the_wheel_says_what_it_is(wheel):
    _, files = wheel
    metadata = message_from_bytes(files["METADATA"])
    assert metadata["Version"] == hf_efcp.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"cpu", "hf", "dev"} <= set(metadata.get_all("Provides-Extra"))
    assert b"hf-efcp = hf_efcp.cli:main" in files["entry_points.txt"]


def test_the_source_distribution_builds_the_same(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "hf_efcp/py.typed", "hf_efcp/CHANGELOG.md"} <= names


def test_the_wheel_alone_runs_the_launcher(built, tmp_path):
    """Unpacked where nothing else of this repository is."""
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    (tmp_path / "train.py").write_text("import hf_efcp, sys; print(hf_efcp.__file__, sys.argv[1:])")
    done = subprocess.run(
        [sys.executable, "-m", "hf_efcp.run", "train.py", "--optim", "efcp_mfac"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'hf_efcp' / '__init__.py'} ['--optim', 'efcp_mfac']\n"


def test_the_version_has_its_changes():
    text = (ROOT / "hf_efcp" / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)$", text, re.MULTILINE)[0] == hf_efcp.__version__
