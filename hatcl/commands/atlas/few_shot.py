"""`hatcl atlas few-shot`: a task from a few examples."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ... import atlas
from ...atlas import fewshot
from ...atlas.experiment import Experiment, Writing
from ...atlas.fitting import Fitted
from ...atlas.linear import Composed
from ...atlas.loading import FITTED_HEADS, Reading
from ...config import one_of, whole
from ...errors import ConfigError
from .._command import Asked, command
from .._pages import atlas_page
from ._learning import TASK, Base, DataFile, Vectors, learned, show_learned, vector_paths


@command("atlas few-shot", show=show_learned, page=atlas_page)
def few_shot_command(
    asked: Asked, base: Base, vector: Vectors, data: DataFile,
    shots: Annotated[
        str, typer.Option(help="Labelled images to learn from: a number per class, a share such as 0.1, or all.")
    ] = "16",
    head_from: Annotated[
        str,
        typer.Option(help="Fit the head on training (all but the held-out images), or on shots (only these)."),
    ] = "training",
    classifier: Annotated[
        str,
        typer.Option(help="Besides the head: none, tip (Tip-Adapter, learned together), or lp++ (learned afterwards)."),
    ] = "none",
    steps: Annotated[int, typer.Option(help="Steps per epoch, at least; images may repeat.")] = fewshot.STEPS,
    budget: Annotated[
        int, typer.Option(help="Keep this many vectors, mixed from the most informative blocks; 0 = all.")
    ] = 0,
    select_by: Annotated[
        str, typer.Option(help="With --budget, keep blocks, vectors (whole ones), or random (blocks).")
    ] = "blocks",
    *, reading: Reading, writing: Writing, learning: atlas.AtlasOptions = fewshot.FEW_SHOT,
) -> dict[str, Any]:  # fmt: skip
    """Learn a task from a few examples and the task vectors of other tasks.

    With --shots all --grain partition:K this is parameter-efficient fine-tuning. The epoch is chosen on the held-out
    images (with --validation 0 it is the last); the test images are only reported.
    """
    paths = vector_paths(asked, vector)
    one_of("--head-from", head_from, ("training", "shots"))
    one_of("--classifier", classifier, ("none", "tip", "lp++"))
    one_of("--select-by", select_by, ("blocks", "vectors", "random"))
    whole("--steps", steps)
    if select_by != "blocks" and not budget:
        raise ConfigError(f"--select-by: got {select_by!r}, which has no effect without --budget; give one")
    if head_from != "training" and reading.head not in FITTED_HEADS:
        raise ConfigError(
            f"--head-from: got {head_from!r}, which has no effect with --head {reading.head}, which uses no images; "
            f"give --head {' or '.join(FITTED_HEADS)}"
        )
    if budget and not 1 <= budget <= len(paths):
        raise ConfigError(f"--budget: got {budget}, expected 1 to {len(paths)}, the number of vectors, or 0")

    def work(run: Experiment) -> None:
        few, held = run.shots(TASK, shots), run.parts[TASK]["validation"]
        run.fit_heads({TASK: few} if head_from == "shots" else {})
        head = run.heads[TASK]
        batches, in_order = (few.batches(reading.batch_size, shuffle=shuffle) for shuffle in (True, False))
        validation = held.batches(reading.batch_size) if len(held) else None
        if budget:
            run.keep_best(budget, select_by, few, head)

        def learn(composed: Composed, **how: Any) -> Fitted:
            how |= {"head": head, "options": learning, "steps": steps}
            if classifier != "tip":
                return atlas.few_shot(composed, batches, validation, **how)
            fitted, run.classifier = atlas.tip_adapter(composed, batches, validation, **how)
            return fitted

        run.learn(learn)
        run.measure("pretrained", 0.0)
        if classifier != "tip":
            run.measure("composed")
        if classifier == "lp++":
            texts = head if head.scale is not None else atlas.prototypes(run.encoder, in_order)
            run.classifier = atlas.lp_plus_plus(run.composed, in_order, texts.get_buffer("weight"), validation)
        if run.classifier is not None:
            run.measure({"tip": "with Tip-Adapter", "lp++": "with LP++"}[classifier], head=run.classifier)

    return learned(asked, reading, writing, learning, paths, {TASK: data}, work)
