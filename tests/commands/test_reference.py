"""docs/commands.md: the page that docs/commands.py writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hatcl.commands import COMMANDS

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_what_the_commands_say():
    spec = importlib.util.spec_from_file_location("reference", DOCS / "commands.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    page = made.page()
    assert all(f"\n## hatcl {name}\n" in page for name in COMMANDS)
    assert (DOCS / "commands.md").read_text() == page, "run: python docs/commands.py"
