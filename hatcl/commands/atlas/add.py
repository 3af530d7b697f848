"""`hatcl atlas add`: one model for several tasks."""

from __future__ import annotations

from typing import Any

from ... import atlas
from ...atlas import addition
from ...atlas.experiment import Experiment, Writing
from ...atlas.loading import Reading
from ...config import one_of
from .._command import Asked, command
from .._pages import atlas_page
from ._learning import STARTS, Base, TaskSpecs, WarmStart, learned, show_learned, task_specs


@command("atlas add", show=show_learned, page=atlas_page)
def add_command(
    asked: Asked, base: Base, task: TaskSpecs, warm_start: WarmStart = "zero",
    *, reading: Reading, writing: Writing, learning: atlas.AtlasOptions = addition.ADDITION,
) -> dict[str, Any]:  # fmt: skip
    """Make one model for several tasks: learn coefficients that minimise the sum of the tasks' losses.

    As published, coefficients are learned and chosen on the held-out images; the test images are only reported.
    """
    specs = task_specs("--task", task)
    one_of("--warm-start", warm_start, STARTS)
    asked.options["task"] = [str(s) for s in specs]

    def work(run: Experiment) -> None:
        run.fit_heads()
        tasks = [run.atlas_task(s.name) for s in specs]
        run.learn(lambda composed, **how: atlas.add(composed, tasks, options=learning, **how), warm_start)
        run.measure("pretrained", 0.0)
        for i, s in enumerate(specs):
            run.measure("fine-tuned", 1.0, vector=i, tasks=[s.name])
        run.measure("composed")

    return learned(
        asked, reading, writing, learning, {s.name: s.vector for s in specs}, {s.name: s.data for s in specs}, work,
        needs_validation=True, stages=["isotropic"] * (warm_start == "isotropic"),
    )  # fmt: skip
