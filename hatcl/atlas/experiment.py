"""The steps of the `hatcl atlas` commands around a procedure: read, check, learn, measure, write, resume."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from ..calls import Head
from ..data.datasets import absolute_images, read_images
from ..data.images import Images
from ..data.shots import held_out, sample_shots
from ..engine.loop import Progress
from ..engine.measures import accuracy
from ..errors import ConfigError
from ..files import write_files
from ..hat.convert import convert
from ..hat.gates import gates_of
from ..vectors.compose import Composer, compose
from ..vectors.files import write_tensors
from ..vectors.stream import files_read
from ..vectors.task_vector import TaskVector
from ..vectors.tensors import kinds_of
from .files import read_head, read_vector, write_coefficients, write_heads
from .fitting import Fitted
from .heads import ClassHead, prototypes, trained_head
from .linear import Composed, linearised
from .loading import FITTED_HEADS, TEXT, VECTOR_DTYPES, Prompts, Reading, load_pretrained, prompts_of
from .options import AtlasOptions
from .selection import select_blocks
from .tasks import AtlasTask

HEADS, CLASSIFIER, MERGED = "heads.safetensors", "classifier.safetensors", "merged.safetensors"
CHECKPOINT, ISOTROPIC = "checkpoint.pt", "checkpoint-isotropic.pt"


@dataclass(frozen=True)
class Writing:
    """The composition of an experiment and its options.

    Args:
        grain: the groups that share a coefficient: global, block, qkv, row, unit, partition:K, ...
        linearised: compose the model's first-order expansion instead of its weights.
        merge: write the composed model, as merged.safetensors, with BASE's classifier, or the text
            tower of a CLIP model.
    """

    grain: str = "block"
    linearised: bool = False
    merge: bool = False

    def __post_init__(self) -> None:
        if self.linearised and self.merge:
            raise ConfigError("--merge: a linearised composition has no weights of its own; leave one of the two out")


class Loaded:
    """A pretrained encoder, task vectors, and tasks with their images and frozen heads.

    Args:
        reading: the model and the images. seed: seeds the held-out images and partitions.
    """

    def __init__(self, reading: Reading, seed: int) -> None:
        self.reading, self.seed = reading, seed
        self.head_file = None if reading.head in (*FITTED_HEADS, TEXT) else Path(reading.head)
        self.device = reading.device
        self.parts: dict[str, dict[str, Images]] = {}
        self.classes: dict[str, int] = {}
        self.heads: dict[str, ClassHead] = {}
        self.prompts: dict[str, Prompts] = {}

    def read(self, vectors: Mapping[str, Path], data: Mapping[str, str], *, needs_validation: bool = False) -> None:
        """Read everything and check that it fits, before anything is computed or written."""
        reading = self.reading
        tasks = {name: read_images(where) for name, where in data.items()}
        self.pretrained = load_pretrained(reading)
        ours, without = dict(self.pretrained.model.named_parameters()), self.pretrained.classifiers
        self.names = list(vectors)
        self.vectors = [
            read_vector(path, ours, without=without, named=self.pretrained.named).in_memory()
            for path in vectors.values()
        ]
        self.encoder = self.pretrained.model.to(self.device).eval()
        if reading.head == TEXT:
            self.prompts = prompts_of(reading, data, tasks)
        for name, task in tasks.items():
            self.classes[name] = task.num_classes
            prepare = self.pretrained.preparation(reading, task)
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
        texts = [reading.text_from or "", *reading.class_names.values(), *reading.templates.values()]
        self.files = [f for path in read for f in files_read(path)] + [Path(t) for t in texts if Path(t).is_file()]
        self.digests = {absolute_images(data[name]): task.digest() for name, task in tasks.items()}

    def _try(self, path: str, images: Images) -> None:
        """Check that two images pass through the model."""
        x = images.prepare(images.x[:2]).to(self.device)
        try:
            with torch.no_grad():
                self.width = self.encoder(x).shape[-1]
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"{path}: {self.reading.model} does not accept images of {list(x.shape[1:])} "
                f"({str(error).splitlines()[0]}); choose another --size, or give --model-kwargs img_size=..."
            ) from error

    def fit_heads(self, on: Mapping[str, Images] | None = None, stored: Path | None = None) -> None:
        """Make a frozen head for each task from its training images or the given ones, or read it from a file.

        Args:
            stored: the file that keeps the heads; existing ones are read instead.
        """
        file = stored if stored is not None and stored.exists() else self.head_file
        for name, parts in self.parts.items():
            if file is not None:
                head = self._head_from(file, name)
            elif self.pretrained.text_head is not None:
                head = self.pretrained.text_head(*self.prompts[name]).to(self.device)
            else:
                images = (on or {}).get(name, parts["training"])
                fit = trained_head if self.reading.head == "trained" else prototypes
                head = fit(self.encoder, images.batches(self.reading.batch_size), self.classes[name])
            self.heads[name] = head
        if stored is not None and not stored.exists():
            write_heads(stored, self.heads)

    def _head_from(self, file: Path, name: str) -> ClassHead:
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
            unit_map = gates_of(convert(self.encoder, 1, x, verify=False))[0].unit_map
        return compose(
            self.encoder, self.vectors if vectors is None else vectors, grain,
            dtype=VECTOR_DTYPES[self.reading.vector_dtype], unit_map=unit_map, seed=self.seed, check=self.reading.check,
        )  # fmt: skip


class Experiment(Loaded):
    """One procedure on loaded data, and its folder.

    Args:
        name: the procedure's name. folder: the place of heads, checkpoints and coefficients. tell: receives the name of
            the current work, each step, and each epoch's entry of the history.
    """

    def __init__(
        self,
        name: str,
        reading: Reading,
        writing: Writing,
        learning: AtlasOptions,
        folder: Path,
        tell: Callable[[str, Mapping[str, float]], None],
    ) -> None:
        super().__init__(reading, learning.seed)
        self.name, self.writing, self.learning, self.folder, self.tell = name, writing, learning, folder, tell
        self.classifier: nn.Module | None = None
        self.stages: dict[str, Fitted] = {}
        self.rows: dict[str, dict[str, dict[str, float]]] = {}
        self.began = time.monotonic()

    def read(self, vectors: Mapping[str, Path], data: Mapping[str, str], *, needs_validation: bool = False) -> None:
        super().read(vectors, data, needs_validation=needs_validation)
        self.composer = self.compose(self.writing.grain)  # raises if something does not fit

    def fit_heads(self, on: Mapping[str, Images] | None = None, stored: Path | None = None) -> None:
        self.tell("heads", {})
        super().fit_heads(on, stored or self.folder / HEADS)

    def atlas_task(self, name: str) -> AtlasTask:
        """The task for procedures that learn from the held-out images, as published."""
        held = self.parts[name]["validation"]
        size = self.reading.batch_size
        return AtlasTask(name, held.batches(size, shuffle=True), held.batches(size), head=self.heads[name])

    def shots(self, name: str, text: str) -> Images:
        """The shots for a text: `16` of each class, the share `0.1`, or `all` of the training images."""
        images = self.parts[name]["training"]
        if text == "all":
            return images
        try:
            number: int | float = int(text) if text.isdigit() else float(text)
        except ValueError:
            raise ConfigError(
                f"--shots: got {text!r}, expected a number per class, a share such as 0.1, or all"
            ) from None
        ids = sample_shots(torch.from_numpy(images.y), number, seed=self.seed, num_classes=self.classes[name])
        return images.at(ids)

    def keep_best(self, budget: int, by: str, few: Images, head: Head) -> None:
        """Keep only the most informative vectors."""
        self.tell("choosing blocks", {})
        found = select_blocks(
            self.encoder, self.vectors, few.batches(self.reading.batch_size), budget, by=by, head=head, seed=self.seed
        )
        names = [self.names[i] for i in found.chosen[:, 0].tolist()]
        self.names = names if by == "vectors" else [f"mix {i}" for i in range(budget)]
        self.vectors = [v.in_memory() for v in found.vectors]
        self.composer = self.compose(self.writing.grain)

    def learn(self, procedure: Callable[..., Fitted], warm_start: str = "zero") -> None:
        """Learn coefficients, resuming from the folder's checkpoints."""
        how: dict[str, Any] = {}
        if warm_start == "isotropic":
            coarse = self._form(self.compose("global"))
            how["warm_start"] = self._stage("isotropic", procedure, coarse, ISOTROPIC, "search").coefficients
        elif warm_start == "search":
            how["warm_start"] = "search"
        self.composed = self._form(self.composer)
        self._stage(self.name, procedure, self.composed, CHECKPOINT, **how)
        self.tell("measuring", {})

    def _form(self, composer: Composer) -> Composed:
        return linearised(composer) if self.writing.linearised else composer

    def _stage(
        self, name: str, procedure: Callable[..., Fitted], composed: Composed, file: str, warm_start: Any = None
    ) -> Fitted:
        path = self.folder / file
        how = {} if warm_start is None or path.exists() else {"warm_start": warm_start}  # a checkpoint overrides it

        def told(at: Progress) -> None:
            if at.doing == "epoch":
                self.tell(name, {"epoch": at.epoch, **at.measured})
            elif at.doing == "learning":
                self.tell(name, {"epoch": at.epoch, "step": at.step, "loss": at.value, **at.measured})

        self.stages[name] = procedure(composed, checkpoint=path, on_progress=told, **how)
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
                    part: accuracy(
                        self.composed, self.parts[name][part].batches(self.reading.batch_size), head or self.heads[name]
                    )
                    for part in ("validation", "test")
                    if len(self.parts[name][part])
                }
        finally:
            lam.copy_(learned)

    def write(self) -> dict[str, Any]:
        """Write the results of learning and return their figures."""
        write_coefficients(self.folder, self.composer, self.names)
        if self.classifier is not None:
            tensors = {n: t.detach().cpu().contiguous() for n, t in self.classifier.state_dict().items()}
            write_files({self.folder / CLASSIFIER: save(tensors)})
        if self.writing.merge:
            state = {**self.pretrained.rest, **self.composer.merge().state_dict()}
            write_tensors(self.folder / MERGED, kinds_of(state), lambda name: {name: state[name]})
        return {
            "procedure": self.name,
            "vectors": self.names,
            "coefficients": list(self.composer.coefficients.shape),
            "images": {n: {part: len(images) for part, images in p.items()} for n, p in self.parts.items()},
            "classes": self.classes,
            "prompts": {name: dict(zip(("classes", "templates"), p, strict=True)) for name, p in self.prompts.items()},
            "accuracy": self.rows,
            "fitted": {
                name: {k: v for k, v in dataclasses.asdict(f).items() if k not in ("coefficients", "others")}
                for name, f in self.stages.items()
            },
            "seconds": time.monotonic() - self.began,
        }
