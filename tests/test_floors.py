"""The house of docs/architecture.md: a file imports only from lower floors, from its own room, or from rooms that stand
before it on its floor (so that there can be no circle)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hatcl"
FLOORS = [
    ["errors", "config", "files", "functional", "calls", "lend", "shards", "sources"],
    ["map"],
    ["vectors", "keeper"],
    ["hat", "skills", "grafts"],
    ["data", "engine"],
    ["integrations", "atlas", "continual", "finetuning", "zoo", "report"],
    ["__init__", "commands", "__main__"],
]
ROOMS = [room for floor in FLOORS for room in floor]
# who may know these libraries; everything else works with plain torch
GUESTS = {
    "timm": [
        "integrations/timm_names.py",
        "finetuning/loading.py",
        "hat/layers",
        "engine/schedule.py",
        "engine/options.py",
        "zoo",
        "commands",
    ],
    "transformers": ["integrations", "finetuning", "hat/layers", "skills", "zoo", "commands"],
    "peft": ["integrations", "skills", "vectors/adapters.py", "commands"],
    "lightning": ["integrations"],
    "avalanche": ["integrations"],
    "matplotlib": ["report/calibration.py", "report/picture.py", "report/heatmap.py"],
    "sklearn": ["data/images.py"],
    "torchvision": ["data/images.py", "zoo"],
    "typer": ["commands"],
    "rich": ["commands", "report/tables.py"],
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> list[tuple[int, str]]:
    """Line and absolute dotted name of everything a file imports, also inside functions."""
    package = ["hatcl", *path.relative_to(PACKAGE).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from .. import keeper` imports a room, `from ..keeper import Keeper` a name
            found += [(node.lineno, f"{module}.{alias.name}" if module == "hatcl" else module) for alias in node.names]
    return found


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def test_every_file_has_a_floor():
    unknown = sorted({room_of(path) for path in FILES} - set(ROOMS))
    assert not unknown, f"give these a floor in tests/test_floors.py and docs/architecture.md: {unknown}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = room_of(path)
    wrong = []
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] != "hatcl":
            continue
        there = parts[1] if len(parts) > 1 and parts[1] in ROOMS else "__init__"
        own_room = there == here and (PACKAGE / here).is_dir()
        if not own_room and ROOMS.index(there) >= ROOMS.index(here):
            wrong.append(f"line {line}: {here} imports {name}, which does not stand below or before it")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_guests_stay_in_their_rooms(path):
    here = path.relative_to(PACKAGE).as_posix()
    wrong = []
    for line, name in imports(path):
        rooms = GUESTS.get(name.split(".")[0])
        if rooms is not None and not any(here == room or here.startswith(room + "/") for room in rooms):
            wrong.append(f"line {line}: {name} belongs to {', '.join(rooms)}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_library_does_not_print(path):
    if room_of(path) in ("commands", "__main__"):
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    lines = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert not lines, f"prints on lines {lines}; use logging"


def test_the_reader_of_imports_sees_them_all():
    code = "import timm.models\nfrom hatcl.map import trace\ndef f():\n    from .. import keeper\n    from . import x\n"
    path = PACKAGE / "hat" / "imaginary.py"
    fake = type(
        "File", (), {"read_text": lambda self: code, "relative_to": lambda self, other: path.relative_to(other)}
    )
    assert [name for _, name in imports(fake())] == ["timm.models", "hatcl.map", "hatcl.keeper", "hatcl.hat"]
