"""`hatcl methods`: list the ways to learn tasks one after another."""

from __future__ import annotations

import dataclasses
from typing import Any

from .. import continual
from ..config import HATConfig
from ._command import command
from ._console import say


@command("methods")
def methods() -> dict[str, Any]:
    """List the methods of hatcl train, with their options (for --set) and their sources."""
    found: dict[str, Any] = {}
    for name, kind in continual.list_continual_methods().items():
        options = HATConfig() if name == "hat" else kind().options
        summary = (kind.__doc__ or "").split(".")[0].split(";")[0].strip()
        found[name] = {"summary": summary, "paper": kind.paper, "options": dataclasses.asdict(options)}
        say(name, "bold")
        say(f"  {summary} ({kind.paper})")
        for option, value in found[name]["options"].items():
            say(f"    {option} = {value!r}")
    return found
