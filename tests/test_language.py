"""Turns of phrase that strangers found hard to read stay out of the pages, of docstrings, comments and messages."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PHRASES = re.compile(r"\b(?:is of|speaks of|is told|goes on|beside|anew)\b")
# in programs also their other forms; `beside:` is the name of an argument
IN_PROGRAMS = re.compile(r"\b(?:is of|speaks? of|is told|go(?:es)? on|beside(?!:)|anew|of whom)\b", flags=re.I)
# a sentence that opens with "What" and is no question: its subject is a riddle until the verb comes
OPENING = re.compile(r"(?:^|(?<=[.!?] )|(?<=\n\n)|(?<=\n- )|(?<=\| ))What (?![^.?|]*\?)[^.|]*[.|:]", flags=re.M)
# a docstring or a comment that opens so, whether it is a sentence or not
FIRST = re.compile(r"^\W*What\b(?![^?]*\?)")
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


def texts_of(source: str) -> Iterator[tuple[int, str, re.Pattern]]:
    """Line and text of every docstring, comment and other text of several words, each with how it must not open."""
    tree = ast.parse(source)
    defined = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = [n.body[0].value for n in ast.walk(tree) if isinstance(n, defined) and ast.get_docstring(n) is not None]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value, FIRST if node in docs else OPENING
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string, FIRST


def wrong_in(source: str) -> list[tuple[int, list[str]]]:
    if not (IN_PROGRAMS.search(source) or re.search(r"\bWhat\b", source)):
        return []  # nothing that would have to be told apart from names: most files, at no cost
    texts = ((line, CODE.sub("", text), text, opening) for line, text, opening in texts_of(source))
    hits = (
        (n, IN_PROGRAMS.findall(plain) + [m[0] for m in opening.finditer(text)]) for n, plain, text, opening in texts
    )
    return [(line, wrong) for line, wrong in hits if wrong]


@pytest.mark.parametrize("room", ["hatcl", "benchmarks", "examples"])
def test_docstrings_comments_and_messages(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    assert not {str(path.relative_to(ROOT)): wrong for path in files if (wrong := wrong_in(path.read_text()))}


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


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('def f():\n    """What it gives."""', 1),
        ('def f():\n    """It gives `what goes on`."""', 0),
        ('raise ValueError(f"{x} is told to go on")', 2),
        ('option(help="What one may take.")', 1),
        ('option(title="What it was made with")', 0),
        ("x = 1  # stands Beside another", 1),
        ("# What stays", 1),
        ("# does it stay? What else?", 0),
        ("beside = anew = goes_on = 1", 0),
        ('def f(beside):\n    """Args:\n        beside: further modules.\n    """', 0),
    ],
)
def test_the_reader_of_programs_finds_them(source, count):
    assert sum(len(hits) for _, hits in wrong_in(source)) == count
