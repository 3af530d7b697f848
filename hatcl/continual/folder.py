"""A run's folder: the results of each task, and the state from which an interrupted run resumes.

    config.json       command, options, method, tasks, digest of the base model
    tasks/0_NAME/     adapter/ (peft's own format), scores.safetensors and .csv, cumulative.*, config.json
    checkpoint/ the newest state: model.safetensors (everything trained, and buffers) or model/ (a model with gates that
    is trained as a whole), method/, optimizer.pt (one for all tasks), progress.json learning_0.pt the loop's state in
    the middle of a stage model/ the model of a finished run with gates, as written by hatcl.save_pretrained, instead of
    checkpoint/ metrics.json the matrix and its measures, once the run is finished seconds.json      the time spent

Everything is written next to its target and renamed. Only `seconds.json` differs between two runs of the same seed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..engine import folder as checkpoints
from ..engine import measures
from ..engine.folder import METRICS
from ..engine.state import kept_whole
from ..errors import ConfigError, IntegrityError, SkillError
from ..files import complete, replaced_folder
from ..hat.saving.card import in_markdown
from ..hat.saving.pretrained import is_converted, load_pretrained_, save_pretrained
from ..skills.ilora_files import base_digest, tensors_digest
from ..skills.switch import of_adapters
from ..skills.tensors import adapters_of, skill_tensors
from .methods.registry import Method
from .options import FREE

CHECKPOINT, MODEL, SECONDS, TASKS = "checkpoint", "model", "seconds.json", "tasks"
STATE, METHOD, PROGRESS, ADAPTER, WEIGHTS = "model.safetensors", "method", "progress.json", "adapter", "weights"
PROVED = {
    True: "Exact: with everything that does not belong to a task overwritten by large random values, the outputs "
    "of every task were the same bit for bit.",
    False: "NOT exact: outputs moved when everything that does not belong to a task was overwritten. See metrics.json.",
}
MIDWAY = "learning_{}.pt"  # the state of a stage's loop


def base_of(model: nn.Module) -> str:
    """A digest of the base model under the adapters; for a model without LoRA, of all parameters that the run starts
    from."""
    return base_digest(model) if adapters_of(model) else tensors_digest(dict(model.named_parameters()))


def learned_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that learning changes: all adapters' tensors, everything else that requires a gradient, and the
    buffers."""
    out: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        if p.requires_grad or of_adapters(name):
            out[name] = p
    out |= dict(model.named_buffers())
    return out


def write_state(model: nn.Module, path: Path) -> None:
    """`learned_state` as a safetensors file; tensors that share memory are written once each."""
    save_file({n: t.detach().cpu().contiguous().clone() for n, t in learned_state(model).items()}, path)


@torch.no_grad()
def read_state(model: nn.Module, path: Path) -> None:
    """Restore the tensors that `write_state` wrote.

    Raises:
        SkillError: tensors are missing or have another shape; the text names them. IntegrityError: the file is damaged.
    """
    try:
        stored = load_file(path)
    except Exception as error:  # safetensors' own error has no narrower base class
        raise IntegrityError(f"{path} cannot be read ({error}); start the run again in another folder") from error
    ours = learned_state(model)
    wrong = [f"{n} is missing" for n in stored if n not in ours] + [f"{n} is new" for n in ours if n not in stored]
    wrong += [
        f"{n} is {list(stored[n].shape)}, the model's {list(t.shape)}"
        for n, t in ours.items()
        if n in stored and t.shape != stored[n].shape
    ]
    if wrong:
        raise SkillError(
            f"{path} holds other tensors than the model: {'; '.join(wrong[:4])}{' ...' if len(wrong) > 4 else ''}; "
            "continue with the model and the LoRA options that the run was started with"
        )
    for name, t in ours.items():
        t.copy_(stored[name])


def write_model(model: nn.Module, folder: Path) -> None:
    """Write the model state that a run resumes from: a model with gates that is trained as a whole as by
    `hatcl.save_pretrained`, so that every command can read it; for other models, whose base may be large, only the
    tensors that learning changes."""
    if is_converted(model) and not adapters_of(model):
        save_pretrained(model, folder / MODEL)
    else:
        write_state(model, folder / STATE)


def read_model(model: nn.Module, folder: Path) -> None:
    """Restore the state that `write_model` wrote.

    Raises:
        SkillError, IntegrityError: as `read_state` and `hatcl.from_pretrained`.
    """
    if (folder / MODEL).exists():
        load_pretrained_(model, folder / MODEL, grow=True)
    else:
        read_state(model, folder / STATE)


def save_model(run: Path, model: nn.Module, metrics: Mapping[str, Any], without: Collection[int] = ()) -> None:
    """Replace a finished run's model by this one, all or nothing, with a card that has the run's scores.

    Args:
        metrics: as in metrics.json. without: tasks that have been forgotten.
    """
    gone = {*metrics.get("forgotten", ()), *without}
    names, rows = metrics["tasks"], metrics["matrix"]
    scores = [[None if {i, j} & gone else score for j, score in enumerate(row)] for i, row in enumerate(rows)]
    card: dict[str, Any] = {"names": {i: n for i, n in enumerate(names) if i not in gone}, "matrix": scores}
    card["measures"] = metrics.get("scored_by", [])
    if not gone and "exact" in metrics["details"]:
        card["certificate"] = PROVED[bool(metrics["details"]["exact"])]
    card["notes"] = _records(run, card["names"])
    with replaced_folder(run / MODEL) as new:
        save_pretrained(model, new, card=card)


def _records(run: Path, names: Mapping[int, str]) -> list[str]:
    """The data, commit and versions that each task was learned with, for the card."""
    rows = []
    for i, name in names.items():
        path = run / TASKS / task_folder(i, name) / checkpoints.CONFIG
        made = checkpoints.read_json(path).get("record") if path.exists() else None
        if made is None:
            continue
        commit = f"{made['commit'][:12]}{', with changes' if made['changed'] else ''}" if "commit" in made else "-"
        versions = ", ".join(f"{library} {number}" for library, number in made["versions"].items())
        rows.append([str(i), str(made["examples"][name]), str(made["data"][name])[:16] or "-", commit, versions])
    if not rows:
        return []
    table = in_markdown([["task", "training examples", "SHA-256 of its data", "commit", "versions"], *rows])
    return ["## Record of each task", f"{table}\n\nAll options are in the run's `tasks/*/config.json`."]


def find_model(run: Path) -> Path:
    """The folder with the newest complete model of a run: the finished one, else the checkpoint's, else `run` itself if
    `hatcl.save_pretrained` wrote it.

    Raises:
        IntegrityError: there is none.
    """
    for folder in (complete(run / MODEL), complete(run / CHECKPOINT) / MODEL, run):
        if (folder / STATE).exists():
            return folder
    raise IntegrityError(
        f"{run} holds no model with gates; expected the folder of a run (hatcl train --method hat --output {run}; a "
        "run with LoRA must be finished), or one written by hatcl.save_pretrained"
    )


def claim(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json into a new folder, or add to the one that `hatcl train` has written."""
    path = folder / checkpoints.CONFIG
    stored = checkpoints.read_json(path) if path.exists() else {"command": "learn_sequence", **config}
    if "learning" not in stored:
        facts = {**config, "learning": config["options"], "options": stored["options"]}
        checkpoints.write_json(path, {**stored, **facts})


def check(folder: Path, config: dict[str, Any]) -> None:
    """Check that the folder is free or holds this run.

    Raises:
        SkillError: the run was started with another base model or adapter. IntegrityError: it was started with other
            data of the same name. ConfigError: it was started with other options or tasks, or the folder holds
            something else.
    """
    stored = checkpoints.stored_config(folder)
    if stored is None:
        return
    began = (folder / TASKS).exists() or complete(folder / CHECKPOINT).exists()
    if stored["command"] not in ("train", "learn_sequence") or (began and "learning" not in stored):
        raise ConfigError(f"folder: {folder} holds something other than a run of learn_sequence; name another folder")
    if "learning" not in stored:
        return
    if stored["base"] != config["base"]:
        raise SkillError(
            f"{folder}: the run was started from another base model (digest {stored['base'][:12]}, now got "
            f"{config['base'][:12]}); load the same base model, or name another folder"
        )
    if stored["tensors"] != config["tensors"]:
        was, now = stored["tensors"], config["tensors"]
        name = next(n for n in sorted({*was, *now}) if was.get(n) != now.get(n))
        raise SkillError(
            f"{folder}: the run was started with other LoRA options: {name} was {was.get(name, 'missing')} and is "
            f"now {now.get(name, 'missing')}; give the same rank and targets, or name another folder"
        )
    for was, now in zip(stored["tasks"], config["tasks"], strict=False):
        if was["name"] == now["name"] and was.get("digest", "") != now["digest"]:
            raise IntegrityError(
                f"{folder}: the data of the task {now['name']} has changed since the run was started; restore it, "
                "or name another folder"
            )
    first = {**{key: stored.get(key) for key in config}, "options": _bound(stored["learning"])}
    checkpoints.check_same_run(folder, first, {**config, "options": _bound(config["options"])})


def _bound(options: dict[str, Any]) -> dict[str, Any]:
    """The options that a resumed run must not change."""
    return {name: value for name, value in options.items() if name not in FREE}


def write_task(folder: Path, name: str, model: nn.Module, method: Method, about: dict[str, Any]) -> None:
    """Write the results of a finished task as one folder, all or nothing.

    Args:
        name: the folder's name, see `task_folder`. about: the content of its config.json.
    """
    with replaced_folder(folder / TASKS / name) as new:
        names = method.adapters(model)
        if names != []:
            with method.saving(model):
                write_adapter(model, new / ADAPTER, names)
        for kind, scores in method.scores().items():
            scores.save(new / f"{kind}.safetensors")
        method.write(model, new)
        tidy_adapters(new)
        (new / checkpoints.CONFIG).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")


def write_adapter(model: nn.Module, folder: Path, names: list[str] | None = None) -> None:
    """Write adapters in peft's own format, or the learned weights of a model without LoRA as `weights.safetensors`."""
    peft = _peft_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    if peft is None:
        tensors = {n: p.detach().cpu().contiguous().clone() for n, p in skill_tensors(model).items()}
        save_file(tensors, folder / f"{WEIGHTS}.safetensors")
        return
    if callable(peft.active_adapters):  # transformers' own add_adapter saves only the active one
        peft.save_pretrained(str(folder))
    else:
        chosen = [n for n in (names or peft.active_adapters) if n in adapters_of(peft)]
        peft.save_pretrained(str(folder), selected_adapters=chosen, save_embedding_layers=False)
    tidy_adapters(folder)


def tidy_adapters(folder: Path) -> None:
    """Make the same adapters the same bytes: sort the targets, a set that peft writes in any order, and remove peft's
    empty model card."""
    for path in sorted(folder.rglob("adapter_config.json")):
        content = {
            k: sorted(v) if k in _SETS and isinstance(v, list) else v for k, v in checkpoints.read_json(path).items()
        }
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    for path in folder.rglob("README.md"):
        path.unlink()


def task_folder(index: int, name: str) -> str:
    """The folder of a task, such as `0_sst-2`; characters other than letters, digits, dot, dash and underscore are
    replaced."""
    return f"{index}_{re.sub(r'[^A-Za-z0-9._-]', '_', name)}"


_SETS = ("target_modules", "modules_to_save", "exclude_modules", "layers_to_transform")


def _peft_model(model: nn.Module) -> Any:
    """The PeftModel that a model is or contains, or a transformers model with its own peft adapters."""
    for module in model.modules():
        if hasattr(module, "peft_config") and hasattr(module, "save_pretrained") and adapters_of(module):
            return module
    return None


# --- forgetting a task ---


def drop_task(run: Path, task: int) -> None:
    """Remove a forgotten task from a finished run of `hat`: its folder and its lines of metrics.jsonl are deleted; in
    metrics.json its name stays, its row and column of the matrix become empty, and the measures cover the other tasks.

    Raises:
        IntegrityError: metrics.json does not belong to a run of `hat`.
    """
    path = run / METRICS
    content = checkpoints.read_json(path)
    with kept_whole(path):
        gone = sorted({*content.get("forgotten", ()), task})
        details, rows, names = content["details"], content["matrix"], content["tasks"]
        if task < len(names):
            content["facts"][task], content["losses"][task] = {}, [None, None]
        for i, row in enumerate(rows):
            rows[i] = [None if i in gone or j in gone else value for j, value in enumerate(row)]
        stay = [i for i in range(len(rows)) if i not in gone]
        if task < len(content.get("commonest", [])):
            content["commonest"][task] = None
        left = measures.matrix([[_score(rows[i][j]) for j in stay] for i in stay]) if stay else None
        for name in ("average_accuracy", "forgetting", "backward_transfer"):
            content[name] = None if left is None else getattr(measures, name)(left)
        for layer in details["layers"]:
            layer["used"].pop(str(task), None)
            layer.pop("free", None)  # it has grown; hatcl describe counts the free units
        for i, row in enumerate(details.get("overlap", [])):
            row[:] = [None if task in (i, j) else value for j, value in enumerate(row)]
        details["max_abs_diff"].pop(str(task), None)
    if task < len(names):
        shutil.rmtree(run / TASKS / task_folder(task, names[task]), ignore_errors=True)
        for i in stay:
            about = run / TASKS / task_folder(i, names[i]) / checkpoints.CONFIG
            told = checkpoints.read_json(about)
            checkpoints.write_json(about, {**told, "scores": {**told["scores"], names[task]: None}})
    checkpoints.write_json(path, {**content, "forgotten": gone})
    checkpoints.drop_steps(run, task)


def _score(value: float | None) -> float:
    return float("nan") if value is None else value
