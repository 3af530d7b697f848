"""A run's folder: what each task leaves behind, and from where an interrupted run resumes.

    config.json       what is learned and how: command, options, method, tasks, digest of the base model
    tasks/0_NAME/     adapter/ (peft's own format), scores.safetensors and .csv, cumulative.*, config.json
    checkpoint/       the newest state: model.safetensors (all that is trained, and buffers) or model/ (a model with
                      gates that is trained whole), method/, optimizer.pt (one for all tasks), progress.json
    learning_0.pt     where the loop stands in the middle of a stage
    model/            of a finished run of a model with gates: as hatcl.save_pretrained writes it. checkpoint/ is gone
    metrics.json      the matrix and its measures, once the run is finished
    seconds.json      where the time went

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
    True: "Exact: with everything that is not a task's own overwritten by large random values, the outputs of every "
    "task were the same bit for bit.",
    False: "NOT exact: outputs moved when what is not a task's own was overwritten. See metrics.json.",
}
MIDWAY = "learning_{}.pt"  # where a stage's loop stands


def base_of(model: nn.Module) -> str:
    """A digest of the base model that the adapters stand on; of a model without LoRA, of all its parameters: of the
    weights that the run starts from."""
    return base_digest(model) if adapters_of(model) else tensors_digest(dict(model.named_parameters()))


def learned_state(model: nn.Module) -> dict[str, Tensor]:
    """What learning changes: all that belongs to an adapter, all else that requires a gradient, and the buffers."""
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
    """Put back what `write_state` wrote.

    Raises:
        SkillError: tensors that are missing or of another shape, by name. IntegrityError: a damaged file.
    """
    try:
        stored = load_file(path)
    except Exception as error:  # safetensors raises its own kind, which is no subclass of anything narrower
        raise IntegrityError(f"{path} cannot be read ({error}); start the run anew in another folder") from error
    ours = learned_state(model)
    wrong = [f"{n} is missing" for n in stored if n not in ours] + [f"{n} is new" for n in ours if n not in stored]
    wrong += [
        f"{n} is {list(stored[n].shape)}, the model's {list(t.shape)}"
        for n, t in ours.items()
        if n in stored and t.shape != stored[n].shape
    ]
    if wrong:
        raise SkillError(
            f"{path} holds other tensors than the model: {'; '.join(wrong[:4])}{' ...' if len(wrong) > 4 else ''}; go "
            "on with the model and the LoRA options that the run was started with"
        )
    for name, t in ours.items():
        t.copy_(stored[name])


def write_model(model: nn.Module, folder: Path) -> None:
    """What a run continues from: a model with gates that is trained whole as `hatcl.save_pretrained` writes it, so that
    every command can look at it; of others, whose base may be large, what learning changes."""
    if is_converted(model) and not adapters_of(model):
        save_pretrained(model, folder / MODEL)
    else:
        write_state(model, folder / STATE)


def read_model(model: nn.Module, folder: Path) -> None:
    """Put back what `write_model` wrote.

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
        metrics: as in metrics.json. without: tasks that were forgotten since.
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
    """By what each task was learned, for the card."""
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
    """The folder with the newest complete model of a run: the finished one, else the checkpoint's, else `run` itself
    where it is a folder written by `hatcl.save_pretrained`.

    Raises:
        IntegrityError: there is none.
    """
    for folder in (complete(run / MODEL), complete(run / CHECKPOINT) / MODEL, run):
        if (folder / STATE).exists():
            return folder
    raise IntegrityError(
        f"{run} holds no model with gates; expected the folder of a run (hatcl train --method hat --output {run}), "
        "finished where it adapts a model by LoRA, or one written by hatcl.save_pretrained"
    )


def claim(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json into a new folder, or add to what `hatcl train` has written there already."""
    path = folder / checkpoints.CONFIG
    stored = checkpoints.read_json(path) if path.exists() else {"command": "learn_sequence", **config}
    if "learning" not in stored:
        facts = {**config, "learning": config["options"], "options": stored["options"]}
        checkpoints.write_json(path, {**stored, **facts})


def check(folder: Path, config: dict[str, Any]) -> None:
    """Is the folder free, or is the run in it this one?

    Raises:
        SkillError: it was started with another base model, or with an adapter of other tensors.
        IntegrityError: with other data of the same name. ConfigError: with other options or tasks, or it holds
            something else.
    """
    stored = checkpoints.stored_config(folder)
    if stored is None:
        return
    began = (folder / TASKS).exists() or complete(folder / CHECKPOINT).exists()
    if stored["command"] not in ("train", "learn_sequence") or (began and "learning" not in stored):
        raise ConfigError(f"folder: {folder} holds something else than a run of learn_sequence; name another folder")
    if "learning" not in stored:
        return
    if stored["base"] != config["base"]:
        raise SkillError(
            f"{folder}: the run was started from another base model (digest {stored['base'][:12]}, now came "
            f"{config['base'][:12]}); load the same base model, or name another folder"
        )
    if stored["tensors"] != config["tensors"]:
        was, now = stored["tensors"], config["tensors"]
        name = next(n for n in sorted({*was, *now}) if was.get(n) != now.get(n))
        raise SkillError(
            f"{folder}: the run was started with other LoRA options: {name} was {was.get(name, 'not there')}, now is "
            f"{now.get(name, 'not there')}; give the same rank and targets, or name another folder"
        )
    for was, now in zip(stored["tasks"], config["tasks"], strict=False):
        if was["name"] == now["name"] and was.get("digest", "") != now["digest"]:
            raise IntegrityError(
                f"{folder}: the data of the task {now['name']} are not those that the run was started with; put them "
                "back, or name another folder"
            )
    first = {**{key: stored.get(key) for key in config}, "options": _bound(stored["learning"])}
    checkpoints.check_same_run(folder, first, {**config, "options": _bound(config["options"])})


def _bound(options: dict[str, Any]) -> dict[str, Any]:
    """The options that a resumed run must share with its beginning."""
    return {name: value for name, value in options.items() if name not in FREE}


def write_task(folder: Path, name: str, model: nn.Module, method: Method, about: dict[str, Any]) -> None:
    """What a finished task leaves behind, as one folder, all or nothing.

    Args:
        name: the folder's, see `task_folder`. about: the content of its config.json.
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
    """Adapters in peft's own format; what a model without LoRA learned as `weights.safetensors`."""
    peft = _peft_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    if peft is None:
        tensors = {n: p.detach().cpu().contiguous().clone() for n, p in skill_tensors(model).items()}
        save_file(tensors, folder / f"{WEIGHTS}.safetensors")
        return
    if callable(peft.active_adapters):  # transformers' own add_adapter: the active one is all that it saves
        peft.save_pretrained(str(folder))
    else:
        chosen = [n for n in (names or peft.active_adapters) if n in adapters_of(peft)]
        peft.save_pretrained(str(folder), selected_adapters=chosen, save_embedding_layers=False)
    tidy_adapters(folder)


def tidy_adapters(folder: Path) -> None:
    """The same bytes for the same adapters: peft writes the targets, a set, in any order; and a model card to be filled
    in by hand."""
    for path in sorted(folder.rglob("adapter_config.json")):
        content = {
            k: sorted(v) if k in _SETS and isinstance(v, list) else v for k, v in checkpoints.read_json(path).items()
        }
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    for path in folder.rglob("README.md"):
        path.unlink()


def task_folder(index: int, name: str) -> str:
    """`0_sst-2`: with everything but letters, digits, dot, dash and underscore replaced."""
    return f"{index}_{re.sub(r'[^A-Za-z0-9._-]', '_', name)}"


_SETS = ("target_modules", "modules_to_save", "exclude_modules", "layers_to_transform")


def _peft_model(model: nn.Module) -> Any:
    """The PeftModel that a model is, or that lies in it; also a transformers model with peft adapters of its own."""
    for module in model.modules():
        if hasattr(module, "peft_config") and hasattr(module, "save_pretrained") and adapters_of(module):
            return module
    return None


# --- what a forgotten task leaves ---


def drop_task(run: Path, task: int) -> None:
    """Take a task that was forgotten out of a finished run of `hat`: its folder and its lines of metrics.jsonl go; in
    metrics.json only its name stays, its row and column of the matrix are empty, and the measures are those of the
    other tasks.

    Raises:
        IntegrityError: metrics.json is not of a run of `hat`.
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
            layer.pop("free", None)  # more than there were; hatcl describe counts them
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
