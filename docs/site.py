"""What the documentation site needs beyond the pages of this folder, as hooks of MkDocs (`mkdocs.yml` names this file).

README, CHANGELOG and the other pages at the top of the repository become pages of the site, each file of `examples/`
becomes a page, and links that lead out of this folder are turned to where the site has what they lead to. So every page
reads the same in the repository and on the site, and `mkdocs build --strict` checks every link.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
TOP = {"README.md": "index.md", **{f"{n}.md": f"{n.lower()}.md" for n in ("CHANGELOG", "CONTRIBUTING", "SECURITY")}}
PLACES = {**TOP, "examples": "examples/index.md", "docs/README.md": "index.md"}  # path in the repository -> on the site
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def example_page(path: Path) -> str:
    """An example as a page: its docstring, then its code."""
    code = path.read_text()
    said = ast.get_docstring(ast.parse(code)) or ""
    body = code.split('"""', 2)[2].lstrip("\n")
    return f"# {path.stem.replace('_', ' ').capitalize()}\n\n{said}\n\n```python\n{body}```\n"


def on_files(files: Any, config: Any) -> Any:
    for there, here in TOP.items():
        files.append(File.generated(config, here, content=(ROOT / there).read_text()))
    rows = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        files.append(File.generated(config, f"examples/{path.stem}.md", content=example_page(path)))
        PLACES[f"examples/{path.name}"] = f"examples/{path.stem}.md"
        said = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
        rows.append(f"- [{path.stem}]({path.stem}.md): {' '.join(said.split())}")
    index = "# Examples\n\nOne short file for each promise; the tests run them all.\n\n" + "\n".join(rows) + "\n"
    files.append(File.generated(config, "examples/index.md", content=index))
    for name in ("LICENSE", "CITATION.cff", "benchmarks/results/attacks.json"):
        files.append(File(name, str(ROOT), config["site_dir"], use_directory_urls=False))
        PLACES[name] = name
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    here = page.file.src_uri
    origin = next((there for there, site in TOP.items() if site == here), f"docs/{here}")

    def turned(match: re.Match[str]) -> str:
        there = posixpath.normpath(posixpath.join(posixpath.dirname(origin), match[1]))
        place = PLACES.get(there, there.removeprefix("docs/") if there.startswith("docs/") else None)
        if place is None:
            return match[0]  # which MkDocs then reports
        return f"]({posixpath.relpath(place, posixpath.dirname(here) or '.')}{match[2] or ''})"

    return LINK.sub(turned, markdown)
