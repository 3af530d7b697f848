"""The files of I-LoRA after a task, from which the next task continues.

adapter/        the plastic adapter, in peft's own format
ema_adapter/    the stable one, likewise (elsewhere with `ema_adapter_path`, missing without `save_ema_adapter`)
memory.pt       the memory
ilora.json      options, counts, paths of the adapters, digests of the stable one and of the base model

In a run of `learn_sequence` each task's folder has the last two next to `adapter/`, which holds both adapters.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import IntegrityError, SkillError
from ..files import complete, read_json, read_torch, replaced_folder
from ..functional import digest_of
from ..vectors.adapters import CONFIG, WEIGHTS
from ..vectors.tensors import named_tensors
from .ilora_config import ABOUT_FILE, ADAPTER_FOLDER, MEMORY_FILE, STABLE_FOLDER, ILoRAConfig
from .reservoir import Reservoir
from .switch import adapter_tensors, of_adapters

ILORA_FORMAT = "hatcl.ilora.2"
IN_RUN = f"tasks/[!.]*/{ABOUT_FILE}"  # the place in a run of learn_sequence
SAME_OPTIONS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
SAMPLED = 4096  # elements per tensor in the base's digest; other checkpoints differ in nearly all elements


class TwoAdapters(Protocol):
    """The parts of an `ILoRA` that are written and read."""

    model: Any
    config: ILoRAConfig
    plastic: str
    stable: str
    memory: Reservoir
    steps: int
    moves: int
    first_task: bool


def save(ilora: TwoAdapters, folder: Path) -> Path:
    """See `ILoRA.save`."""
    model, config = ilora.model, ilora.config
    target = folder / config.current_task_id if config.current_task_id is not None else folder
    for name in (ilora.plastic, ilora.stable):
        wrong = next((n for n, t in adapter_tensors(model, name).items() if not bool(torch.isfinite(t).all())), None)
        if wrong is not None:
            raise SkillError(
                f"{wrong} of the adapter {name!r} is not finite; nothing was saved. Lower the learning rate"
            )
    memory = _packed(ilora.memory.state_dict())
    where = Path(config.ema_adapter_path or STABLE_FOLDER)
    _ours(target, {ADAPTER_FOLDER, STABLE_FOLDER, MEMORY_FILE, ABOUT_FILE, where.parts[0]})
    if not _is_inside(where):
        _write_stable(ilora, target, where)
    with replaced_folder(target) as new:
        _write_adapter(model, ilora.plastic, new / ADAPTER_FOLDER)
        if _is_inside(where):
            _write_stable(ilora, new, where)
        (new / MEMORY_FILE).write_bytes(memory)
        (new / ABOUT_FILE).write_text(_about(ilora, ADAPTER_FOLDER, where))
    return target


def save_beside(ilora: TwoAdapters, folder: Path, memory: dict[str, Any]) -> None:
    """Write `memory.pt` and `ilora.json` into a new folder that already holds the adapters in `adapter/`, and the
    stable adapter again at `ema_adapter_path` if it is given.

    Args:
        memory: the memory's state, including the examples.

    Raises:
        SkillError: as `save`.
    """
    packed = _packed(memory)
    plastic, stable = (_in_peft_folder(name) for name in (ilora.plastic, ilora.stable))
    if ilora.config.ema_adapter_path is not None:
        stable = Path(ilora.config.ema_adapter_path)
        _write_stable(ilora, folder, stable)
    (folder / MEMORY_FILE).write_bytes(packed)
    (folder / ABOUT_FILE).write_text(_about(ilora, str(plastic), stable))


def check_saveable(examples: list[Any]) -> None:
    """Raise `SkillError` for examples that cannot be saved."""
    _packed({"examples": examples})


def _in_peft_folder(adapter: str) -> Path:
    """The path at which peft's `save_pretrained` writes one of several adapters."""
    return Path(ADAPTER_FOLDER) if adapter == "default" else Path(ADAPTER_FOLDER) / adapter


def _is_inside(where: Path) -> bool:
    return not where.is_absolute() and ".." not in where.parts


def _write_stable(ilora: TwoAdapters, folder: Path, where: Path) -> None:
    """Write the stable adapter at a path relative to the task's folder."""
    if not ilora.config.save_ema_adapter:
        return
    if _is_inside(where):
        _write_adapter(ilora.model, ilora.stable, folder / where)
        return
    _ours(folder / where, {CONFIG, WEIGHTS})
    with replaced_folder(folder / where) as new:
        _write_adapter(ilora.model, ilora.stable, new)


def _about(ilora: TwoAdapters, plastic: str, stable: Path) -> str:
    digest = tensors_digest(_peft_tensors(ilora.model, ilora.stable))
    about = {
        "format": ILORA_FORMAT,
        "config": ilora.config.to_dict(),
        "steps": ilora.steps,
        "moves": ilora.moves,
        "base": base_digest(ilora.model),
        "adapter": plastic,
        "stable": {"path": str(stable), "digest": digest} if ilora.config.save_ema_adapter else None,
    }
    return json.dumps(about, indent=2) + "\n"


def load(ilora: TwoAdapters, folder: Path, task_id: str | None) -> None:
    """See `ILoRA.load`; `task_id` is the task expected there.

    Everything is read and checked before anything is changed.
    """
    model = ilora.model
    at = _find(folder, task_id)
    about = _read_about(at)
    saved = about["config"]
    if about["base"] != base_digest(model):
        raise SkillError(
            f"{at}: the task was learned on another base model (digest {about['base'][:12]}, now got "
            f"{base_digest(model)[:12]}); load the base that it was learned on"
        )
    if about["stable"] is None:
        raise SkillError(f"{at} has no stable adapter, it was saved with save_ema_adapter=False; learn that task again")
    plastic = _read_adapter(model, ilora.plastic, at / about["adapter"])
    where = at / about["stable"]["path"]
    if not where.is_dir() and ilora.config.ema_adapter_path is not None:
        where = Path(ilora.config.ema_adapter_path)  # in case the folders were moved
    stable = _read_adapter(model, ilora.stable, where)
    if tensors_digest(stable) != about["stable"]["digest"]:
        raise IntegrityError(
            f"{where}: this is not the stable adapter that the task {saved['current_task_id']!r} was saved with; it "
            "was overwritten or damaged. Learn that task again, with its own ema_adapter_path"
        )
    memory = read_torch(at / MEMORY_FILE)
    ilora.memory.load_state_dict(memory)  # checks before changing anything
    _copy_in(model, ilora.plastic, plastic)
    _copy_in(model, ilora.stable, stable)
    ilora.steps, ilora.moves, ilora.first_task = int(about["steps"]), int(about["moves"]), _is_first(ilora, saved)


def load_stable(ilora: TwoAdapters, folder: Path) -> None:
    """Load only the stable adapter, from a folder in peft's format.

    Raises:
        SkillError: it is missing, or tensors, which the text names, do not fit. IntegrityError: a file is damaged.
    """
    _copy_in(ilora.model, ilora.stable, _read_adapter(ilora.model, ilora.stable, folder))


def base_digest(model: Any) -> str:
    """A digest of the base under the adapters: names and shapes of all other untrained parameters, and up to 4096
    elements of each."""
    whole = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if not p.requires_grad and not of_adapters(name):
            every = max(p.numel() // SAMPLED, 1)
            part = p.detach().reshape(-1)[::every]
            whole.update(f"{name.replace('.base_layer', '')} {list(p.shape)} {digest_of(part)}\n".encode())
    return whole.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """A digest of named tensors."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(f"{name} {list(tensors[name].shape)} {digest_of(tensors[name])}\n".encode())
    return whole.hexdigest()


def _is_first(ilora: TwoAdapters, saved: Mapping[str, Any]) -> bool:
    """Whether the current task is the first: true if it continues the saved first task, false for a task after it."""
    was_first = saved["prev_task_id"] is None and saved["previous_task_model"] is None
    return was_first and ilora.config.current_task_id == saved["current_task_id"] and ilora.first_task


def _find(folder: Path, task_id: str | None) -> Path:
    """The task's folder: a subfolder of its name, its folder in a run that learned it, or the given folder."""
    tried = [folder] if task_id is None else [folder / task_id, *_of_run(folder, task_id), folder]
    for at in tried:
        at = complete(at)
        if (at / ABOUT_FILE).is_file():
            found = _read_about(at)["config"]["current_task_id"]
            if task_id is not None and found != task_id:
                raise SkillError(f"{at} holds the task {found!r}, expected prev_task_id {task_id!r}")
            return at
    found_inside = [p for pattern in (f"[!.]*/{ABOUT_FILE}", IN_RUN) for p in sorted(folder.glob(pattern))]
    if task_id is None and len(found_inside) == 1:
        return found_inside[0].parent
    inside = sorted(str(_read_about(p.parent)["config"]["current_task_id"]) for p in found_inside)
    named = "" if task_id is None else f" {task_id!r}"
    hint = f"there are {', '.join(inside)}: name one with prev_task_id" if inside else "give the folder of ILoRA.save()"
    raise SkillError(f"no task{named} of I-LoRA in {folder} (no {ABOUT_FILE}); {hint}")


def _of_run(folder: Path, task_id: str) -> list[Path]:
    """The folders of the task in a run of `learn_sequence`."""
    found = (p.parent for p in folder.glob(IN_RUN))
    return [at for at in found if _read_about(at)["config"]["current_task_id"] == task_id]


def _read_about(at: Path) -> dict[str, Any]:
    about: dict[str, Any] = read_json(at / ABOUT_FILE)
    if about.get("format") != ILORA_FORMAT:
        raise IntegrityError(
            f"{at / ABOUT_FILE} does not have the format {ILORA_FORMAT}; expected a file of ILoRA.save()"
        )
    return about


# ---- adapters --------------------------------------------------------------------------------------------------------


def _peft_tensors(model: Any, adapter: str) -> dict[str, Tensor]:
    """An adapter's tensors as peft stores them, sharing memory with the model."""
    from peft import get_peft_model_state_dict

    # without copies of the base's embeddings, which the base's digest covers
    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def _write_adapter(model: Any, adapter: str, folder: Path) -> None:
    write_peft(model, _peft_tensors(model, adapter), copy.copy(model.peft_config[adapter]), folder)


def write_peft(model: Any, tensors: Mapping[str, Tensor], config: Any, folder: Path) -> None:
    """Write these tensors and this config (which is changed) as an adapter in peft's own format."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model.base_model.model, "name_or_path", None) or None
    config.save_pretrained(str(folder))


def _read_adapter(model: Any, adapter: str, folder: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter's folder, after checking that they fit the model's adapter."""
    folder = complete(folder)
    if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        raise SkillError(
            f"{folder} holds no adapter ({CONFIG} and {WEIGHTS}); give the folder of the previous task "
            "(previous_task_model) or its stable adapter (ema_adapter_path)"
        )
    options = read_json(folder / CONFIG)
    ours = model.peft_config[adapter].to_dict()
    for option in SAME_OPTIONS:
        now, was = ours.get(option), options.get(option)
        if (now or None) != (was or None):
            raise SkillError(
                f"{folder}: the adapter has {option}={was!r}, this model's {adapter!r} has {now!r}; make the model's "
                "adapter with the options that it was saved with"
            )
    tensors = dict(named_tensors(folder / WEIGHTS))
    expected = _peft_tensors(model, adapter)
    for name in dict.fromkeys([*expected, *tensors]):
        shapes = [list(t[name].shape) if name in t else "lacking" for t in (tensors, expected)]
        if shapes[0] != shapes[1]:
            raise SkillError(
                f"{folder}: {name} is {shapes[0]} in the file, {shapes[1]} in this model's {adapter!r}; make the "
                "model's adapter with the same rank and targets"
            )
    return tensors


@torch.no_grad()
def _copy_in(model: Any, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    for name, t in _peft_tensors(model, adapter).items():
        t.copy_(tensors[name])


# ---- the memory ------------------------------------------------------------------------------------------------------


def _packed(state: dict[str, Any]) -> bytes:
    state["examples"] = [dict(e) if isinstance(e, Mapping) else e for e in state["examples"]]
    data = io.BytesIO()
    try:
        torch.save(state, data)
        data.seek(0)
        torch.load(data, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError, RuntimeError) as error:
        kinds = ", ".join(sorted({type(e).__name__ for e in state["examples"]}))
        raise SkillError(
            f"the memory's examples ({kinds}) cannot be saved, so nothing was saved; remember examples made of "
            "tensors and plain values"
        ) from error
    return data.getvalue()


# ---- replacing folders --------------------------------------------------------------------------------------------


def _ours(folder: Path, names: set[str]) -> None:
    """Raise `SkillError` for a folder that holds anything else, which replacing it would lose."""
    others = sorted(p.name for p in folder.iterdir() if p.name not in names) if folder.is_dir() else []
    if others or folder.is_file():
        raise SkillError(
            f"{folder} {'holds ' + ', '.join(others[:4]) if others else 'is a file'}, expected a folder only for "
            "the task; name another, or give current_task_id"
        )
