"""`hatcl graft`: find the few weights of a fine-tuned model that hold what it learned, and measure them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from ..config import one_of, whole
from ..engine.folder import drop_steps, read_steps
from ..engine.measures import BINS, Calibration
from ..errors import ConfigError
from ..files import write_files
from ..finetuning import load_run
from ..finetuning.grafts import (
    CHOOSE,
    FROM_FILE,
    GRAFT_RULES,
    MEASURED,
    MODELS,
    GraftMaker,
    Parts,
    Scene,
    Wanted,
    inputs_of,
    measured,
    read_mask,
    with_gain,
)
from ..grafts import Graft, GraftOptions, GraftScores, LearnedGraft
from ..report.calibration import draw_graft_curve, draw_reliability
from ..report.picture import short
from ._command import Asked, Device, command
from ._console import Bar, out, percent, say
from ._options import absolute_path, usable_device
from ._pages import graft_page

GRAFTS, RELIABILITY, CURVE = "grafts", "reliability.png", "curve.png"
SPARSITY = 1e-4  # the paper's headline: 0.01 % of the weights
HIGHEST = "highest_movement"  # the paper's name for the base patch of the largest differences


class _Any:
    """Contains every option but RUN: all may differ on resuming, since each graft's folder records how it was made."""

    def __contains__(self, name: object) -> bool:
        return name != "run"


def show_grafts(run: Path, metrics: dict[str, Any]) -> None:
    """Print the table of models and grafts, and draw the pictures."""
    models, rows = {name: metrics[name] for name in MODELS}, metrics["grafts"]
    if metrics["finetuned_head"]:
        say(f"{', '.join(metrics['finetuned_head'])}: new, so all models use the fine-tuned ones", "dim")
    out.print(_table(models, rows))
    for title, row in (
        ("the fine-tuned model", models["finetuned"]),
        *((f"{r['by']} {r['sparsity']:g}", r) for r in rows),
    ):
        guess = row.get("commonest")
        if guess is not None and row["accuracy"] <= guess:
            say(
                f"{title}: an accuracy of {percent(row['accuracy'])} % is no better than always giving the most "
                f"common answer ({percent(guess)} %)",
                "yellow",
            )
    every = {"pretrained": models["pretrained"], "fine-tuned": models["finetuned"]}
    every |= {f"{row['by']} {row['sparsity']:g}": row for row in rows}
    try:
        pictures = {
            run / RELIABILITY: draw_reliability({n: Calibration.from_dict(r["calibration"]) for n, r in every.items()}),
            run / CURVE: draw_graft_curve(rows, **{name: models[name]["accuracy"] for name in MODELS}),
        }
        write_files(pictures)
        say(", ".join(str(path) for path in pictures), "dim")
    except ConfigError as error:
        say(f"no picture: {error}", "yellow")


@command(
    "graft", show=show_grafts, page=graft_page,
    place=lambda options: Path(options["run"]) / GRAFTS if options.get("run") else None,
)  # fmt: skip
def graft(
    asked: Asked,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run of hatcl finetune.")],
    sparsity: Annotated[
        list[float] | None,
        typer.Option(
            "--sparsity",
            "--sparsitylevel",
            help=f"Share of the participating elements that the graft holds, by default {SPARSITY:g}; repeatable. "
            "(--sparsitylevel is the name in the paper's repository.)",
        ),
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="How elements are chosen: learned (on the task's loss; the default), magnitude (the largest "
            "differences), random; repeatable, to compare."
        ),
    ] = None,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="With magnitude and random: take the same share of each tensor.")
    ] = False,
    grain: Annotated[
        list[str] | None,
        typer.Option(
            help="With magnitude and random: element (the default), or whole groups: unit, row, matrix, ...; "
            "repeatable, to compare at one size."
        ),
    ] = None,
    no_train: Annotated[
        bool,
        typer.Option("--no-train", help="Learn nothing: measure the graft in --mask-path or --checkpoint-location."),
    ] = False,
    mask_path: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Where learning starts (the paper's base patch): a saved graft or saved scores; by default "
            f"{HIGHEST}, the largest differences. With --no-train, the graft to measure.",
        ),
    ] = None,
    checkpoint_location: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write the learned graft here, a .safetensors file. With --no-train, read it from here.",
        ),
    ] = None,
    choose: Annotated[
        str,
        typer.Option(
            help="Learning: keep the mask with the lowest loss on the training examples, or with the highest score "
            "on training and validation examples, as published; with few examples the score chooses by chance."
        ),
    ] = CHOOSE[0],
    keep_scores: Annotated[
        bool,
        typer.Option(
            "--keep-scores",
            help="Learning: also write the mask's logits after the last step, 4 bytes per participating element, "
            "for --mask-path.",
        ),
    ] = False,
    fix_embeddings: Annotated[
        bool,
        typer.Option(
            "--fix-embeddings", help="Leave the embeddings out of the graft, even if fine-tuning has trained them."
        ),
    ] = False,
    fix_head: Annotated[
        bool | None,
        typer.Option(
            help="Leave the head out of the graft. If the head is new, all models then use the fine-tuned one, as "
            "published; this is the default for a new head that fine-tuning has trained."
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Names of tensors that take part, as a pattern such as '*.mlp.*'; repeatable."),
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Names of tensors that take no part, as a pattern; repeatable.")
    ] = None,
    ood: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Data of another distribution with the same labels; its test part is scored; repeatable.",
        ),
    ] = None,
    test: Annotated[int | None, typer.Option(help="Use at most this many test examples, also of --ood.")] = None,
    bins: Annotated[int, typer.Option(help="Bins of the calibration error.")] = BINS,
    batch_size: Annotated[int, typer.Option(help="Examples per batch while learning.")] = 16,
    device: Device = "auto",
    *,
    learning: GraftOptions,
) -> dict[str, Any]:
    """Put a few weights of the fine-tuned model into the pretrained one, and measure how much of the gain they keep.

    The table has the pretrained and the fine-tuned model and each graft: accuracy, F1, the share of the fine-tuning
    gain that is kept, agreement with the fine-tuned model, expected calibration error, and accuracy on other data.
    Choosing uses the run's training examples (with --choose score its validation examples as well); test examples
    are only reported. A graft that exists already is not made again, so the same command resumes after an interruption.
    """
    for name, value in (("--test", test), ("--bins", bins), ("--batch-size", batch_size)):
        whole(name, value, optional=name == "--test")
    one_of("--choose", choose, CHOOSE)
    where = usable_device(device)
    if mask_path not in (None, HIGHEST):
        asked.options["mask_path"] = absolute_path(str(mask_path))
    folder = asked.folder(free=_Any())  # type: ignore[arg-type]
    wanted = _wanted(by, sparsity, grain, per_layer)
    file = _file(no_train, mask_path, checkpoint_location, wanted, by)
    start = None if file is None else read_mask(file)
    if no_train and start is not None:
        if isinstance(start, GraftScores) and not sparsity:
            start = start.graft()
        wanted = _masks(start, sparsity, file) + [w for w in wanted if w.by != "learned"]
    loaded = load_run(run, device=where)
    parts = Parts(loaded, fix_embeddings=fix_embeddings, fix_head=fix_head, only=only or (), skip=skip or ())
    scene = Scene(loaded, ood or (), test, bins)
    inputs = inputs_of(run)
    maker = GraftMaker(loaded, parts, learning, batch_size, inputs, start, file, choose, keep_scores)
    maker.check(wanted)
    kept = {w: found for w in wanted if (found := maker.kept(folder.path, w)) is not None}
    missing = [w for w in wanted if w not in kept]
    settings = {**scene.settings, "inputs": inputs, "finetuned_head": parts.given}
    steps = sum(learning.steps + 1 if w.by == "learned" else 1 for w in missing) + len(wanted)
    names = [w.name for w in missing]
    told = {line["name"]: line["stage"] for line in read_steps(folder.path)}  # for the grafts of all commands
    first = 1 + max((stage for name, stage in told.items() if name not in names), default=-1)
    with folder.claimed(inputs=inputs), Bar(steps, "steps") as bar:
        for stage in (told[name] for name in names if name in told):  # a graft that is made again replaces its lines
            drop_steps(folder.path, stage)

        def tell(name: str, entry: Mapping[str, float]) -> None:
            keys = [key for key in ("loss", "mask_loss", "validation") if key in entry]
            text = ", ".join(f"{key.replace('_', ' ')} {entry[key]:.4g}" for key in keys)
            bar.says(f"{name}, step {int(entry['step'])}: {text}")
            bar.advance()
            folder.tell(stage=first + names.index(name), name=name, **entry)

        for w in missing:
            bar.says(w.name)
            kept[w] = made = maker.keep(folder.path, w, tell)
            best = f", best after step {made.step}" if isinstance(made, LearnedGraft) else ""
            bar.line(f"{w.name}: {made.size:,} of {made.numel:,} elements{best}")
        if checkpoint_location is not None and not no_train:
            kept[next(w for w in wanted if w.by == "learned")].save(checkpoint_location)
        bar.says("measuring")
        models = {}
        for name in MODELS:
            models[name] = measured(folder.path / f"{name}.json", settings, functools.partial(scene.model, name))
        rows = []
        for w in wanted:
            row = measured(folder.path / w.name / MEASURED, settings, functools.partial(scene.graft, kept[w]))
            rows.append({"by": w.rule, "sparsity": w.sparsity, "folder": w.name, **with_gain(row, models)})
            bar.advance()
        return folder.finish({**models, "grafts": rows, "finetuned_head": parts.given})


# --- reading ---


def _rule(rule: str) -> str:
    one_of("--by", rule, GRAFT_RULES)
    return rule


def _wanted(
    by: Sequence[str] | None, sparsity: Sequence[float] | None, grain: Sequence[str] | None, per_layer: bool
) -> list[Wanted]:
    rules = [_rule(rule) for rule in by or [GRAFT_RULES[0]]]
    shares = list(sparsity or [SPARSITY])
    grains = list(grain or ["element"])
    named = [f"{share:g}" for share in shares]  # folders are called by these
    for name, values in (("--by", rules), ("--sparsity", named), ("--grain", grains)):
        twice = next((v for i, v in enumerate(values) if v in values[:i]), None)
        if twice is not None:
            raise ConfigError(f"{name}: got {twice} twice, expected each once")
    wrong = next((s for s in shares if not 0 < s < 1), None)
    if wrong is not None:
        raise ConfigError(f"--sparsity: got {wrong}, expected a share between 0 and 1, such as {SPARSITY:g}")
    if "learned" in rules and ("element" not in grains or per_layer):
        flag = "--per-layer" if per_layer else f"--grain {grains[0]}"
        raise ConfigError(
            f"{flag}: works only with --by magnitude or random; a learned graft takes single elements anywhere"
        )
    if per_layer and grains != ["element"]:
        raise ConfigError(f"--per-layer: got --grain {grains[-1]}, expected element; groups are taken over all tensors")
    pairs = [(rule, g) for rule in rules for g in grains if rule != "learned" or g == "element"]
    return [Wanted(rule, share, g, per_layer) for rule, g in pairs for share in shares]


def _file(
    no_train: bool, mask_path: str | None, location: Path | None, wanted: list[Wanted], by: Sequence[str] | None
) -> Path | None:
    """The file to read, if any."""
    mask = None if mask_path in (None, HIGHEST) else Path(str(mask_path))
    learned = [w for w in wanted if w.by == "learned"]
    if location is not None and location.suffix != ".safetensors":
        raise ConfigError(f"--checkpoint-location: got {location}, expected a file that ends in .safetensors")
    if not no_train:
        if mask is not None and not learned:
            raise ConfigError("--mask-path is the start of --by learned; add that, or --no-train to measure the file")
        if location is not None and len(learned) != 1:
            raise ConfigError(
                f"--checkpoint-location: holds one learned graft, but {len(learned)} were requested; give --by learned "
                "and one --sparsity"
            )
        location = None
    elif mask is not None and location is not None:
        raise ConfigError("--no-train: got --mask-path and --checkpoint-location; give only the file to measure")
    elif mask is None and location is None and learned:
        raise ConfigError(
            "--no-train: nothing to measure; give --mask-path or --checkpoint-location, or --by magnitude or random"
        )
    found = mask or location
    flag = "--mask-path" if mask is not None else "--checkpoint-location"
    if found is not None and not found.is_file():
        raise ConfigError(f"{flag}: there is no file {found}")
    return found


def _masks(start: Graft | GraftScores, sparsity: Sequence[float] | None, file: Path | None) -> list[Wanted]:
    if isinstance(start, GraftScores):
        return [Wanted(FROM_FILE, share) for share in sparsity or ()]
    if sparsity:
        raise ConfigError(f"--sparsity: {file} holds a graft, which has its own size, {start.sparsity:g}; leave it out")
    return [Wanted(FROM_FILE, start.sparsity)]


# --- showing ---


def _table(models: Mapping[str, Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        title="on the test examples, in %", box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False,
        collapse_padding=True,
    )  # fmt: skip
    table.add_column("model", no_wrap=True)
    others = list(models["pretrained"]["ood"])
    for name in ("elements", "accuracy", "F1", "gain kept", "agreed", "ECE", *map(short, others)):
        table.add_column(name, justify="right", no_wrap=True)
    for name, title in zip(MODELS, ("pretrained", "fine-tuned"), strict=True):
        row = models[name]
        share = ["0", "all"][name == "finetuned"]
        table.add_row(
            title, share, percent(row["accuracy"]), percent(row["f1"]), "", "", percent(row["ece"]),
            *[percent(row["ood"][n]) for n in others],
        )  # fmt: skip
    if models["pretrained"].get("commonest") is not None:
        table.add_row("most common answer", "", percent(models["pretrained"]["commonest"]))
    table.add_section()
    for row in rows:
        table.add_row(
            f"{row['by']} {row['sparsity']:g}", f"{row['size']:,}",
            *[percent(row[key]) for key in ("accuracy", "f1", "gain_kept", "agreement", "ece")],
            *[percent(row["ood"][n]) for n in others],
        )  # fmt: skip
    return table
