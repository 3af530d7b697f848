"""The house of docs/architecture.md: a file imports only from lower floors, from its own room, or from rooms that stand
before it on its floor (so that there can be no circle); its errors are hatcl's own, and one name has one meaning."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hatcl"
_spec = importlib.util.spec_from_file_location("house", ROOT / "docs" / "house.py")  # which prints what is tested here
house = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(house)
FLOORS = [
    ["errors", "config", "files", "functional", "calls", "lend", "shards", "sources"],
    ["map"],
    ["vectors", "keeper"],
    ["hat", "skills", "grafts"],
    ["engine", "data"],
    ["integrations", "atlas", "continual", "finetuning", "zoo", "report"],
    ["__init__", "commands", "__main__"],
]
ROOMS = [room for floor in FLOORS for room in floor]
# who may know these libraries; everything else works with plain torch
GUESTS = {
    "timm": [
        "atlas/loading.py",
        "integrations/timm_names.py",
        "finetuning/loading.py",
        "hat/layers",
        "engine/schedule.py",
        "engine/options.py",
        "continual/images.py",
        "zoo",
        "commands",
    ],
    "transformers": ["integrations", "finetuning", "hat/layers", "skills", "zoo", "continual/loading.py"],
    "peft": ["integrations", "skills", "vectors/adapters.py", "continual/loading.py"],
    "lightning": ["integrations"],
    "avalanche": ["integrations"],
    "matplotlib": ["report/calibration.py", "report/picture.py", "report/heatmap.py"],
    "sklearn": ["data/images.py"],
    "torchvision": ["data/images.py", "data/photos.py", "data/datasets.py", "zoo"],
    "open_clip": ["integrations"],
    "datasets": ["data/records.py"],
    "pyarrow": ["data/records.py"],
    "typer": ["commands"],
    "rich": ["commands", "report/tables.py"],
}
# files of one room that import each other -> why that cannot be otherwise
CIRCLES: dict[tuple[str, ...], str] = {}
# what is raised beside HATError's kinds -> why. None: wherever it is raised
RAISED: dict[tuple[str | None, str], str] = {
    ("commands", "typer.Exit"): "typer's own way to end a command",
    ("commands", "SystemExit"): "the command line ends",
    ("commands/_command.py", "Stopped"): "Ctrl-C; the roof prints its word and ends",
    ("continual/methods/replay.py", "IndexError"): "an IntegrityError where it is caught",
    ("continual/methods/replay.py", "ValueError"): "an IntegrityError where it is caught",
    ("engine/loop.py", "NotImplementedError"): "a method that each procedure has",
    ("data/batches.py", "TypeError"): "what Python's len() raises of an object without a length",
    ("files.py", "IsADirectoryError"): "what the system would raise; an IntegrityError where it is caught",
    ("hat/distributed.py", "failed"): "what this process failed with, once all processes know",
    ("hat/layers/norm.py", "NotImplementedError"): "a method that each norm has",
    ("hat/layers/state.py", "AttributeError"): "an attribute that is not there",
    ("integrations/timm_names.py", "KeyError"): "a mapping without that key",
    ("skills/trainer.py", "NotImplementedError"): "a method that each subclass has",
    ("vectors/tensors.py", "KeyError"): "a mapping without that key",
    ("zoo/proof.py", "ProofFailed"): "a finding about a model, which the zoo catches and writes down",
}
FILES = house.files(PACKAGE)


def imports(path: Path) -> list[tuple[int, str]]:
    """Line and absolute dotted name of everything a file imports, also inside functions."""
    # `from .. import keeper` imports a room, `from ..keeper import Keeper` a name
    found = house.imports(PACKAGE, path)
    return [(i.line, f"{i.module}.{i.name}" if i.module == "hatcl" and i.name else i.module) for i in found]


def room_of(path: Path) -> str:
    return house.room_of(PACKAGE, path)


def test_every_file_has_a_floor():
    unknown = sorted({room_of(path) for path in FILES} - set(ROOMS))
    assert not unknown, f"give these a floor in tests/test_floors.py and docs/architecture.md: {unknown}"


def named(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_imports_go_down():
    wrong = []
    for path in FILES:
        here = room_of(path)
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] != "hatcl":
                continue
            there = parts[1] if len(parts) > 1 and parts[1] in ROOMS else "__init__"
            own_room = there == here and (PACKAGE / here).is_dir()
            if not own_room and ROOMS.index(there) >= ROOMS.index(here):
                wrong.append(f"{named(path)}:{line}: {here} imports {name}, which does not stand below or before it")
    assert not wrong, "\n".join(wrong)


def test_guests_stay_in_their_rooms():
    wrong = []
    for path in FILES:
        here = named(path)
        for line, name in imports(path):
            rooms = GUESTS.get(name.split(".")[0])
            if rooms is not None and not any(here == room or here.startswith(room + "/") for room in rooms):
                wrong.append(f"{here}:{line}: {name} belongs to {', '.join(rooms)}")
    assert not wrong, "\n".join(wrong)


def test_the_library_does_not_print():
    calls = [
        (path, node)
        for path in FILES
        if room_of(path) not in ("commands", "__main__")
        for node in ast.walk(house.tree(path))
        if isinstance(node, ast.Call)
    ]
    lines = [f"{named(p)}:{c.lineno}" for p, c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
    assert not lines, f"these print: {lines}; use logging"


def test_files_of_a_room_stand_in_order():
    found = {tuple(ring) for ring in house.circles(PACKAGE)}
    assert not found - CIRCLES.keys(), "these import each other: move what both need into a third file"
    assert not CIRCLES.keys() - found, "these no longer do; take them off the list"


@pytest.mark.parametrize("name", [entry.removesuffix(".py") for entry in house.entries(PACKAGE)])
def test_what_lies_at_the_top_is_what_its_name_gives(name):
    """`import hatcl.certify` gave a function, since a file of that name lay beside the function of that name."""
    if name in ("__init__", "__main__", "py.typed"):
        return
    module = importlib.import_module(f"hatcl.{name}")
    assert getattr(sys.modules["hatcl"], name) is module


def test_no_file_is_hidden_by_what_is_in_it():
    """Or `import hatcl.grafts.hold` would give a function."""
    hidden = set()
    for path in FILES:
        parts = ["hatcl", *path.relative_to(PACKAGE).with_suffix("").parts]
        *parents, name = parts[:-1] if parts[-1] == "__init__" else parts
        package = importlib.import_module(".".join(parents)) if parents else importlib
        if not isinstance(vars(package).get(name, package), ModuleType):
            hidden.add(".".join([*parents[1:], name]))
    assert not hidden


def raised(path: Path) -> list[tuple[int, str]]:
    """Line and name of everything that a file raises by name."""
    found = []
    for node in ast.walk(house.tree(path)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            found.append((node.lineno, ast.unparse(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)))
    return found


def kinds_of_hat_error() -> set[str]:
    kinds = {"HATError"}
    classes = [node for _, _, node in house.definitions(PACKAGE) if isinstance(node, ast.ClassDef)]
    while more := {c.name for c in classes if {ast.unparse(base) for base in c.bases} & kinds} - kinds:
        kinds |= more
    return kinds


def allowed(path: Path, name: str) -> tuple[str | None, str] | None:
    here = named(path)
    return next((key for key in RAISED if key[1] == name and here.startswith(key[0] or "")), None)


def test_errors_are_of_hatcls_kinds():
    kinds = kinds_of_hat_error()
    wrong = [
        f"{named(path)}:{n}: {name}"
        for path in FILES
        for n, name in raised(path)
        if name not in kinds and allowed(path, name) is None
    ]
    assert not wrong, "\n".join([*wrong, "raise a kind of HATError, with its cause and remedy"])


def test_every_other_error_that_is_allowed_is_raised():
    used = {allowed(path, name) for path in FILES for _, name in raised(path)}
    assert not RAISED.keys() - used, "nothing raises these any more; take them off the list"


def test_one_name_has_one_meaning():
    shared = {name: where for name, where in house.shared_names(PACKAGE).items() if name != "log"}  # a logger per file
    assert not shared, "\n".join(f"{name}: {', '.join(where)}" for name, where in shared.items())


def test_the_figures_of_the_house(capsys):
    house.main(ROOT)
    said = capsys.readouterr().out
    assert f"files: {len(FILES)}\n" in said and "entries at the top: " in said and "longest class: " in said


def test_the_reader_of_imports_sees_them_all():
    code = "import timm.models\nfrom hatcl.map import trace\ndef f():\n    from .. import keeper\n    from . import x\n"
    path = PACKAGE / "hat" / "imaginary.py"
    fake = type(
        "File", (), {"read_text": lambda self: code, "relative_to": lambda self, other: path.relative_to(other)}
    )
    assert [name for _, name in imports(fake())] == ["timm.models", "hatcl.map", "hatcl.keeper", "hatcl.hat"]


def test_the_readers_see_what_they_look_for(tmp_path):
    package = tmp_path / "made"
    (package / "room").mkdir(parents=True)
    for name, code in {
        "__init__.py": "from .room.a import A\n",
        "room/__init__.py": "",
        "room/a.py": "from .b import B\nA = 1\n\n\nclass Wrong(ValueError):\n    pass\n",
        "room/b.py": "def f():\n    from . import c\n\n\nB: int = 2\n",
        "room/c.py": "from ..room.a import A as first\nfrom . import b\n\n\ndef A():\n    raise ValueError\n",
        "room/d.py": "from .a import A\n",
    }.items():
        (package / name).write_text(code)
    assert house.circles(package) == [["room/a.py", "room/b.py", "room/c.py"]]
    assert house.arrows(package) == {("__init__", "room")}
    assert house.shared_names(package) == {"A": ["room/a.py", "room/c.py"]}
    assert house.entries(package) == ["__init__.py", "room"]
    assert raised(package / "room" / "c.py") == [(6, "ValueError")]
    assert "ValueError" not in kinds_of_hat_error() and {"ConfigError", "OutputError"} <= kinds_of_hat_error()
