"""`hatcl atlas negate`: unlearn a task."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ... import atlas
from ...atlas import negation
from ...atlas.experiment import Experiment, Writing
from ...atlas.loading import Reading
from ...config import number, one_of
from ...errors import ConfigError
from .._command import Asked, command
from .._pages import atlas_page
from ._learning import STARTS, Base, WarmStart, learned, show_learned, task_specs


@command("atlas negate", show=show_learned, page=atlas_page)
def negate_command(
    asked: Asked, base: Base,
    target: Annotated[
        str, typer.Option(metavar="NAME=VECTOR:DATA", help="The task to unlearn: its name, task vector and images.")
    ],
    control: Annotated[str, typer.Option(metavar="DATA", help="Images of the task to keep, in the form of "
                                                              "--target's.")],
    keep: Annotated[float, typer.Option(help="Share of the pretrained control accuracy that must remain.")] = 0.95,
    warm_start: WarmStart = "zero",
    *, reading: Reading, writing: Writing, learning: atlas.AtlasOptions = negation.NEGATION,
) -> dict[str, Any]:  # fmt: skip
    """Unlearn a task and keep another: find the lowest accuracy on the target at which the control keeps its own.

    It lowers accuracy on the images that it sees and proves nothing beyond that. As published, coefficients are learned
    and chosen on the held-out images; the test images are only reported.
    """
    (spec,) = task_specs("--target", [target])
    if spec.name == "control":
        raise ConfigError("--target: the name control belongs to --control; choose another")
    one_of("--warm-start", warm_start, STARTS)
    number("--keep", keep, 0, 1, what="a share")
    asked.options["target"] = str(spec)

    def work(run: Experiment) -> None:
        run.fit_heads()
        gone, stays = run.atlas_task(spec.name), run.atlas_task("control")
        run.learn(
            lambda composed, **how: atlas.negate(composed, gone, stays, keep=keep, options=learning, **how), warm_start
        )
        run.measure("pretrained", 0.0)
        run.measure("composed")

    return learned(
        asked, reading, writing, learning, {spec.name: spec.vector}, {spec.name: spec.data, "control": control}, work,
        needs_validation=True, stages=["isotropic"] * (warm_start == "isotropic"),
    )  # fmt: skip
