"""docs/coming_from.md: the commands, options, values and names that its tables call hatcl's are there."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from hatcl import commands
from hatcl.continual import list_continual_methods, make_method
from hatcl.finetuning.modes.registry import list_finetune_modes
from hatcl.grafts.options import GAMMAS, LOGIT_RULES, SIZES

PAGE = Path(__file__).parents[1] / "docs" / "coming_from.md"
VALUES = {  # of options whose values are names
    "--method": set(list_continual_methods()),
    "--mode": set(list_finetune_modes()),
    "--objective": {"ufm", "entropy"},
    "--head": {"text", "trained", "prototypes"},
    "--warm-start": {"search", "isotropic"},
    "--rule": set(LOGIT_RULES),
    "--gamma": set(GAMMAS),
    "--size": set(SIZES),
}


def rows(text: str) -> list[list[str]]:
    """The cells of every row of every table, without heads."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in cells if row[0] != "there"]


def spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


ROWS = rows(PAGE.read_text())
GROUP: Any = typer.main.get_command(commands.app())


def wrong_command(text: str) -> str | None:
    """What is wrong with `hatcl COMMAND --option [value] ...`."""
    words = shlex.split(text)[1:]
    at: Any = GROUP
    while words and not words[0].startswith("-"):
        if words[0] not in getattr(at, "commands", {}):
            return f"no command {words[0]!r}"
        at = at.commands[words.pop(0)]
    if hasattr(at, "commands"):
        return "a group, not a command"
    known = {flag for p in at.params for flag in (*p.opts, *p.secondary_opts)}
    method = words[words.index("--method") + 1] if "--method" in words and len(words) > 1 else None
    option = None
    for word in words:
        if word.startswith("--"):
            option = word
            if word not in known:
                return f"no option {word}"
        elif option == "--set":
            key, _, value = word.partition("=")
            try:
                make_method(str(method), {key: ast.literal_eval(value) if value[:1] in "(0123456789" else value})
            except Exception as error:
                return str(error)
        elif option is None or (option in VALUES and word not in VALUES[option]):
            return f"{word!r} is no value of {option}"
    return None


def wrong_name(text: str) -> str | None:
    """What is wrong with `hatcl.some.name`, or with the keywords of `hatcl.some.name(key=value)`."""
    path, _, arguments = text.partition("(")
    parts = path.split(".")
    found: Any = None
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ImportError:
            continue
        for name in parts[i:]:
            if not hasattr(found, name):
                return f"{path}: no {name}"
            found = getattr(found, name)
        break
    if found is None:
        return f"{path}: no such module"
    if arguments:
        call = ast.parse(text, mode="eval").body
        known = inspect.signature(found).parameters
        return next((f"{path} takes no {k.arg}" for k in call.keywords if k.arg not in known), None)  # type: ignore
    return None


def wrong(text: str) -> str | None:
    return wrong_command(text) if text.startswith("hatcl ") else wrong_name(text)


def test_every_table_is_whole():
    assert len(ROWS) > 150 and all(len(row) == 3 and row[0] and row[1] for row in ROWS)
    firsts = [(i, row[0]) for i, row in enumerate(ROWS)]
    assert len({first for _, first in firsts}) > 0.95 * len(firsts)  # few names are in two tables


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_what_is_called_hatcls_is_there(row):
    there, ours, note = row
    named = spans(ours)
    assert named or ours.startswith("none"), f"{ours!r} names nothing; say none"
    for text in named:
        assert text.startswith(("hatcl ", "hatcl.")), f"{text!r} in the middle column is not of hatcl"
    for text in [*named, *(s for s in spans(note) if re.match(r"hatcl[ .][a-z]", s))]:
        if not text.startswith("hatcl merge BASE"):
            assert wrong(text) is None, f"{text}: {wrong(text)}"


@pytest.mark.parametrize(
    "text",
    [
        "hatcl atlas ad", "hatcl atlas", "hatcl train --methd", "hatcl train --method tsl",
        "hatcl train --method tasl --set beta3=1", "hatcl graft --rule plane", "hatcl.forgt_task", "hatcl.atlas.ad",
        "hatcl.HATConfig(inits='dense')", "hatcl.Learning.penalti", "hatcl train stray",
    ],
)  # fmt: skip
def test_the_reader_sees_what_is_not_there(text):
    assert wrong(text) is not None


def test_links_lead_somewhere():
    text = PAGE.read_text()
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        page = PAGE.with_name(file) if file else PAGE
        assert page.exists(), target
        heads = {
            re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
            for h in re.findall(r"^#+ (.*)$", page.read_text(), re.M)
        }
        assert not anchor or anchor in heads, target
