"""The house in figures: rooms, files, lines, imports between rooms, what is longest, and what is there twice.

    python docs/house.py            # of this checkout
    python docs/house.py OTHER      # of the checkout in another folder, to compare with

It reads the code and imports nothing of it. `tests/test_floors.py` asks the same functions.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Import(NamedTuple):
    """One imported name: line, dotted module, and the name taken from it ("" where the module itself is)."""

    line: int
    module: str
    name: str


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def files(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def entries(package: Path) -> list[str]:
    """What lies at the package's top: its rooms and files."""
    hidden = [path for path in package.iterdir() if path.name.startswith((".", "__pycache__"))]
    return sorted(path.name for path in package.iterdir() if path not in hidden)


def room_of(package: Path, path: Path) -> str:
    return path.relative_to(package).parts[0].removesuffix(".py")


def imports(package: Path, path: Path) -> list[Import]:
    """Everything that a file imports, also inside functions, with absolute names."""
    here = [package.name, *path.relative_to(package).parts[:-1]]
    found: list[Import] = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [Import(node.lineno, module, alias.name) for alias in node.names]
    return found


def imported_files(package: Path, path: Path) -> set[Path]:
    """The files of the package that a file imports."""
    found: set[Path] = set()
    for _, module, name in imports(package, path):
        # `from .. import keeper` takes a file, `from ..keeper import Keeper` a name
        for dotted in (f"{module}.{name}", module):
            inside = package.parent.joinpath(*dotted.split("."))
            at = next((p for p in (inside.with_suffix(".py"), inside / "__init__.py") if p.is_file()), None)
            if at is not None and package in at.parents:
                found.add(at)
                break
    return found - {path}


def arrows(package: Path) -> set[tuple[str, str]]:
    """Which room imports which."""
    pairs = {(room_of(package, a), room_of(package, b)) for a in files(package) for b in imported_files(package, a)}
    return {(a, b) for a, b in pairs if a != b}


def circles(package: Path) -> list[list[str]]:
    """Files of one room that import each other, at their top or inside functions, however long the way round."""
    to = {path: {p for p in imported_files(package, path) if room_of(package, p) == room_of(package, path)}
          for path in files(package)}  # fmt: skip

    def reached(start: Path) -> set[Path]:
        seen: set[Path] = set()
        stack = list(to[start])
        while stack:
            at = stack.pop()
            if at not in seen:
                seen.add(at)
                stack += to[at]
        return seen

    reach = {path: reached(path) for path in to}
    rounds = {frozenset(p for p in reach[path] if path in reach[p]) for path in to if path in reach[path]}
    return sorted(sorted(p.relative_to(package).as_posix() for p in ring) for ring in rounds)


def definitions(package: Path) -> Iterator[tuple[Path, str, Definition]]:
    """Every class and function, methods with the name of their class."""
    for path in files(package):
        stack: list[tuple[str, ast.AST]] = [("", tree(path))]
        while stack:
            prefix, node = stack.pop()
            for child in ast.iter_child_nodes(node):
                if isinstance(child, Definition):
                    yield path, prefix + child.name, child
                    stack.append((f"{prefix}{child.name}.", child))
                else:
                    stack.append((prefix, child))


def names_of(path: Path) -> set[str]:
    """What a file defines at its top: functions, classes, constants, private ones too."""
    found: set[str] = set()
    for node in tree(path).body:
        if isinstance(node, Definition):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found - {"__all__"}


def shared_names(package: Path) -> dict[str, list[str]]:
    """Name -> the files that define it at their top, of names that more than one file defines."""
    known: dict[str, list[str]] = defaultdict(list)
    for path in files(package):
        for name in names_of(path):
            known[name].append(path.relative_to(package).as_posix())
    return {name: where for name, where in sorted(known.items()) if len(where) > 1}


def _longest(package: Path, kind: type | tuple[type, ...]) -> str:
    length, path, name = max(
        ((node.end_lineno or 0) - node.lineno + 1, path.relative_to(package).as_posix(), name)
        for path, name, node in definitions(package) if isinstance(node, kind)
    )  # fmt: skip
    return f"{length} lines, {name} in {path}"


def _calling(package: Path, *names: str) -> list[str]:
    """Functions that call all of these methods, whatever of, themselves."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for path, name, node in definitions(package):
        calls = {c.func.attr for c in ast.walk(node) if isinstance(c, ast.Call) and isinstance(c.func, ast.Attribute)}
        inner = any(isinstance(child, functions) for child in ast.walk(node) if child is not node)
        if isinstance(node, functions) and not inner and set(names) <= calls:
            found.append(f"{path.relative_to(package).as_posix()}:{name}")
    return found


def figures(package: Path) -> dict[str, str]:
    """What the house is counted by."""
    every = {path: len(path.read_text().splitlines()) for path in files(package)}
    longest = max(every, key=lambda path: every[path])
    classes = [(path, name) for path, name, node in definitions(package) if isinstance(node, ast.ClassDef)]
    shared, top = shared_names(package), entries(package)
    loops = _calling(package, "backward", "step")
    written = _calling(package, "save")
    return {
        "entries at the top": f"{len(top)} ({', '.join(top)})",
        "files": str(len(every)),
        "lines": f"{sum(every.values()):,}",
        "rooms that import one another": f"{len(arrows(package))} arrows",
        "import circles within a room": "; ".join(" <-> ".join(ring) for ring in circles(package)) or "none",
        "longest file": f"{every[longest]} lines, {longest.relative_to(package).as_posix()}",
        "longest class": _longest(package, ast.ClassDef),
        "longest function": _longest(package, (ast.FunctionDef, ast.AsyncFunctionDef)),
        "loops (functions that call backward() and step())": f"{len(loops)} ({', '.join(loops)})",
        "functions that call save()": f"{len(written)} ({', '.join(written)})",
        "option classes": _named(classes, "Options", "Config"),
        "Task classes": _named(classes, "Task"),
        "names that several files define": f"{len(shared)}, {sum(map(len, shared.values()))} definitions",
    }


def _named(classes: list[tuple[Path, str]], *endings: str) -> str:
    found = sorted(name for _, name in classes if name.endswith(endings))
    return f"{len(found)} ({', '.join(found)})"


def main(root: Path) -> None:
    package = root / "hatcl"
    for name, value in figures(package).items():
        print(f"{name}: {value}")
    for name, where in shared_names(package).items():
        print(f"  {name}: {', '.join(where)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT)
