"""The wheel holds the whole package and nothing else; the version stands in one place and in the list of changes."""

import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import hf_efcp

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names in a wheel that is built of a copy, and its metadata."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "hf_efcp", copy / "hf_efcp", ignore=shutil.ignore_patterns("__pycache__"))
    program = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (path,) = (copy / "dist").glob("*.whl")
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


def test_the_version_has_its_changes():
    text = (ROOT / "hf_efcp" / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)$", text, re.MULTILINE)[0] == hf_efcp.__version__
