"""The wheel: it holds the package and nothing else, and in a fresh environment it does the main job."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import hatcl

ROOT = Path(__file__).parents[1]
SOURCES = ("hatcl", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "CITATION.cff")


def build(work: Path, *options: str) -> Path:
    """Build a copy of the sources, so that what lies in `build/` here cannot get into the wheel."""
    pytest.importorskip("build", reason="needs build; run: pip install -e '.[dev]'")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, work / name)
    command = [sys.executable, "-m", "build", *options, "--outdir", str(work / "dist"), str(work)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=work)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return work / "dist"


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    return build(tmp_path_factory.mktemp("sources"), "--no-isolation", "--skip-dependency-check")


def test_the_wheel_holds_the_package_and_nothing_else(dist):
    (wheel,) = dist.glob("*.whl")
    assert wheel.name == f"hatcl-{hatcl.__version__}-py3-none-any.whl"
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "hatcl").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == package and {"hatcl/py.typed", "hatcl/zoo/known.json"} <= held
    assert wheel.stat().st_size < 2_000_000


def test_the_wheel_says_what_it_is(dist):
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as held:
        (about,) = (held.read(name).decode() for name in held.namelist() if name.endswith("METADATA"))
        (entries,) = (held.read(name).decode() for name in held.namelist() if name.endswith("entry_points.txt"))
        assert any(name.endswith("LICENSE") for name in held.namelist())
    assert "hatcl = hatcl.commands:main" in entries
    assert f"\nVersion: {hatcl.__version__}\n" in about and "Requires-Python: >=3.10" in about
    extras = re.findall(r"^Provides-Extra: (\w+)$", about, flags=re.M)
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "install.md").read_text(), flags=re.M)
    assert sorted(extras) == sorted(rows), "docs/install.md lists the extras"


def test_the_source_archive_holds_what_the_wheel_is_built_from(dist):
    (archive,) = dist.glob("*.tar.gz")
    names = {name.split("/", 1)[1] for name in tarfile.open(archive).getnames() if "/" in name}
    assert {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "hatcl/zoo/known.json", "hatcl/py.typed"} <= names


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.stem)
def test_forms_for_issues_can_be_read(path):
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        return
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids)) and all(field["attributes"]["label"] for field in form["body"])


@pytest.mark.slow
def test_in_a_fresh_environment_it_does_the_main_job(tmp_path):
    """As a stranger would: `python -m build`, a new environment, the wheel with what README names, `hatcl train`."""
    work = tmp_path / "sources"
    work.mkdir()
    (wheel,) = build(work).glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run([python, "-m", "pip", "install", "-q", f"{wheel}[data,plots]"], check=True, env=outside)

    def hatcl_says(*line: str) -> str:
        command = [str(python.with_name("hatcl")), *line]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=outside).stdout

    assert f"hatcl: {hatcl.__version__}\n" in hatcl_says("--version", "--verbose")
    assert "bit-equal" in hatcl_says("train", "--output", "run")
    where = "import hatcl; print(hatcl.__file__)"
    found = subprocess.run([python, "-c", where], check=True, capture_output=True, text=True, cwd=tmp_path, env=outside)
    assert str(tmp_path / "venv") in found.stdout
