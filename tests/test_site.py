"""The documentation site: it builds without a warning, and the API reference has every public name with an example."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import hatcl

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
for needed in ("mkdocs", "material", "mkdocstrings_handlers", "jupytext"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip("the site needs MkDocs; run: pip install -e '.[docs]'", allow_module_level=True)


def build(config: Path, into: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(into),
    ]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def loose(html: str) -> list[str]:
    """Rows and list items that stand in a paragraph: a blank line is missing before them, or stands within a table."""
    article = re.sub(r"<pre.*?</pre>", "", html, flags=re.S)
    return re.findall(r"<p>[^<]*\n(?:- |\d+\. |\| )[^\n]*|<p>\| [^\n]*", article)


def test_it_builds_without_a_warning_and_is_whole(tmp_path):
    """One test, so that the site is built once, also where tests run in several processes."""
    done = build(ROOT / "mkdocs.yml", tmp_path)
    assert done.returncode == 0, done.stderr
    pages = {path.parent.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("index.html")}
    assert {"api/learning", "examples/certify", "tutorials/1_five_tasks", "changelog"} <= pages.keys()
    assert not {page: rows for page, html in pages.items() if (rows := loose(html))}
    # links out of the folder lead to pages of the site
    assert all(f'href="{there}"' in pages["."] for there in ("hat/", "examples/", "LICENSE"))
    assert 'href="../examples/own_rule/"' in pages["architecture"]
    # each parameter of a docstring has its own entry
    for name in ("revision", "token", "cache_dir", "local_files_only", "force_download"):
        assert re.search(rf"<b>{name}</b>|<code>{name}</code>", pages["api/learning"]), name


def test_loose_rows_and_items_are_seen():
    assert loose("<p>text\n- item</p>") and loose("<p>| a | b |</p>") and not loose("<p>|x| is clamped</p>")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[there](nowhere.md)", "'nowhere.md', but the target is not found"),
        ("[there](#no-heading)", "there is no such anchor"),
        ("[there](/hat.md)", "absolute link"),
        ("text", None),
    ],
)
def test_a_link_that_leads_nowhere_fails_the_build(tmp_path, text, said):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# A page\n\n{text}\n")
    config = f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: docs\nhooks: []\nplugins: []\nnav: [index.md]\n"
    (tmp_path / "mkdocs.yml").write_text(config)
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert (done.returncode == 0) is (said is None), done.stderr
    assert said is None or said in done.stderr


def test_the_reference_has_every_public_name_with_an_example():
    entries: list[str] = []
    for page in sorted((DOCS / "api").glob("*.md")):
        for entry in re.split(r"^::: ", page.read_text(), flags=re.M)[1:]:
            name = entry.split()[0].removeprefix("hatcl.")
            entries.append(name)
            (code,) = re.findall(r"^```py(?:thon)?\n(.*?)^```", entry, flags=re.M | re.S)
            assert code.strip(), name
    assert sorted(entries) == sorted(hatcl.__all__)


def test_docstrings_are_split_into_entries():
    text = """Sentence.

    Args:
        x, y: inputs and
            labels. seed: of the draws, note: not a name. Whole.
        rank: of both
    Raises:
        ConfigError: a rank. OSError: the disk
        is full.

    Args: in a sentence stays.
    """
    assert script("docstrings").one_a_line(text, ["x", "y", "seed", "rank"]).rstrip().split("\n") == [
        "Sentence.",
        "",
        "Args:",
        "    x: inputs and labels.",
        "    y: inputs and labels.",
        "    seed: of the draws, note: not a name. Whole.",
        "    rank: of both",
        "",
        "Raises:",
        "    ConfigError: a rank.",
        "    OSError: the disk is full.",
        "",
        "Args: in a sentence stays.",
    ]


@pytest.mark.parametrize("source", sorted((DOCS / "tutorials").glob("*.py")), ids=lambda path: path.stem)
def test_a_tutorial_is_what_its_notebook_says(source):
    """`tests/test_examples.py` runs the page's code, which is the notebook's."""
    import jupytext

    shown = source.with_suffix(".md").read_text()
    without = re.sub(r"\n\n```text\n.*?^```$", "", shown, flags=re.M | re.S)
    assert without == script("notebooks").page(jupytext.read(source), source), "run: python docs/notebooks.py"
    assert without.count("```python") > 3 and without != shown


def test_there_are_five_tutorials_and_twenty_questions():
    assert len(list((DOCS / "tutorials").glob("*.py"))) == 5
    assert len(re.findall(r"^\*\*", (DOCS / "faq.md").read_text(), flags=re.M)) == 20
