"""How the site reads docstrings: an extension of griffe that `mkdocs.yml` names.

In this package a line of a docstring may have several names (`rank: of every pair. base: the model it is from.`, or
`x, y: inputs and labels`), which reads well in the code. On the site each name gets a line of its own.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

NAME, KIND = r"[a-z_]\w*", r"[A-Z]\w*(?:Error|Warning)"


def one_a_line(text: str, parameters: list[str]) -> str:
    """A docstring in which each parameter, each attribute and each error has its own entry."""
    sections = {"Args:": "|".join(parameters) or NAME, "Attributes:": NAME, "Raises:": KIND, "Warns:": KIND}
    out: list[str] = []
    lines = inspect.cleandoc(text).split("\n")
    while lines:
        line = lines.pop(0)
        out.append(line)
        if line not in sections:
            continue
        body = ""
        while lines and (lines[0].startswith("    ") or not lines[0]):
            body += lines.pop(0).strip() + "\n"
        word = sections[line]
        for entry in re.split(rf"(?:(?<=[.?!]) |\n)(?=(?:{word})(?:, (?:{word}))*: )", body.strip()):
            called, colon, said = " ".join(entry.split()).partition(": ")
            out += [f"    {name}{colon}{said}" for name in (called.split(", ") if colon else [called])]
        out.append("")
    return "\n".join(out)


class OneALine(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        self._walk(pkg)

    def _walk(self, it: Any) -> None:
        for member in list(it.members.values()):
            if member.is_alias:
                continue
            if member.docstring is not None:
                fields = list(member.members) if member.is_class else []
                parameters = [p.name for p in getattr(member, "parameters", [])] + fields
                member.docstring.value = one_a_line(member.docstring.value, parameters)
            self._walk(member)
