"""`hatcl atlas sweep`: accuracy against one coefficient."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ... import atlas
from ...atlas.experiment import Loaded
from ...atlas.loading import Reading
from ...config import one_of
from ...errors import ConfigError
from ...files import write_files
from ...report.heatmap import draw_sweep
from ...report.tables import number_table
from ...vectors.compose import Composer
from .._command import command
from .._console import Bar, out, say
from ._learning import Base, TaskSpecs, here, task_specs


@command("atlas sweep")
def sweep_command(
    base: Base, task: TaskSpecs,
    first: Annotated[float, typer.Option("--from", help="The first coefficient.")] = -1.0,
    last: Annotated[float, typer.Option("--to", help="The last coefficient.")] = 1.5,
    count: Annotated[int, typer.Option(help="How many coefficients, evenly spaced.")] = 11,
    part: Annotated[str, typer.Option(help="Which images: validation or test.")] = "validation",
    seed: Annotated[int, typer.Option(help="Seed that draws the held-out images.")] = 0,
    picture: Annotated[Path | None, typer.Option(help="Draw the curves into this PNG.")] = None,
    *, reading: Reading,
) -> dict[str, Any]:  # fmt: skip
    """Show each task's accuracy against the coefficient of its own task vector, which is the same for all blocks."""
    specs = task_specs("--task", task)
    one_of("--part", part, ("validation", "test"))
    if count < 1 or not first <= last:
        raise ConfigError(
            f"--from {first} --to {last} --count {count}: expected at least one coefficient, in ascending order"
        )
    scales = torch.linspace(first, last, count, dtype=torch.float64).tolist()
    loaded = Loaded(here(reading), seed)
    loaded.read(
        {s.name: s.vector for s in specs}, {s.name: s.data for s in specs}, needs_validation=part == "validation"
    )
    loaded.fit_heads()
    rows: list[list[float]] = []
    with Bar(len(specs) * count, "coefficients") as bar:
        for s, one in zip(specs, loaded.vectors, strict=True):
            bar.says(s.name)
            composer = loaded.compose("global", [one])
            batches = loaded.parts[s.name][part].batches(reading.batch_size)

            def measure(composer: Composer = composer, batches: Any = batches, name: str = s.name) -> float:
                bar.advance()
                return atlas.accuracy(composer, batches, loaded.heads[name])

            rows += atlas.sweep(composer, scales, measure).tolist()
    shown = [[100 * value for value in row] for row in zip(*rows, strict=True)]
    names = [s.name for s in specs]
    title = f"accuracy in % on {part} images, by coefficient"
    out.print(number_table(title, [f"{x:g}" for x in scales], names, shown, digits=1))
    if picture is not None:
        write_files({picture: draw_sweep(scales, rows, names)})
        say(picture, "dim")
    return {"part": part, "coefficients": scales, "accuracy": dict(zip(names, rows, strict=True))}
