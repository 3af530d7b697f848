"""A model card for people and hubs: describes a saved model, the units of each task, and how to load it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from ...config import HATConfig, known_options
from ...errors import ConfigError
from ...functional import score_text, score_unit
from ..describe import describe
from ..gates import gates_of
from ..tasks import tasks

CARD = "README.md"
OURS = "<!-- Written by hatcl when the model was saved. A README.md without this line is left as it is. -->"
LIBRARIES = ("hatcl", "torch", "timm", "transformers", "peft")


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """Information for a model's card that the model does not have; every entry is optional.

    Args:
        names: task -> its name. classes: task -> the names of its classes.
        matrix: `matrix[i][j]` is the score of task j, from 0 to 1, after task i was learned; None = not measured.
        measures: the measure of each task's score, if it is not the share of right answers.
        certificate: one sentence on the proof that the tasks are isolated.
        notes: more paragraphs, in Markdown.

    Raises:
        ConfigError: a task number that the model does not have; a matrix that is not square.
    """

    names: Mapping[int, str] = dataclasses.field(default_factory=dict)
    classes: Mapping[int, Sequence[str]] = dataclasses.field(default_factory=dict)
    matrix: Sequence[Sequence[float | None]] = ()
    measures: Sequence[str] = ()
    certificate: str = ""
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if any(len(row) != len(self.matrix) for row in self.matrix):
            raise ConfigError(
                f"matrix: got rows of {sorted({len(row) for row in self.matrix})} scores for {len(self.matrix)} tasks; "
                "expected one row and one column per task"
            )

    @classmethod
    def of(cls, given: CardFacts | Mapping[str, Any] | None) -> CardFacts:
        """Facts from a mapping. Raises `ConfigError` on an unknown key."""
        if isinstance(given, CardFacts):
            return given
        known_options(cls, given or {})
        return cls(**(given or {}))


def model_card(model: nn.Module, facts: CardFacts) -> str:
    """A converted model's card in Markdown, with the front matter that hubs read.

    Raises:
        ConfigError: facts about a task that the model does not have.
    """
    gates = gates_of(model)[0]
    if wrong := [t for t in {**facts.names, **facts.classes} if t not in range(gates.num_tasks)]:
        raise ConfigError(f"card: got task {wrong[0]!r}, the model has tasks 0 to {gates.num_tasks - 1}")
    done, name = tasks(model), _title_of(model)
    count = sum(p.numel() for p in model.parameters())
    front = ["---", "library_name: hatcl", "tags:", "- hatcl", "- continual-learning", "---", OURS]
    parts = [
        "\n".join(front),
        f"# {name}: {_how_many(done)}",
        f"A {name} that learned its tasks one after another with hatcl, by hard attention to the task (HAT, "
        "[arXiv 1801.01423](https://arxiv.org/abs/1801.01423)). Each task uses some of the network's units. The "
        "outputs of a task do not depend on anything that is not its own, so the tasks learned after it have not "
        f"changed it, not even by a bit. It has room for {gates.num_tasks} tasks and {count:,} parameters.",
        "## Tasks",
        _tasks_table(model, facts),
    ]
    if facts.matrix:
        parts += ["## Scores", _matrix_table(facts)]
    parts += ["## Certificate", facts.certificate or "None was taken when the model was saved."]
    parts += ["Each sealed task was compared with its digest before the model was written. To prove that the "
              "tasks are isolated on your own inputs: `hatcl.certify(model, x)`."]  # fmt: skip
    parts += ["## How to load it", _how_to_load(model, name, done), *facts.notes]
    differing = _unusual(gates.config)
    parts += [
        "## Options",
        f"```json\n{json.dumps(differing, indent=2)}\n```" if differing else "All are the defaults.",
    ]
    parts += ["## Versions", ", ".join(_versions())]
    return "\n\n".join(parts) + "\n"


def writable(path: Path) -> bool:
    """Is there no card yet, or one that still has hatcl's marker line?"""
    try:
        return OURS in path.read_text(errors="replace")
    except OSError:
        return not path.exists()


def _title_of(model: nn.Module) -> str:
    source: Any = gates_of(model)[0].source or {}
    source = source.get("base") or source
    return str(source.get("name") or source.get("class") or type(model).__name__.removeprefix("HAT"))


def _how_many(done: Sequence[int]) -> str:
    return f"{len(done)} task{'' if len(done) == 1 else 's'}" if done else "no task is learned yet"


def _tasks_table(model: nn.Module, facts: CardFacts) -> str:
    described = describe(model)
    rows = [["task", "name", "classes", "units used", "share of the units"]]
    for t, used in described.use.items():
        named = facts.classes.get(t)
        widths = ", ".join(map(str, _widths(model, t))) or "-"
        classes = f"{widths}: {', '.join(map(_escaped, named))}" if named else widths
        share = f"{100 * used / max(described.units, 1):.1f} %"
        rows.append([str(t), _escaped(facts.names.get(t, "-")), classes, f"{used:,} of {described.units:,}", share])
    shares = {k.replace("_", " "): f"{100 * v:.1f} %" for k, v in described.shares.items()}
    told = ", ".join(f"{name} {share}" for name, share in shares.items())
    started: Mapping[int, Sequence[int]] = getattr(described, "lineage", {})  # who carries what was transplanted
    lines = [f"Task {t} carries what was transplanted from {_listed(of)}." for t, of in started.items() if of]
    return "\n\n".join([in_markdown(rows), *lines, f"Elements of the network: {told}."])


def _listed(done: Sequence[int]) -> str:
    return f"task{'' if len(done) == 1 else 's'} {', '.join(map(str, done))}"


def _widths(model: nn.Module, task: int) -> list[int]:
    """The sizes of a task's own heads."""
    gates, names = gates_of(model)[0], {id(p): n for n, p in model.named_parameters()}
    found: dict[str, int] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            entry = None if p is None else gates.unit_map.entries.get(names.get(id(p), ""))
            if entry is not None and entry.head and entry.copied and "hat_tasks" in module._modules:
                own: Any = module.get_submodule(f"hat_tasks.{task}")
                found.setdefault(entry.classes, int(own._parameters[name].shape[0]))
    return list(found.values())


def _matrix_table(facts: CardFacts) -> str:
    names = [_escaped(facts.names.get(t, f"task {t}")) for t in range(len(facts.matrix))]
    rows = [["after learning", *names]]
    for name, scores in zip(names, facts.matrix, strict=True):
        by = [*facts.measures, *[""] * (len(scores) - len(facts.measures))]
        rows.append([name, *(score_text(s, m).replace("·", "-") for s, m in zip(scores, by, strict=True))])
    told = f"Scores {score_unit(facts.measures)}: a row per task learned, a column per task scored."
    return f"{told}\n\n{in_markdown(rows)}"


def _how_to_load(model: nn.Module, name: str, done: Sequence[int]) -> str:
    base = "" if gates_of(model)[0].source is not None else f", base={name}()"
    said = "" if not base else f"  # {name}: the plain module's class, with the arguments that it was made with"
    lines = [
        "import torch, hatcl",
        "",
        'folder = "."  # where this file lies, or the name of the model on the hub',
        f"model = hatcl.from_pretrained(folder{base}){said}",
        "print(hatcl.tasks(model))  # the tasks that are learned",
    ]
    if done:
        lines += [
            f"with hatcl.task(model, {done[0]}), torch.no_grad():",
            "    outputs = model(x)  # x: what the model's forward takes",
            f"small = hatcl.extract_task(model, {done[0]}, x)  # the task alone, as an ordinary smaller model",
        ]
    listed = "\n".join(lines)
    return f"```python\n{listed}\n```"


def _unusual(config: HATConfig) -> dict[str, Any]:
    first = HATConfig().to_dict()
    return {k: v for k, v in config.to_dict().items() if v != first[k]}


def _versions() -> list[str]:
    """Names and versions of the imported libraries."""
    found = []
    for library in LIBRARIES:
        if library in sys.modules or library == "hatcl":
            try:
                found.append(f"{library} {version(library)}")
            except PackageNotFoundError:
                continue
    return found


def in_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its header."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])


def _escaped(text: object) -> str:
    """Text without characters that would end a table cell."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
