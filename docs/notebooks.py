"""The tutorials are notebooks, kept as Python files (`jupytext`'s percent form) in `docs/tutorials/`.

    python docs/notebooks.py [NAME ...]                  # runs them, and writes the pages with what they print
    jupytext --to notebook docs/tutorials/*.py           # as files for Jupyter, which opens the Python files as well

A test compares the code and the words of the pages with the Python files, and runs them.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import jupytext

FOLDER = Path(__file__).parent / "tutorials"
LENGTH = 120  # seconds that a notebook may take


def page(notebook: Any, source: Path) -> str:
    """A notebook as a page: its words, its code, and what it printed where it was run."""
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        else:
            parts.append(f"```python\n{cell.source}\n```")
            told = [o.text for o in cell.get("outputs", []) if o.output_type == "stream" and o.name == "stdout"]
            parts += [f"```text\n{''.join(told).rstrip()}\n```"] if told else []
    title, *rest = parts[0].split("\n\n", 1)
    note = f"*[{source.name}]({source.name}) is this page as a notebook.*"
    return "\n\n".join([title, note, *rest, *parts[1:]]) + "\n"


def run(notebook: Any) -> None:
    """Run a notebook's cells in a kernel of its own, in a folder of its own."""
    from nbclient import NotebookClient

    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=LENGTH, resources={"metadata": {"path": folder}}).execute()


def main(names: list[str]) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for path in sorted(FOLDER.glob("*.py")):
        if not names or path.stem in names:
            notebook = jupytext.read(path)
            run(notebook)
            path.with_suffix(".md").write_text(page(notebook, path))
            print(path.stem)


if __name__ == "__main__":
    main(sys.argv[1:])
