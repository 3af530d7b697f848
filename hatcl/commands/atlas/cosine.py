"""`hatcl atlas cosine`: cosines between task vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ... import atlas
from ...atlas.files import read_vector
from ...errors import ConfigError
from ...files import write_files
from ...report.heatmap import draw_cosines
from ...report.tables import number_table
from ...vectors.parameters import parameters_of
from ...vectors.tensors import named_tensors
from .._command import command
from .._console import out, say


@command("atlas cosine")
def cosine(
    vectors: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]PATH...", help="Saved task vectors; with --base also checkpoints and adapters."),
    ],
    base: Annotated[
        Path | None, typer.Option(help="The pretrained checkpoint that the checkpoints were fine-tuned from.")
    ] = None,
    without: Annotated[list[str] | None, typer.Option(help="A module to leave out, such as head; repeatable.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the matrix into this PNG.")] = None,
) -> dict[str, Any]:
    """Show the cosines between task vectors; 0 = they change the model in unrelated ways."""
    named = [text.partition("=") if "=" in text and not Path(text).exists() else ("", "", text) for text in vectors]
    paths = {name or Path(path).stem: Path(path) for name, _, path in named}
    if len(paths) < len(vectors):
        raise ConfigError("vectors: two have the same name; write NAME=PATH")
    ours = None if base is None else parameters_of(named_tensors(base))
    read = [read_vector(path, ours, without=without or ()) for path in paths.values()]
    with out.status("comparing"):
        matrix = atlas.cosines(read).tolist()
    out.print(number_table("cosines between task vectors", list(paths), list(paths), matrix))
    if picture is not None:
        write_files({picture: draw_cosines(matrix, list(paths))})
        say(picture, "dim")
    return {"vectors": list(paths), "cosines": matrix}
