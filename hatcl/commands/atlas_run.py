"""What the `hatcl atlas` commands do around a procedure: read, check, learn, measure, write, go on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save
from torch import nn

import hatcl

from .. import atlas
from ..atlas.files import all_files, per_block, read_head, read_vector, write_coefficients, write_heads
from ..atlas.fitting import Fitted
from ..atlas.linear import Composed
from ..calls import Head
from ..data.images import FITS, Images, Preparation, Task, npz_task, preparation_for
from ..data.shots import held_out
from ..engine import folder as checkpoints
from ..engine import loop
from ..errors import ConfigError, HATError, IntegrityError, VectorError
from ..files import sha256_of, write_files
from ..hat.gates import gates_of
from ..integrations.timm_names import PREFIX
from ..report.heatmap import draw_coefficients
from ..report.tables import accuracy_table
from ..vectors.compose import Composer
from ..vectors.files import write_tensors
from ..vectors.task_vector import TaskVector
from ..vectors.tensors import check_fit, kinds_of, named_tensors
from .options import chosen, key_values, usable_device

REPORT, HEADS, CLASSIFIER = "report.json", "heads.safetensors", "classifier.safetensors"
MERGED, PICTURE = "merged.safetensors", "coefficients.png"
CHECKPOINT, ISOTROPIC = "checkpoint.pt", "checkpoint-isotropic.pt"
FREE_ON_RESUME = {"device"}  # it says where to compute, not what
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEADS_BY = ("trained", "prototypes")

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def absolute(path: Path) -> str:
    """As config.json holds a path."""
    return str(path.absolute())


@dataclass(frozen=True)
class Reading:
    """What every command that runs a model has."""

    base: Annotated[
        Path,
        typer.Argument(metavar="BASE", help="The pretrained checkpoint: a safetensors file, or a folder of shards."),
    ]
    model: Annotated[str, typer.Option(help="timm's name of the model that BASE is of, such as vit_base_patch32_224.")]
    model_kwargs: Annotated[
        list[str] | None, typer.Option(help="key=value for the model, such as img_size=64; may be repeated.")
    ] = None
    head: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="Frozen heads on the base's features of the training images: trained (logistic regression), "
            "prototypes (cosines to class means), or a .safetensors file with [NAME.]weight and [NAME.]bias or "
            "[NAME.]scale, such as embeddings of class names.",
        ),
    ] = "trained"
    validation: Annotated[
        float,
        typer.Option(
            help="Share of each class's training images that is held out: coefficients are chosen by it (add and "
            "negate also learn from it), and heads never see it."
        ),
    ] = 0.2
    size: Annotated[
        int | None, typer.Option(help="Images are brought to this size; 0 keeps their own; by default the model's.")
    ] = None
    fit: Annotated[str, typer.Option(help="How: resize or pad.")] = "resize"
    normalise: Annotated[
        str,
        typer.Option(
            help="By the mean and deviation of: data (its training images, as hatcl train does), or model (timm's)."
        ),
    ] = "data"
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = 128
    check: Annotated[bool, typer.Option(help="Refuse task vectors that were taken from another base.")] = True
    vector_dtype: Annotated[str, typer.Option(help="Keep task vectors in memory as float32, bfloat16 or float16.")] = (
        "float32"
    )
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")] = "auto"


@dataclass(frozen=True)
class Writing:
    """What every command that learns has beside."""

    output: Annotated[Path, typer.Option(help="The run's folder. The same command goes on with what it finds there.")]
    grain: Annotated[
        str, typer.Option(help="What shares a coefficient: global, block, qkv, row, unit, partition:K, ...")
    ] = "block"
    linearised: Annotated[
        bool, typer.Option("--linearised", help="Compose the model's first-order expansion instead of its weights.")
    ] = False
    merge: Annotated[
        bool, typer.Option("--merge", help=f"Write the composed model, as {MERGED}, with BASE's classifier.")
    ] = False


# --- what is read ---


class Loaded:
    """A pretrained encoder, task vectors, and tasks with their images and frozen heads.

    Args:
        reading: the command's options. seed: of the held-out images and of partitions.
    """

    def __init__(self, reading: Reading, seed: int) -> None:
        self.reading, self.seed = reading, seed
        self.head_file = None if reading.head in HEADS_BY else Path(reading.head)
        if self.head_file is not None and self.head_file.suffix != ".safetensors":
            chosen("--head", reading.head, (*HEADS_BY, "FILE.safetensors"))
        chosen("--fit", reading.fit, FITS)
        chosen("--normalise", reading.normalise, ("data", "model"))
        chosen("--vector-dtype", reading.vector_dtype, tuple(DTYPES))
        if reading.batch_size < 1:
            raise ConfigError(f"--batch-size: got {reading.batch_size}, expected at least 1")
        self.device = usable_device(reading.device)
        self.parts: dict[str, dict[str, Images]] = {}
        self.classes: dict[str, int] = {}
        self.heads: dict[str, atlas.ClassHead] = {}

    def read(self, vectors: Mapping[str, Path], data: Mapping[str, Path], *, needs_validation: bool = False) -> None:
        """Read everything and check that it fits, before anything is computed or written."""
        reading = self.reading
        tasks = {name: npz_task(path) for name, path in data.items()}
        model, classifier = _model(reading)
        ours = dict(model.named_parameters())
        self.names = list(vectors)
        self.vectors = [read_vector(path, ours, without=classifier).in_memory() for path in vectors.values()]
        self.encoder = atlas.encoder(model).to(self.device).eval()
        for name, task in tasks.items():
            self.classes[name] = task.num_classes
            prepare = _preparation(reading, model, task)
            keep, held = held_out(task.y_train, reading.validation, self.seed)
            if needs_validation and not len(held):
                raise ConfigError(
                    f"--validation: {reading.validation} of each class of {data[name]} is no image; give a larger share"
                )
            images = Images(task.x_train, task.y_train, prepare)
            self.parts[name] = {
                "training": images.at(keep), "validation": images.at(held),
                "test": Images(task.x_test, task.y_test, prepare),
            }  # fmt: skip
            self._try(data[name], images)
            if self.head_file is not None:
                self._head_from(self.head_file, name)
        read = [reading.base, *vectors.values(), *([] if self.head_file is None else [self.head_file])]
        self.files = [f for path in read for f in all_files(path)] + list(data.values())

    def _try(self, path: Path, images: Images) -> None:
        """Do two images pass through the model?"""
        x = images.prepare(images.x[:2]).to(self.device)
        try:
            with torch.no_grad():
                self.width = self.encoder(x).shape[-1]
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"{path}: {self.reading.model} does not take images of {list(x.shape[1:])} "
                f"({str(error).splitlines()[0]}); bring them to another --size, or give --model-kwargs img_size=..."
            ) from error

    def fit_heads(self, on: Mapping[str, Images] | None = None, stored: Path | None = None) -> None:
        """A frozen head for each task, on its training images or on those given; or from a file.

        Args:
            stored: where they are kept; those that are there are read instead.
        """
        file = stored if stored is not None and stored.exists() else self.head_file
        for name, parts in self.parts.items():
            if file is not None:
                head = self._head_from(file, name)
            else:
                images = (on or {}).get(name, parts["training"])
                fit = atlas.trained_head if self.reading.head == "trained" else atlas.prototypes
                head = fit(self.encoder, images.batches(self.reading.batch_size), self.classes[name])
            self.heads[name] = head
        if stored is not None and not stored.exists():
            write_heads(stored, self.heads)

    def _head_from(self, file: Path, name: str) -> atlas.ClassHead:
        head = read_head(file, name)
        classes, width = head.get_buffer("weight").shape
        if classes < self.classes[name] or width != self.width:
            raise ConfigError(
                f"{file}: the head of {name} is {[classes, width]}, expected at least {self.classes[name]} classes of "
                f"the model's {self.width} features"
            )
        return head.to(self.device)

    def compose(self, grain: str, vectors: Sequence[TaskVector] | None = None) -> Composer:
        unit_map: Any = None
        if grain == "unit":
            images = next(iter(self.parts.values()))["training"]
            x = images.prepare(images.x[:2]).to(self.device)
            unit_map = gates_of(hatcl.convert(self.encoder, 1, x, verify=False))[0].unit_map
        return hatcl.compose(
            self.encoder, self.vectors if vectors is None else vectors, grain,
            dtype=DTYPES[self.reading.vector_dtype], unit_map=unit_map, seed=self.seed, check=self.reading.check,
        )  # fmt: skip


def _model(reading: Reading) -> tuple[nn.Module, tuple[str, ...]]:
    """The timm model with BASE's weights, and the names of its classifiers, which no task vector is of."""
    name, stored = reading.model, named_tensors(reading.base)
    if not timm.is_model(name) or name.startswith(PREFIX):
        chosen("--model", name.split(".")[0], timm.list_models())
    options = key_values("--model-kwargs", reading.model_kwargs)
    try:
        if "num_classes" not in options:
            first = next(iter(_classifiers(timm.get_pretrained_cfg(name))), "")
            weight = kinds_of(stored).get(f"{first}.weight")
            options["num_classes"] = 0 if weight is None else weight.shape[0]
        model = timm.create_model(name, **options)
    except (TypeError, RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(f"--model, --model-kwargs: timm cannot make {name} with {options} ({error})") from error
    state = model.state_dict()
    counters = [n for n in state if n.endswith("num_batches_tracked") and n not in stored]  # some writers drop them
    try:
        check_fit({n: t for n, t in state.items() if n not in counters}, stored, (name, str(reading.base)))
    except VectorError as error:
        raise VectorError(f"{error}. Is it of another --model, or made with other --model-kwargs?") from error
    model.load_state_dict({n: stored[n] for n in stored}, strict=False)
    return model, _classifiers(getattr(model, "pretrained_cfg", None))


def _classifiers(cfg: Any) -> tuple[str, ...]:
    found = cfg.get("classifier") if isinstance(cfg, Mapping) else getattr(cfg, "classifier", None)
    return () if not found else (found,) if isinstance(found, str) else tuple(found)


def _preparation(reading: Reading, model: nn.Module, task: Task) -> Preparation:
    return preparation_for(
        task, getattr(model, "pretrained_cfg", None) or {}, size=reading.size, fit=reading.fit,
        image_size=key_values("--model-kwargs", reading.model_kwargs).get("img_size"), normalise=reading.normalise,
    )  # fmt: skip


# --- a run: learn, measure, write ---


class Bar:
    """A progress bar; without a terminal, a line for each epoch."""

    def __init__(self, total: int, what: str) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(what),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=out,
        )  # fmt: skip
        self.bar = self.progress.add_task("reading", total=total)
        self.before = 0  # epochs of stages that are done

    def __enter__(self) -> Bar:
        if out.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def says(self, text: str) -> None:
        self.progress.update(self.bar, description=text)

    def advance(self) -> None:
        self.progress.advance(self.bar)

    def epoch(self, at: loop.Progress, stage: str) -> None:
        """What `fit` tells after each epoch."""
        if at.doing != "epoch":
            return
        number = at.epoch
        words = [f"{name} {at.measured[name]:.4g}" for name in ("loss", "score") if name in at.measured]
        self.progress.update(self.bar, completed=self.before + number, description=f"{stage}: {', '.join(words)}")
        if not out.is_terminal:
            out.print(f"{stage}, epoch {number}: {', '.join(words)}", soft_wrap=True)


class Run(Loaded):
    """One command that learns, and its folder."""

    def __init__(
        self, command: str, reading: Reading, writing: Writing, learning: atlas.AtlasOptions, bar: Bar
    ) -> None:
        super().__init__(reading, learning.seed)
        self.command, self.writing, self.learning, self.bar = command, writing, learning, bar
        self.folder = writing.output
        self.config: dict[str, Any] = {}
        self.classifier: nn.Module | None = None
        self.stages: dict[str, Fitted] = {}
        self.rows: dict[str, dict[str, dict[str, float]]] = {}
        self.began = time.monotonic()

    def read(self, vectors: Mapping[str, Path], data: Mapping[str, Path], *, needs_validation: bool = False) -> None:
        super().read(vectors, data, needs_validation=needs_validation)
        self.composer = self.compose(self.writing.grain)  # raises where something does not fit
        inputs = {absolute(f): sha256_of(f) for f in self.files}
        if (self.folder / checkpoints.CONFIG).exists():
            stored = checkpoints.read_json(self.folder / checkpoints.CONFIG).get("inputs")
            changed = [f for f, digest in inputs.items() if not stored or stored.get(f) != digest]
            if changed:
                raise IntegrityError(
                    f"--output: {changed[0]} is not what the run in {self.folder} was started with; put it back, or "
                    "name another folder"
                )
        self.config["inputs"] = inputs
        checkpoints.write_json(self.folder / checkpoints.CONFIG, self.config)

    def fit_heads(self, on: Mapping[str, Images] | None = None, stored: Path | None = None) -> None:
        self.bar.says("heads")
        super().fit_heads(on, stored or self.folder / HEADS)

    def atlas_task(self, name: str) -> atlas.AtlasTask:
        """For procedures that learn from the held-out images, as published."""
        held = self.parts[name]["validation"]
        size = self.reading.batch_size
        return atlas.AtlasTask(name, held.batches(size, shuffle=True), held.batches(size), head=self.heads[name])

    def shots(self, name: str, text: str) -> Images:
        """`16` of each class, the share `0.1`, or `all` of the training images."""
        images = self.parts[name]["training"]
        if text == "all":
            return images
        try:
            number: int | float = int(text) if text.isdigit() else float(text)
        except ValueError:
            raise ConfigError(
                f"--shots: got {text!r}, expected a number per class, a share such as 0.1, or all"
            ) from None
        ids = atlas.sample_shots(torch.from_numpy(images.y), number, seed=self.seed, num_classes=self.classes[name])
        return images.at(ids)

    def keep_best(self, budget: int, by: str, few: Images, head: Head) -> None:
        """Only the most informative of the vectors."""
        self.bar.says("choosing blocks")
        found = atlas.select_blocks(
            self.encoder, self.vectors, few.batches(self.reading.batch_size), budget, by=by, head=head, seed=self.seed
        )
        names = [self.names[i] for i in found.chosen[:, 0].tolist()]
        self.names = names if by == "vectors" else [f"mix {i}" for i in range(budget)]
        self.vectors = [v.in_memory() for v in found.vectors]
        self.composer = self.compose(self.writing.grain)

    def learn(self, procedure: Callable[..., Fitted], warm_start: str = "zero") -> None:
        """Learn coefficients, going on from the folder's checkpoints."""
        how: dict[str, Any] = {}
        if warm_start == "isotropic":
            coarse = self._form(self.compose("global"))
            how["warm_start"] = self._stage("isotropic", procedure, coarse, ISOTROPIC, "search").coefficients
            self.bar.before += self.learning.epochs
        elif warm_start == "search":
            how["warm_start"] = "search"
        self.composed = self._form(self.composer)
        self._stage(self.command, procedure, self.composed, CHECKPOINT, **how)
        self.bar.says("measuring")

    def _form(self, composer: Composer) -> Composed:
        return atlas.linearised(composer) if self.writing.linearised else composer

    def _stage(
        self, name: str, procedure: Callable[..., Fitted], composed: Composed, file: str, warm_start: Any = None
    ) -> Fitted:
        path = self.folder / file
        how = {} if warm_start is None or path.exists() else {"warm_start": warm_start}  # a checkpoint knows better
        self.bar.says(name)
        self.stages[name] = procedure(composed, checkpoint=path, progress=lambda at: self.bar.epoch(at, name), **how)
        return self.stages[name]

    @torch.no_grad()
    def measure(
        self,
        row: str,
        scale: float | None = None,
        *,
        vector: int | None = None,
        tasks: Sequence[str] | None = None,
        head: Head | None = None,
    ) -> None:
        """Accuracies on held-out and test images: as composed, or with (one vector's) coefficients at `scale`."""
        lam = self.composer.coefficients
        learned = lam.clone()
        try:
            if scale is not None:
                lam.zero_()
                lam[slice(None) if vector is None else vector] = scale
            for name in self.parts if tasks is None else tasks:
                self.rows.setdefault(row, {})[name] = {
                    part: atlas.accuracy(
                        self.composed, self.parts[name][part].batches(self.reading.batch_size), head or self.heads[name]
                    )
                    for part in ("validation", "test")
                    if len(self.parts[name][part])
                }
        finally:
            lam.copy_(learned)

    def write(self) -> dict[str, Any]:
        """Everything but the report, which comes last and says that the run is finished."""
        write_coefficients(self.folder, self.composer, self.names)
        if self.classifier is not None:
            tensors = {n: t.detach().cpu().contiguous() for n, t in self.classifier.state_dict().items()}
            write_files({self.folder / CLASSIFIER: save(tensors)})
        if self.writing.merge:
            state = self.composer.merge().state_dict()
            write_tensors(self.folder / MERGED, kinds_of(state), lambda name: {name: state[name]})
        try:
            blocks = [b.name for b in self.composer.blocks]
            picture = draw_coefficients(per_block(self.composer).tolist(), self.names, blocks)
            write_files({self.folder / PICTURE: picture})
        except ConfigError as error:
            out.print(f"no picture: {error}", style="yellow", soft_wrap=True)
        return {
            "hatcl": hatcl.__version__,
            "command": self.command,
            "vectors": self.names,
            "coefficients": list(self.composer.coefficients.shape),
            "images": {n: {part: len(images) for part, images in p.items()} for n, p in self.parts.items()},
            "classes": self.classes,
            "accuracy": self.rows,
            "fitted": {
                name: {k: v for k, v in dataclasses.asdict(f).items() if k not in ("coefficients", "others")}
                for name, f in self.stages.items()
            },
            "seconds": time.monotonic() - self.began,
        }


def do(
    command: str,
    reading: Reading,
    writing: Writing,
    learning: atlas.AtlasOptions,
    own: Mapping[str, Any],
    work: Callable[[Run], None],
) -> None:
    """Run a command that learns, go on with an interrupted one, or show a finished one."""
    if writing.linearised and writing.merge:
        raise ConfigError("--merge: a linearised composition has no weights of its own; leave one of the two out")
    options = {**dataclasses.asdict(reading), **dataclasses.asdict(writing), **dataclasses.asdict(learning), **own}
    del options["output"]
    options["base"] = absolute(reading.base)
    if reading.head not in HEADS_BY:
        options["head"] = absolute(Path(reading.head))
    folder = writing.output
    config = _claimed(folder, command, options)
    fresh = not (folder / checkpoints.CONFIG).exists()
    if not (folder / REPORT).exists():
        try:
            with Bar(learning.epochs * (2 if own.get("warm_start") == "isotropic" else 1), "epochs") as bar:
                run = Run(command, reading, writing, learning, bar)
                run.config = config
                work(run)
                report = run.write()
        except HATError:
            if fresh and not any((folder / name).exists() for name in (CHECKPOINT, ISOTROPIC)):
                _left(folder)  # so that the corrected command may take it
            raise
        except KeyboardInterrupt:
            err.print("\nstopped. The same command goes on from here", soft_wrap=True)
            raise typer.Exit(130) from None
        checkpoints.write_json(folder / REPORT, report)
    else:
        report = checkpoints.read_json(folder / REPORT)
        out.print(f"{folder} is finished already.", soft_wrap=True)
    for name in (CHECKPOINT, ISOTROPIC):
        (folder / name).unlink(missing_ok=True)
    _show(folder, report)


def _claimed(folder: Path, command: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json is to hold. Raises `ConfigError` where the folder holds a run of other options."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output: {folder} is a file, expected a folder")
    config = {"hatcl": hatcl.__version__, "command": command, "options": json.loads(json.dumps(options))}
    path = folder / checkpoints.CONFIG
    if not path.exists():
        return config
    stored = checkpoints.read_json(path)
    if not isinstance(stored, dict) or not {"command", "options"} <= set(stored):
        raise ConfigError(f"--output: {folder} holds something else than a run of hatcl atlas; name another folder")
    if stored["command"] != command:
        raise ConfigError(f"--output: {folder} holds a run of hatcl atlas {stored['command']}; name another folder")
    for name in sorted({*config["options"], *stored["options"]} - FREE_ON_RESUME):
        was, now = (c["options"].get(name) for c in (stored, config))
        if was != now:
            raise ConfigError(
                f"--output: the run in {folder} was started with --{name.replace('_', '-')} {was}, now came {now}; "
                "give the same options to go on with it, or name another folder"
            )
    return config


def _left(folder: Path) -> None:
    for name in (checkpoints.CONFIG, HEADS):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there is something else in it, or it is not there
        folder.rmdir()


def _show(folder: Path, report: Mapping[str, Any]) -> None:
    out.print(accuracy_table(report["accuracy"]))
    fitted = report["fitted"][report["command"]]
    epoch, last = fitted["epoch"], len(fitted["history"])
    words = {-1: "all zero: the pretrained model is the best", 0: "those of the start"}.get(epoch, f"of epoch {epoch}")
    vectors, groups = report["coefficients"]
    out.print(f"coefficients ({vectors} x {groups}): {words}{f' of {last}' if epoch > 0 else ''}", soft_wrap=True)
    out.print(f"{folder}  ({report['seconds']:.0f} s)", style="dim", soft_wrap=True)
