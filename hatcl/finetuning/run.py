"""Fine-tuning as a run with a folder, which `hatcl graft` continues from.

    config.json the options, the inputs' digests; at the end, how to rebuild the plain model, and the trained parameters
    pretrained.safetensors the weights at the start, including a new head finetuned.safetensors the weights at the end
    tokenizer/                for a text model metrics.json              scores, history, counts; written last

An unfinished run may also have `checkpoint/`, from which the same call resumes. A finished run still needs the data
file, but neither the model's folder nor its hub.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.published import published_files
from ..engine.folder import CHECKPOINT, CONFIG, METRICS, RunFolder, check_inputs
from ..engine.loop import Tell
from ..engine.state import Standing
from ..errors import ConfigError, HATError, IntegrityError
from ..files import read_json, replaced_folder, sha256_of
from ..integrations.timm_names import timm_source
from ..sources import build_source, source_of
from ..vectors.files import write_tensors
from ..vectors.tensors import FINETUNED, kinds_of, named_tensors
from .loading import load_model, make_task
from .modes import mode_of
from .options import FinetuneOptions, TaskOptions
from .state import load_state, state_of
from .tasks import FinetuneTask
from .tune import finetune_, reached, trained_names

COMMAND = "finetune"
PRETRAINED, TOKENIZER = "pretrained.safetensors", "tokenizer"


@dataclass(frozen=True, eq=False)
class Run:
    """A finished fine-tuning.

    Attributes:
        task: `task.model` is `pretrained`. pretrained, finetuned: the two models, in evaluation mode.
        learning: its options. trained: the trained parameters, which a graft can hold: those of `trained_names` that a
        gradient reached (not a pooler that no logits use).
        metrics: the content of metrics.json. options: the task's options; None = it was made in memory.
    """

    task: FinetuneTask
    pretrained: nn.Module
    finetuned: nn.Module
    learning: FinetuneOptions
    trained: tuple[str, ...]
    metrics: dict[str, Any]
    options: TaskOptions | None = None


def finetune_run(
    options: TaskOptions | FinetuneTask,
    learning: FinetuneOptions | Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    on_progress: Tell | None = None,
    seconds: float = 60.0,
) -> Run:
    """Make the task, fine-tune a copy of its model, measure both, and save them in a folder.

    Args:
        options: the task's options, or a task made in memory (`load_run` then needs it again).
        folder: the run's folder; a finished run with the same options and inputs is read instead, and a killed one
        resumes and ends with the same bits.
        device: where to compute; both models stay there. on_progress: see `finetune_`. seconds: the time between two
            checkpoints.

    Raises:
        ConfigError: options do not fit, or the folder holds something else. IntegrityError: an input file is missing,
            damaged, or has changed since the folder's run. NonFiniteLossError: see `finetune_`.
    """
    chosen = FinetuneOptions().changed(learning)
    given = options if isinstance(options, FinetuneTask) else None
    described = None if isinstance(options, FinetuneTask) else options
    kept = None if folder is None else RunFolder(Path(folder), COMMAND, described_by(described, chosen))
    files = [] if described is None else input_files(described)
    inputs = {} if kept is None else kept.same_inputs(files)
    if kept is not None and kept.finished:
        return load_run(kept.path, task=given, device=device)
    source = None
    if isinstance(options, FinetuneTask):
        made = options
    else:
        model, tokenizer = load_model(options)
        source = _source(options, model)
        made = make_task(options, chosen.seed, model=model, tokenizer=tokenizer)
    names: Sequence[str] = trained_names(made, chosen)
    made.model.to(device)
    began = time.perf_counter()
    finetuned = copy.deepcopy(made.model).eval()
    standing = None if kept is None else Standing(kept.path / CHECKPOINT, dict, seconds)
    before = _scores(made, made.model)
    with contextlib.nullcontext() if kept is None else kept.claimed(inputs=inputs):
        with reached(finetuned) as found:
            history = finetune_(finetuned, made, chosen, on_progress, standing)
        names = [n for n in names if n in found]
        metrics = {
            "task": made.name,
            "measure": made.measure,
            "score": {"pretrained": before, "finetuned": _scores(made, finetuned)},
            "commonest": {part: made.constant_score(part) for part in before},
            "examples": {part: len(made.part(part)) for part in ("train", "validation", "test")},
            "classes": list(made.labels),
            "trained": _count_moved(made.model, finetuned, names),
            "history": history,
            "seconds": time.perf_counter() - began,
        }
        run = Run(made, made.model, finetuned, chosen, tuple(names), metrics, described)
        if kept is not None:
            _write_run(kept, run, source)
    return run


def save_run(folder: str | Path, run: Run, source: Mapping[str, Any] | None = None) -> None:
    """Write the folder of a run made in memory.

    Args:
        source: how to rebuild the plain model (`hatcl.sources`); None = `load_run` needs the task.

    Raises:
        ConfigError: the folder is not empty. IntegrityError: an input file is missing, or the disk is full.
    """
    kept = RunFolder(Path(folder), COMMAND, described_by(run.options, run.learning), resume=False)
    with kept.claimed(inputs=kept.same_inputs([] if run.options is None else input_files(run.options))):
        _write_run(kept, run, source)


def _write_run(kept: RunFolder, run: Run, source: Mapping[str, Any] | None) -> None:
    """Write both models and what they need, then the metrics, which mark the run as finished."""
    for file, model in ((PRETRAINED, run.pretrained), (FINETUNED, run.finetuned)):
        state = state_of(model)
        write_tensors(kept.path / file, kinds_of(state), lambda name, state=state: {name: state[name]})  # type: ignore[misc]
    if run.task.tokenizer is not None:
        with replaced_folder(kept.path / TOKENIZER) as new:
            run.task.tokenizer.save_pretrained(str(new))
    kept.note(source=source, trained=list(run.trained))
    kept.finish(run.metrics)


def load_run(folder: str | Path, *, task: FinetuneTask | None = None, device: torch.device | str = "cpu") -> Run:
    """A run as it was saved: both models bit for bit, and the same examples.

    Args:
        task: needed for a run made in memory, or a model class that cannot be rebuilt; its model gets the run's
            pretrained weights.

    Raises:
        IntegrityError: a file is missing or damaged, or the data file has changed since the run. ConfigError: there is
            no run, or it needs `task`. VectorError: the task's model does not fit.
    """
    path = Path(folder)
    config = _config(path)
    names = {f.name for f in dataclasses.fields(FinetuneOptions)}
    learning = FinetuneOptions().changed({n: v for n, v in config["options"].items() if n in names})
    described = {n: v for n, v in config["options"].items() if n not in names}
    options = _task_options(path, described) if described else None
    stored = named_tensors(path / PRETRAINED)
    if task is None:
        if options is None or config["source"] is None:
            raise ConfigError(
                f"{path}: its model or data came from memory; pass the task that it was made with: load_run(..., task=)"
            )
        check_inputs(path, config["inputs"], {str(f): sha256_of(f) for f in data_files(options)})
        task = _remade(path, config, options, learning, stored)
    load_state(task.model, stored, str(path / PRETRAINED))
    task.model.to(device).eval()
    finetuned = copy.deepcopy(task.model)
    load_state(finetuned, named_tensors(path / FINETUNED), str(path / FINETUNED))
    return Run(task, task.model, finetuned, learning, tuple(config["trained"]), read_json(path / METRICS), options)


# --- the parts of a run ---


def input_files(options: TaskOptions) -> list[Path]:
    """The input files of a task: data, weights, and the model's folder if it is one."""
    paths = [*data_files(options), *([Path(options.weights)] if options.weights is not None else [])]
    model = Path(options.model)
    if mode_of(options.mode).texts and model.is_dir():
        paths += sorted(f for f in model.iterdir() if f.is_file())
    return paths


def data_files(options: TaskOptions) -> list[Path]:
    """The files of the examples; none if they come from the hub."""
    if options.data is None:
        return []
    return published_files(options.data) if Path(options.data).is_dir() else [Path(options.data)]


def with_absolute_paths(options: TaskOptions) -> TaskOptions:
    """The options with absolute paths, as config.json holds them; a name on a hub stays as it is."""
    model = Path(options.model)
    return dataclasses.replace(
        options,
        data=None if options.data is None else str(Path(options.data).absolute()),
        weights=None if options.weights is None else str(Path(options.weights).absolute()),
        model=str(model.absolute()) if mode_of(options.mode).texts and model.is_dir() else options.model,
    )


def described_by(options: TaskOptions | None, learning: FinetuneOptions) -> dict[str, Any]:
    """The options in the form of config.json: those of the task, unless it was made in memory, and those of
    learning."""
    return {**({} if options is None else with_absolute_paths(options).to_dict()), **dataclasses.asdict(learning)}


def _config(path: Path) -> dict[str, Any]:
    if not (path / CONFIG).exists():
        raise ConfigError(f"{path} holds no run of hatcl finetune (no {CONFIG}); name the folder of one")
    config: dict[str, Any] = read_json(path / CONFIG)
    if config.get("command") != COMMAND:
        raise ConfigError(f"{path} holds something other than a run of hatcl finetune; name another folder")
    if not (path / METRICS).exists():
        raise ConfigError(f"{path}: this run is not finished; resume it with: hatcl finetune --resume --output {path}")
    missing = {"inputs", "source", "trained"} - set(config)
    if missing:
        raise IntegrityError(f"{path / CONFIG} lacks {', '.join(sorted(missing))}; it was edited. Copy the run again")
    return config


def _task_options(path: Path, fields: Mapping[str, Any]) -> TaskOptions:
    try:
        return TaskOptions(**fields)
    except TypeError as error:
        raise IntegrityError(
            f"{path / CONFIG}: no task can be made from it ({error}); was it edited, or written by a newer hatcl?"
        ) from error


def _source(options: TaskOptions, model: nn.Module) -> dict[str, Any] | None:
    if mode_of(options.mode).texts:
        return source_of(model)
    kept = {k: v for k, v in options.model_kwargs.items() if not k.startswith("pretrained")}
    return timm_source(options.model, {**kept, "num_classes": model.num_classes})


@torch.no_grad()
def _remade(
    path: Path, config: Mapping[str, Any], options: TaskOptions, learning: FinetuneOptions, stored: Mapping[str, Any]
) -> FinetuneTask:
    """The task with a plain model and the run's pretrained weights; a new head gets its weights afterwards."""
    try:
        plain = build_source(config["source"])
    except HATError:
        raise
    except Exception as error:  # any error that a library raises for an edited or newer config
        raise IntegrityError(f"{path / CONFIG}: no model can be made from it ({error}); was it edited?") from error
    kinds = kinds_of(stored)
    for name, t in state_of(plain).items():
        if name in kinds and kinds[name].shape == tuple(t.shape):
            t.copy_(stored[name])
    tokenizer = None
    if mode_of(options.mode).texts:
        import transformers

        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(path / TOKENIZER))
        except (OSError, ValueError, KeyError) as error:
            raise IntegrityError(f"{path / TOKENIZER}: no tokenizer can be read from it ({error})") from error
    made = make_task(dataclasses.replace(options, head="random"), learning.seed, model=plain, tokenizer=tokenizer)
    return dataclasses.replace(made, fixed_head=made.fixed_head or options.head == "fitted")


# --- measures ---


def _scores(task: FinetuneTask, model: nn.Module) -> dict[str, float]:
    return {part: task.score(model, part) for part in ("validation", "test") if len(task.part(part))}


@torch.no_grad()
def _count_moved(pretrained: nn.Module, finetuned: nn.Module, names: list[str]) -> dict[str, Any]:
    """The number of trained elements, and how many of them changed."""
    before, after = dict(pretrained.named_parameters()), dict(finetuned.named_parameters())
    changed = sum(int((before[n] != after[n]).sum()) for n in names)
    return {"tensors": len(names), "elements": sum(before[n].numel() for n in names), "changed": changed}
