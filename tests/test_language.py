"""Turns of phrase that strangers found hard to read stay out of the pages and of public docstrings."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import hatcl

ROOT = Path(__file__).parents[1]
PHRASES = re.compile(r"\b(?:is of|speaks of|is told|goes on|beside|anew)\b")
# a sentence that opens with "What" and is no question: its subject is a riddle until the verb comes
OPENING = re.compile(r"(?:^|(?<=[.!?] )|(?<=\n\n)|(?<=\n- )|(?<=\| ))What (?![^.?|]*\?)[^.|]*[.|:]", flags=re.M)
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", flags=re.M | re.S)
PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md"] + sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")
)
# the help of an option may be "What a long text loses": a phrase, not a sentence
NOT_SENTENCES = ("docs/commands.md",)


def found(text: str, openings: bool = True) -> list[str]:
    plain = CODE.sub("", text)
    return PHRASES.findall(plain) + [m[0] for m in OPENING.finditer(plain) if openings]


@pytest.mark.parametrize("page", PAGES)
def test_pages(page):
    assert not found((ROOT / page).read_text(), openings=page not in NOT_SENTENCES)


def docstrings(name: str) -> dict[str, str]:
    it = getattr(hatcl, name)
    texts = {name: inspect.getdoc(it) or ""}
    if inspect.isclass(it):
        own = {k: v for k, v in vars(it).items() if not k.startswith("_") and (callable(v) or isinstance(v, property))}
        texts |= {f"{name}.{k}": inspect.getdoc(v) or "" for k, v in own.items()}
    if isinstance(it, ModuleType):
        texts |= {f"{name}.{k}": inspect.getdoc(getattr(it, k)) or "" for k in it.__all__}
    return texts


@pytest.mark.parametrize("name", hatcl.__all__)
def test_public_docstrings(name):
    wrong = {where: hits for where, text in docstrings(name).items() if (hits := found(text, openings=False))}
    assert not wrong


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("A graft is of a model. Anew, it goes on.", 2),
        ("What is frozen stays.", 1),
        ("It ends. What is frozen stays.", 1),
        ("What is frozen? All of it. See what stays.", 0),
        ("`beside` is a name, and besides a word.", 0),
    ],
)
def test_the_reader_finds_them(text, count):
    assert len(found(text)) == count
