"""`hatcl atlas adapt`: test-time adaptation."""

from __future__ import annotations

import functools
from typing import Annotated, Any

import typer

from ... import atlas
from ...atlas import adaptation
from ...atlas.adaptation import ADAPTED_BY
from ...atlas.experiment import Experiment, Writing
from ...atlas.loading import Reading
from ...config import one_of
from ...errors import ConfigError
from .._command import Asked, command
from .._pages import atlas_page
from ._learning import TASK, Base, DataFile, Vectors, learned, show_learned, vector_paths


@command("atlas adapt", show=show_learned, page=atlas_page)
def adapt_command(
    asked: Asked, base: Base, vector: Vectors, data: DataFile,
    images: Annotated[
        str, typer.Option(help="Which images to learn from, without their labels: test, or training.")
    ] = "test",
    objective: Annotated[
        str, typer.Option(help="ufm (unsupervised FixMatch), or entropy of the predictions, for comparison.")
    ] = "ufm",
    per_class: Annotated[
        int | None, typer.Option(help="Images trusted per class; by default a tenth of images / classes, to 100.")
    ] = None,
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Mirror images in the strong view.")] = True,
    *, reading: Reading, writing: Writing, learning: atlas.AtlasOptions = adaptation.ADAPTATION,
) -> dict[str, Any]:  # fmt: skip
    """Adapt at test time: learn coefficients from images without labels.

    Labels of the training images fit the head; labels of the test images are used only in the report.
    """
    paths = vector_paths(asked, vector)
    one_of("--images", images, ("test", "training"))
    one_of("--objective", objective, ADAPTED_BY)
    if objective != "ufm" and not flip:
        raise ConfigError(f"--no-flip: has no effect with --objective {objective}, which makes no views; leave it out")

    def work(run: Experiment) -> None:
        run.fit_heads()
        strong = functools.partial(atlas.random_crops, flip=flip) if objective == "ufm" else None
        run.learn(
            lambda composed, **how: atlas.adapt(
                composed, run.parts[TASK][images], head=run.heads[TASK], strong=strong, per_class=per_class,
                batch_size=reading.batch_size, objective=objective, options=learning, **how,
            )
        )  # fmt: skip
        run.measure("pretrained", 0.0)
        run.measure("composed")

    return learned(asked, reading, writing, learning, paths, {TASK: data}, work)
