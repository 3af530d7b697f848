"""Where the commands print: two consoles, a progress bar, and a switch that leaves only JSON."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

# without markup, names of tasks and folders are printed as they are
out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)


def say(text: object, style: str | None = None) -> None:
    """Print one message without line breaks, so that paths in it can be copied."""
    out.print(text, style=style, soft_wrap=True)


def plain(text: str) -> None:
    """Print text for pipes, regardless of the terminal's width."""
    if not out.quiet:
        print(text)


def fail(message: object) -> None:
    """Print an error message on the error stream."""
    err.print(Text.assemble(("error: ", "bold red"), (str(message), "red")), soft_wrap=True)


@contextlib.contextmanager
def quiet(on: bool) -> Iterator[None]:
    """Inside, print nothing but errors."""
    before, out.quiet = out.quiet, on
    try:
        yield
    finally:
        out.quiet = before


def print_json(content: Any) -> None:
    """Print a report as JSON on standard output. Numbers that are not finite become null."""
    print(json.dumps(_printable(content), indent=2, allow_nan=False))


def _printable(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {str(key): _printable(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_printable(value) for value in content]
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    return content if content is None or isinstance(content, (str, int)) else str(content)


def percent(value: float | None) -> str:
    """A share formatted for a table; a dot if it was not measured."""
    return "·" if value is None or math.isnan(value) else f"{100 * value:.1f}"


class Bar:
    """A progress bar on a terminal; elsewhere, and under --json, nothing.

    Args:
        total: the number of items, None = not known yet. unit: what is counted; `bytes` are shown as sizes.
    """

    def __init__(self, total: int | None, unit: str, text: str = "reading") -> None:
        counted = [DownloadColumn()] if unit == "bytes" else [MofNCompleteColumn(), TextColumn(unit, markup=False)]
        self.progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), *counted, TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=out, disable=out.quiet or not out.is_terminal,
        )  # fmt: skip
        self.bar = self.progress.add_task(text, total=total)

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def says(self, text: str, **at: Any) -> None:
        """Change the text, and with `completed=` and `total=` the position."""
        self.progress.update(self.bar, description=text, **at)

    def advance(self) -> None:
        """Count one more item as done."""
        self.progress.advance(self.bar)

    def line(self, text: str) -> None:
        """Print a line if there is no terminal to show the bar."""
        if not out.is_terminal:
            say(text)
