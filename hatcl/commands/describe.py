"""`hatcl describe`: the units of a model, and the tasks that use them."""

from __future__ import annotations

from typing import Any

import hatcl

from ..continual.folder import find_model
from ..report.tables import units_table
from ._command import RunArgument, command
from ._console import out, say


@command("describe")
def describe_command(run: RunArgument) -> dict[str, Any]:
    """Show the units of each layer, how they are shared, what each task uses, and how many are free."""
    found = hatcl.describe(hatcl.from_pretrained(find_model(run)))
    description = found.to_dict()
    out.print(units_table(description))
    elements = description["elements"]
    total = max(1, sum(elements.values()))
    shares = (f"{name.replace('_', ' ')} {100 * count / total:.1f} %" for name, count in elements.items())
    say(f"{total:,} elements: {', '.join(shares)}")
    say(str(found.room))
    for line in found.lineage_lines:
        say(line)
    return description
