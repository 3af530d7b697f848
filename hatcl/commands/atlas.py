"""The `hatcl atlas` commands: learn how to compose task vectors, and look at them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from .. import atlas
from ..atlas import adaptation, addition, fewshot, negation
from ..atlas.files import read_vector
from ..atlas.fitting import Fitted
from ..atlas.linear import Composed
from ..errors import ConfigError
from ..files import write_files
from ..report.heatmap import draw_cosines, draw_sweep
from ..report.tables import number_table
from ..vectors.compose import Composer
from ..vectors.tensors import parameters_of
from .atlas_run import Bar, Loaded, Reading, Run, Writing, absolute, do, out
from .options import chosen

STARTS = ("zero", "search", "isotropic")
TASK = "task"  # the name of a command's only task

app = typer.Typer(
    name="atlas",
    no_args_is_help=True,
    help="Compose task vectors by learned coefficients (aTLAS); docs/atlas.md has the method.",
)

DataFile = Annotated[Path, typer.Option(help="An .npz file with x_train, y_train, x_test, y_test.")]
Vectors = Annotated[
    list[str],
    typer.Option(metavar="NAME=PATH", help="A task vector to compose (not the task's own); may be repeated."),
]
TaskSpecs = Annotated[
    list[str],
    typer.Option(
        metavar="NAME=VECTOR:DATA.npz",
        help="A task: its name, its task vector (a saved one, a fine-tuned checkpoint or a folder of a LoRA adapter) "
        "and its images; may be repeated.",
    ),
]
WarmStart = Annotated[
    str,
    typer.Option(
        help="Where learning starts: zero, search (the best scale that all vectors share), or isotropic (search, then "
        "one learned coefficient per vector)."
    ),
]


LEARNING = {
    "optimizer": "Optimizer, by timm's name.",
    "lr": "The highest learning rate.",
    "momentum": "Of optimizers that have one.",
    "epochs": "Passes over the images.",
    "max_steps": "So many steps, in place of --epochs.",
    "warmup": "Share of the steps in which the rate rises.",
    "compile": "Run training steps through torch.compile.",
    "weight_decay": "Decay of the coefficients.",
    "clip": "Clip the gradient's norm, 0 = off.",
    "schedule": "Learning rate: constant, linear or cosine down to 0, tanh, step or poly.",
    "regulariser": "Weight of the coefficients' norm in the loss (the paper's is 0.5), 0 = off.",
    "p": "Which norm: 1 or 2.",
    "seed": "Of the held-out images, shots, partitions, and the order while learning.",
    "amp": "Mixed precision: none, bf16 or fp16.",
    "accumulate": "So many batches make one step.",
}


def spelled_out(
    learning: Any = None, says: Mapping[str, str] = LEARNING
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Spell parameters that are dataclasses out as options of their own, which typer reads.

    Args:
        learning: an instance of the one of them that typer's annotations are not written into: it has the defaults.
        says: field of that one -> its help.
    """

    def spell(body: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(body, include_extras=True)
        groups: dict[str, Any] = {n: t for n, t in hints.items() if dataclasses.is_dataclass(t)}
        parts: dict[str, list[inspect.Parameter]] = {}
        for name, parameter in inspect.signature(body).parameters.items():
            fields = [parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)]
            if name in groups:
                fields = _fields(groups[name], learning, says)
            parts[name] = fields

        @functools.wraps(body)
        def run(**given: Any) -> None:
            for name, kind in groups.items():
                given[name] = kind(**{p.name: given.pop(p.name) for p in parts[name]})
            body(**given)

        every = [p for fields in parts.values() for p in fields]
        run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in every}
        return run

    return spell


def _fields(kind: Any, defaults: Any, says: Mapping[str, str]) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(kind, include_extras=True)
    found = []
    for f in dataclasses.fields(kind):
        annotation, default = hints[f.name], f.default
        if type(defaults) is kind:
            annotation, default = Annotated[annotation, typer.Option(help=says[f.name])], getattr(defaults, f.name)
        if default is dataclasses.MISSING:
            default = inspect.Parameter.empty
        found.append(inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
    return found


# --- commands that learn ---


@app.command("add")
@spelled_out(addition.ADDITION)
def add_command(
    reading: Reading, task: TaskSpecs, writing: Writing, learning: atlas.AtlasOptions, warm_start: WarmStart = "zero"
) -> None:
    """One model for several tasks: learn coefficients that minimise the sum of the tasks' losses.

    As published, coefficients are learned from the held-out images and chosen by them; the test images are only
    reported.
    """
    specs = _task_specs("--task", task)
    chosen("--warm-start", warm_start, STARTS)
    own = {"task": [s.to_dict() for s in specs], "warm_start": warm_start}

    def work(run: Run) -> None:
        run.read({s.name: s.vector for s in specs}, {s.name: s.data for s in specs}, needs_validation=True)
        run.fit_heads()
        tasks = [run.atlas_task(s.name) for s in specs]
        run.learn(lambda composed, **how: atlas.add(composed, tasks, options=learning, **how), warm_start)
        run.measure("pretrained", 0.0)
        for i, s in enumerate(specs):
            run.measure("fine-tuned", 1.0, vector=i, tasks=[s.name])
        run.measure("composed")

    do("add", reading, writing, learning, own, work)


@app.command("negate")
@spelled_out(negation.NEGATION)
def negate_command(
    reading: Reading,
    target: Annotated[
        str, typer.Option(metavar="NAME=VECTOR:DATA.npz", help="The task to unlearn: its name, task vector and images.")
    ],
    control: Annotated[Path, typer.Option(metavar="DATA.npz", help="Images of what must stay.")],
    writing: Writing,
    learning: atlas.AtlasOptions,
    keep: Annotated[float, typer.Option(help="Share of the pretrained control accuracy that must remain.")] = 0.95,
    warm_start: WarmStart = "zero",
) -> None:
    """Unlearn a task and keep another: the lowest accuracy on the target at which the control keeps its own.

    It lowers accuracy on what it is shown and proves nothing. As published, coefficients are learned from the held-out
    images and chosen by them; the test images are only reported.
    """
    (spec,) = _task_specs("--target", [target])
    if spec.name == "control":
        raise ConfigError("--target: the name control is that of --control; choose another")
    chosen("--warm-start", warm_start, STARTS)
    own = {"target": spec.to_dict(), "control": absolute(control), "keep": keep, "warm_start": warm_start}

    def work(run: Run) -> None:
        run.read({spec.name: spec.vector}, {spec.name: spec.data, "control": control}, needs_validation=True)
        run.fit_heads()
        gone, stays = run.atlas_task(spec.name), run.atlas_task("control")
        run.learn(
            lambda composed, **how: atlas.negate(composed, gone, stays, keep=keep, options=learning, **how), warm_start
        )
        run.measure("pretrained", 0.0)
        run.measure("composed")

    do("negate", reading, writing, learning, own, work)


@app.command("few-shot")
@spelled_out(fewshot.FEW_SHOT)
def few_shot_command(
    reading: Reading,
    vector: Vectors,
    data: DataFile,
    writing: Writing,
    learning: atlas.AtlasOptions,
    shots: Annotated[
        str, typer.Option(help="Labelled images to learn from: so many of each class, a share such as 0.1, or all.")
    ] = "16",
    head_from: Annotated[
        str,
        typer.Option(help="What the head is fitted on: training (all but the held-out images), or shots (them alone)."),
    ] = "training",
    classifier: Annotated[
        str,
        typer.Option(help="Beside the head: none, tip (Tip-Adapter, learned together), or lp++ (learned afterwards)."),
    ] = "none",
    steps: Annotated[int, typer.Option(help="Of an epoch, at least; few images are repeated.")] = fewshot.STEPS,
    budget: Annotated[
        int, typer.Option(help="Keep only so many vectors, mixed from the most informative blocks; 0 = all.")
    ] = 0,
    select_by: Annotated[
        str, typer.Option(help="What --budget keeps: blocks, vectors (whole ones), or random (blocks).")
    ] = "blocks",
) -> None:
    """Learn a task from a few examples and the task vectors of others. With --shots all --grain partition:K this is
    parameter-efficient fine-tuning.

    The epoch is chosen by the held-out images (with --validation 0 it is the last); the test images are only reported.
    """
    paths = _vector_paths(vector)
    chosen("--head-from", head_from, ("training", "shots"))
    chosen("--classifier", classifier, ("none", "tip", "lp++"))
    chosen("--select-by", select_by, ("blocks", "vectors", "random"))
    if budget and not 1 <= budget <= len(paths):
        raise ConfigError(f"--budget: got {budget}, expected 1 to {len(paths)}, the number of vectors, or 0")
    own = {
        "vector": {n: absolute(p) for n, p in paths.items()}, "data": absolute(data), "shots": shots,
        "head_from": head_from, "classifier": classifier, "steps": steps, "budget": budget, "select_by": select_by,
    }  # fmt: skip

    def work(run: Run) -> None:
        run.read(paths, {TASK: data})
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

    do("few-shot", reading, writing, learning, own, work)


@app.command("adapt")
@spelled_out(adaptation.ADAPTATION)
def adapt_command(
    reading: Reading,
    vector: Vectors,
    data: DataFile,
    writing: Writing,
    learning: atlas.AtlasOptions,
    images: Annotated[
        str, typer.Option(help="Whose images are learned from, without their labels: test, or training.")
    ] = "test",
    objective: Annotated[
        str, typer.Option(help="ufm (unsupervised FixMatch), or entropy of the predictions, to compare with.")
    ] = "ufm",
    per_class: Annotated[
        int | None, typer.Option(help="How many images of each class are trusted; by default images / classes, to 100.")
    ] = None,
    flip: Annotated[bool, typer.Option(help="Mirror images in the strong view.")] = True,
) -> None:
    """Test-time adaptation: learn coefficients from images without labels.

    Labels of the training images fit the head; those of the test images are used nowhere but in the report.
    """
    paths = _vector_paths(vector)
    chosen("--images", images, ("test", "training"))
    own = {
        "vector": {n: absolute(p) for n, p in paths.items()}, "data": absolute(data), "images": images,
        "objective": objective, "per_class": per_class, "flip": flip,
    }  # fmt: skip

    def work(run: Run) -> None:
        run.read(paths, {TASK: data})
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

    do("adapt", reading, writing, learning, own, work)


# --- commands that look ---


@app.command("cosine")
def cosine_command(
    vectors: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]PATH...", help="Saved task vectors; with --base also checkpoints and adapters."),
    ],
    base: Annotated[
        Path | None, typer.Option(help="The pretrained checkpoint that the checkpoints were fine-tuned from.")
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="A module to leave out, such as head; may be repeated.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the matrix into this PNG.")] = None,
) -> None:
    """Cosines between task vectors; 0 = they change the model in unrelated ways."""
    named = [text.partition("=") if "=" in text and not Path(text).exists() else ("", "", text) for text in vectors]
    paths = {name or Path(path).stem: Path(path) for name, _, path in named}
    if len(paths) < len(vectors):
        raise ConfigError("vectors: two have one name; write NAME=PATH")
    ours = None if base is None else parameters_of(base)
    read = [read_vector(path, ours, without=without or ()) for path in paths.values()]
    with out.status("comparing"):
        matrix = atlas.cosines(read).tolist()
    out.print(number_table("cosines between task vectors", list(paths), list(paths), matrix))
    if picture is not None:
        write_files({picture: draw_cosines(matrix, list(paths))})
        out.print(str(picture), style="dim", soft_wrap=True)


@app.command("sweep")
@spelled_out()
def sweep_command(
    reading: Reading,
    task: TaskSpecs,
    first: Annotated[float, typer.Option("--from", help="The first coefficient.")] = -1.0,
    last: Annotated[float, typer.Option("--to", help="The last coefficient.")] = 1.5,
    count: Annotated[int, typer.Option(help="How many coefficients, evenly spaced.")] = 11,
    part: Annotated[str, typer.Option(help="Which images: validation or test.")] = "validation",
    seed: Annotated[int, typer.Option(help="Of the held-out images.")] = 0,
    picture: Annotated[Path | None, typer.Option(help="Draw the curves into this PNG.")] = None,
) -> None:
    """Accuracy of each task against the coefficient of its own task vector, the same for all blocks."""
    specs = _task_specs("--task", task)
    chosen("--part", part, ("validation", "test"))
    if count < 1 or not first <= last:
        raise ConfigError(f"--from {first} --to {last} --count {count}: expected at least one coefficient, upwards")
    scales = torch.linspace(first, last, count, dtype=torch.float64).tolist()
    loaded = Loaded(reading, seed)
    loaded.read(
        {s.name: s.vector for s in specs}, {s.name: s.data for s in specs}, needs_validation=part == "validation"
    )
    loaded.fit_heads()
    rows = []
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
        out.print(str(picture), style="dim", soft_wrap=True)


# --- what is read ---


class TaskSpec(NamedTuple):
    """A task as the command line names it."""

    name: str
    vector: Path
    data: Path

    def to_dict(self) -> dict[str, str]:
        return {"name": self.name, "vector": absolute(self.vector), "data": absolute(self.data)}


def _task_specs(flag: str, texts: Sequence[str]) -> list[TaskSpec]:
    """`NAME=VECTOR:DATA.npz`. Of several colons the one counts at which two paths exist, else the last."""
    found = []
    for text in texts:
        name, equals, rest = text.partition("=")
        cuts = [i for i, letter in enumerate(rest) if letter == ":" and 0 < i < len(rest) - 1]
        if not (name and equals and cuts):
            raise ConfigError(f"{flag}: got {text!r}, expected NAME=VECTOR:DATA.npz")
        pairs = [(Path(rest[:i]), Path(rest[i + 1 :])) for i in reversed(cuts)]
        found.append(TaskSpec(name, *next((p for p in pairs if p[0].exists() and p[1].exists()), pairs[0])))
    _distinct(flag, [s.name for s in found])
    return found


def _vector_paths(texts: Sequence[str]) -> dict[str, Path]:
    pairs = [text.partition("=") for text in texts]
    for text, (name, equals, path) in zip(texts, pairs, strict=True):
        if not (name and equals and path):
            raise ConfigError(f"--vector: got {text!r}, expected NAME=PATH")
    _distinct("--vector", [name for name, _, _ in pairs])
    return {name: Path(path) for name, _, path in pairs}


def _distinct(flag: str, names: Sequence[str]) -> None:
    twice = next((n for i, n in enumerate(names) if n in names[:i]), None)
    if twice is not None:
        raise ConfigError(f"{flag}: the name {twice!r} comes twice; each needs a name of its own")
