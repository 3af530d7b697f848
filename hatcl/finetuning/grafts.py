"""Grafts of a fine-tuning run: the tensors that take part, how a graft is made or read, and how it is measured."""

from __future__ import annotations

import dataclasses
import functools
import glob
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.images import Images, npz_task
from ..data.texts import read_texts
from ..engine import folder as checkpoints
from ..engine.measures import Predictions, agreement, commonest_share, gain_kept, predictions_of
from ..errors import ConfigError, GraftError, IntegrityError
from ..files import complete, replaced_folder, sha256_of
from ..grafts import Graft, GraftOptions, GraftScores, LearnedGraft, candidates, learn_graft, select_graft
from ..grafts import files as graft_files
from ..grafts.checks import size_of
from ..hat.convert import convert
from ..hat.gates import gates_of
from ..map.grains import make_grain
from ..map.units import UnitMap
from ..vectors.tensors import FINETUNED
from .measuring import MEASURES
from .run import PRETRAINED, Run
from .tasks import Examples

GRAFT_RULES = ("learned", "magnitude", "random")
FROM_FILE = "mask"  # the rule for a graft that is read from a file
CHOOSE = ("loss", "score")
ABOUT, MEASURED, GRAFT, SCORES = "about.json", "measured.json", "graft.safetensors", "scores.safetensors"
HISTORY = "history.json"
MODELS = ("pretrained", "finetuned")
GraftTold = Callable[[str, Mapping[str, float]], None]  # (the graft's name, an entry of its history)
EVALUATION_BATCH = 64  # test examples per forward; affects only memory


@dataclass(frozen=True)
class Wanted:
    """One graft of the table: its rule and its size."""

    by: str
    sparsity: float
    grain: str = "element"
    per_layer: bool = False

    @property
    def rule(self) -> str:
        """The name of its line in the picture."""
        return " ".join([self.by, *[self.grain] * (self.grain != "element"), *["per layer"] * self.per_layer])

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.rule.replace(' ', '-').replace(':', '-')}_{self.sparsity:g}"


class Parts:
    """The tensors of a run's models that take part in a graft. A new head that takes no part is set to the fine-tuned
    one in both models, since the pretrained model has none.

    Args:
        fix_head: None = new heads that fine-tuning has trained. only, skip: patterns of names.

    Raises:
        ConfigError: a pattern matches nothing, or no tensor is left.
    """

    def __init__(
        self, run: Run, *, fix_embeddings: bool, fix_head: bool | None, only: Sequence[str], skip: Sequence[str]
    ) -> None:
        task, trained = run.task, set(run.trained)
        head = set(task.head) if (fix_head if fix_head is not None else trained & set(task.fresh)) else set()
        out = head | (set(task.embeddings) if fix_embeddings else set())
        matched = candidates(run.pretrained, run.finetuned, only, skip)
        self.names = [n for n in matched if n in trained and n not in out]
        self.given = sorted(head & set(task.fresh) & trained)
        if not self.names:
            raise ConfigError(
                f"--only, --skip, --fix-embeddings, --fix-head: nothing is left of the {len(trained)} tensors that "
                f"fine-tuning has trained ({', '.join(sorted(trained)[:3])}{', ...' if len(trained) > 3 else ''})"
            )
        with torch.no_grad():
            for name in self.given:
                run.pretrained.get_parameter(name).copy_(run.finetuned.get_parameter(name))

    def to_dict(self) -> dict[str, Any]:
        return {"tensors": self.names, "finetuned_head": self.given}


# --- making grafts ---


class GraftMaker:
    """Makes the grafts of one command, and keeps each in its own folder.

    Args:
        start: the graft or scores that learning starts from; for the rule `mask`, the graft to measure. file: its file.
        choose: keep the mask with the lowest `loss` on the training examples, or with the highest `score` on training
            and validation examples, by the task's measure. keep_scores: also keep the logits of a learned graft.
    """

    def __init__(
        self,
        run: Run,
        parts: Parts,
        options: GraftOptions,
        batch_size: int,
        inputs: Mapping[str, str],
        start: Graft | GraftScores | None = None,
        file: Path | None = None,
        choose: str = CHOOSE[0],
        keep_scores: bool = False,
    ) -> None:
        self.run, self.parts, self.options, self.batch_size = run, parts, options, batch_size
        self.inputs, self.start, self.file = dict(inputs), start, file
        self.choose, self.keep_scores = choose, keep_scores

    def check(self, wanted: Iterable[Wanted]) -> None:
        """Check the requested grafts before any is made.

        Raises:
            GraftError: a sparsity selects nothing or everything. ConfigError: a grain is unknown.
        """
        shapes = {name: tuple(self.run.pretrained.get_parameter(name).shape) for name in self.parts.names}
        total = sum(math.prod(shape) for shape in shapes.values())
        for w in wanted:
            if w.by != FROM_FILE:
                size_of(w.sparsity, total)
            if w.grain != "unit":
                make_grain(w.grain, shapes)

    def kept(self, folder: Path, wanted: Wanted) -> Graft | None:
        """The graft that the folder holds; None if it holds none.

        Raises:
            ConfigError: the folder holds a graft that was made with other settings, or without the scores to keep.
        """
        at = complete(folder / wanted.name)
        if not at.exists():
            return None
        if not (at / ABOUT).exists():
            raise ConfigError(f"--output: {at} holds something other than a graft; name another folder")
        checkpoints.check_same_run(at, checkpoints.read_json(at / ABOUT), self.about(wanted))
        if self.keep_scores and wanted.by == "learned" and not (at / SCORES).exists():
            raise ConfigError(
                f"--keep-scores: {at} was made without scores; name another folder (--output), or remove {at}"
            )
        return Graft.load(at / GRAFT)

    def keep(self, folder: Path, wanted: Wanted, tell: GraftTold) -> Graft:
        """Make the graft and write its folder, all or nothing; `tell` is called at each step."""
        graft = self.make(wanted, tell)
        with replaced_folder(folder / wanted.name) as new:
            graft.save(new / GRAFT)
            if isinstance(graft, LearnedGraft):
                if self.keep_scores and graft.scores is not None:
                    graft.scores.save(new / SCORES)
                checkpoints.write_json(new / HISTORY, {"step": graft.step, "history": graft.history})
                graft = dataclasses.replace(graft, scores=None)  # one float per participating element
            checkpoints.write_json(new / ABOUT, self.about(wanted))
        return graft

    def make(self, wanted: Wanted, tell: GraftTold) -> Graft:
        run, names = self.run, [glob.escape(name) for name in self.parts.names]
        if wanted.by == FROM_FILE:
            return self._from_file(wanted)
        if wanted.by != "learned":
            return select_graft(
                run.pretrained, run.finetuned, wanted.sparsity, wanted.by, per_layer=wanted.per_layer,
                grain=wanted.grain, unit_map=self.unit_map if wanted.grain == "unit" else None, only=names,
                seed=self.options.seed,
            )  # fmt: skip

        task, size = run.task, self.batch_size
        batches: Iterable[Any] = task.batches("train", size)
        if self.options.accumulate is not None:  # so that steps do not always see the same few
            ids = torch.arange(len(task.train))
            collate = functools.partial(task.batch, "train")
            batches = torch.utils.data.DataLoader(ids, size, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
        validate = self.score if self.choose == "score" else None
        return learn_graft(
            run.pretrained, run.finetuned, task.loss, batches, wanted.sparsity, start=self.start,
            validate=validate, only=names, options=self.options, on_progress=lambda entry: tell(wanted.name, entry),
        )  # fmt: skip

    @functools.cached_property
    def unit_map(self) -> UnitMap:
        """The map of the run's model."""
        inputs = self.run.task.batch("train", [0, 1])[0]
        return gates_of(convert(self.run.pretrained, 1, inputs, verify=False))[0].unit_map

    def sample(self) -> Examples:
        """As many training examples as a step uses, always the same ones."""
        seen = self.options.accumulate
        return some(self.run.task.train, None if seen is None else seen * self.batch_size)

    def score(self, model: nn.Module) -> float:
        """The sum of training and validation score, as published: with few examples, one alone has many ties."""
        task = self.run.task
        total = task.score(model, self.sample())
        return total + (task.score(model, "validation") if len(task.validation) else 0.0)

    def about(self, wanted: Wanted) -> dict[str, Any]:
        """The settings of a graft, stored next to it and compared on resuming."""
        made: dict[str, Any] = {"graft": dataclasses.asdict(wanted), "inputs": self.inputs}
        if self.file is not None and wanted.by in (FROM_FILE, "learned"):
            made["mask"] = {"file": self.file.name, "sha256": sha256_of(self.file)}
        if wanted.by != FROM_FILE:
            made["parts"] = self.parts.to_dict()
        if wanted.by == "learned":
            made["learning"] = {
                **dataclasses.asdict(self.options), "batch_size": self.batch_size, "choose": self.choose
            }  # fmt: skip
        if wanted.by == "random" or wanted.grain.startswith("partition"):
            made["learning"] = {"seed": self.options.seed}
        return made

    def _from_file(self, wanted: Wanted) -> Graft:
        found = self.start
        assert found is not None and self.file is not None
        if isinstance(found, GraftScores):
            found = found.graft(wanted.sparsity)
        try:
            graft = found.bits().fill(self.run.finetuned)
            with graft.applied(self.run.pretrained):
                return graft
        except (GraftError, IntegrityError) as error:
            raise GraftError(f"{self.file}: was it made for another model? {error}") from error


def read_mask(path: Path) -> Graft | GraftScores:
    """Read a file of bits or scores.

    Raises:
        GraftError: the file holds neither. IntegrityError: it is missing or damaged.
    """
    return GraftScores.load(path) if graft_files.held_by(path) == graft_files.SCORES else Graft.load(path)


# --- measuring grafts ---


class Scene:
    """The test examples, also those of other distributions, and the models' predictions for them.

    Args:
        ood: files with the same labels. test: use at most this many examples of each.

    Raises:
        ConfigError: there are no test examples, a file's labels are not the task's, or the task is a regression.
    """

    def __init__(self, run: Run, ood: Sequence[Path], test: int | None, bins: int) -> None:
        self.run, self.bins = run, bins
        self.sets: dict[str, Examples] = {"": some(run.task.test, test)}
        if not len(run.task.test):
            raise ConfigError("the run has no test examples; fine-tune on a data file that has test examples")
        if run.task.regression:
            raise ConfigError(
                f"task {run.task.name}: hatcl graft measures classification, but this is a regression; learn its "
                "graft in Python (hatcl.learn_graft with run.task.loss and run.task.batches('train')), and measure "
                "it with run.task.score(model)"
            )
        digests = {}
        for path in ood:
            name = path.parent.name if path.stem == "data" and path.parent.name else path.name.split(".")[0]
            if name in self.sets:
                raise ConfigError(f"--ood: two files are named {name!r}; rename one of them")
            self.sets[name] = some(further(run, path), test)
            digests[name] = sha256_of(path)
        self.settings = {"test": test, "bins": bins, "ood": digests}
        self._said: dict[str, dict[str, Predictions]] = {}

    def model(self, name: str) -> dict[str, Any]:
        """The row of the pretrained or the fine-tuned model."""
        return self._row(self._of(name))

    def graft(self, graft: Graft) -> dict[str, Any]:
        """The row of a graft, without the values that depend on other rows."""
        with graft.applied(self.run.pretrained):
            said = self._predicted(self.run.pretrained)
        row = self._row(said)
        row["agreement"] = agreement(said[""], self._of("finetuned")[""])
        return {**row, "size": graft.size, "numel": graft.numel}

    def _of(self, name: str) -> dict[str, Predictions]:
        if name not in self._said:
            self._said[name] = self._predicted(getattr(self.run, name))
        return self._said[name]

    def _predicted(self, model: nn.Module) -> dict[str, Predictions]:
        task = self.run.task
        return {n: predictions_of(model, task.batches(x, EVALUATION_BATCH), task.logits) for n, x in self.sets.items()}

    def _row(self, said: Mapping[str, Predictions]) -> dict[str, Any]:
        own = said[""]
        calibration = own.calibration(self.bins)
        return {
            "score": MEASURES[self.run.task.measure].of(own.probabilities, own.labels), "accuracy": own.accuracy,
            "commonest": commonest_share(own.labels.tolist()) if own.labels.dim() == 1 else None,
            "f1": own.f1, "ece": calibration.ece, "mce": calibration.mce, "calibration": calibration.to_dict(),
            "ood": {n: p.accuracy for n, p in said.items() if n},
        }  # fmt: skip


def further(run: Run, path: Path) -> Examples:
    """The test examples of another file, read like the run's task.

    Raises:
        ConfigError: the labels are not the task's.
    """
    task, options = run.task, run.options
    if isinstance(task.test, Images):
        other = npz_task(path)
        if other.num_classes != len(task.labels):  # labels are renumbered, so fewer classes could not be matched
            raise ConfigError(
                f"--ood: {path} has {other.num_classes} classes, expected the {len(task.labels)} of {task.name}"
            )
        return Images(other.x_test, other.y_test, task.test.prepare)
    data = read_texts(path) if options is None else read_texts(path, shots_seed=options.file_seed)
    if options is not None and options.plain:
        data = data.plain()
    unknown = next((y for _, y in data.test if y not in task.labels), None)
    if unknown is not None:
        raise ConfigError(f"--ood: {path} has the label {unknown!r}, expected one of {', '.join(task.labels)}")
    return data.test


def some(data: Examples, count: int | None) -> Examples:
    """At most this many examples, always the same random ones."""
    if count is None or count >= len(data):
        return data
    ids = sorted(random.Random(0).sample(range(len(data)), count))
    return data.at(torch.tensor(ids)) if isinstance(data, Images) else [data[i] for i in ids]


def measured(path: Path, settings: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row stored in a file, if it was measured with the same settings; otherwise measure and store it."""
    now = json.loads(json.dumps(settings))
    stored = checkpoints.read_json(path) if path.exists() else {}
    if stored.get("settings") != now:
        stored = {"settings": now, "row": measure()}
        checkpoints.write_json(path, stored)
    row: dict[str, Any] = stored["row"]
    return row


def with_gain(row: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A graft's row with the share of the fine-tuning gain that it keeps, by the task's measure."""
    before, after = (models[name] for name in MODELS)
    return {
        **row,
        "gain_kept": gain_kept(before["score"], after["score"], row["score"]),
        "ood_gain_kept": {n: gain_kept(before["ood"][n], after["ood"][n], v) for n, v in row["ood"].items()},
    }


def inputs_of(folder: Path) -> dict[str, str]:
    """The digests of the files that a run's grafts depend on."""
    return {name: sha256_of(folder / name) for name in (PRETRAINED, FINETUNED)}
