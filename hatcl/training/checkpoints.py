"""Run folders that survive a kill at any moment: whole folders and files are written beside their target, synced to
disk and renamed, so that a reader finds either the old content or the new one, complete."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import IntegrityError
from ..pretrained import from_pretrained, save_pretrained

CHECKPOINT = "checkpoint"
MODEL = "model"
CONFIG = "config.json"
METRICS = "metrics.json"
PICTURE = "picture.png"


@dataclasses.dataclass
class Checkpoint:
    """Where a run stands.

    Args:
        model: the model, sealed tasks and the unsealed one included.
        training: state of optimizer, gradient scaler and random generators: tensors and plain values.
        progress: what the run has seen so far, JSON-able.
    """

    model: nn.Module
    training: dict[str, Any]
    progress: dict[str, Any]


def save_checkpoint(run: Path, checkpoint: Checkpoint) -> None:
    """Replace the run's checkpoint by this one, all or nothing."""
    with replaced_folder(run / CHECKPOINT) as folder:
        save_pretrained(checkpoint.model, folder / MODEL)
        torch.save(checkpoint.training, folder / "training.pt")
        (folder / "progress.json").write_text(json.dumps(checkpoint.progress))


def load_checkpoint(run: Path, device: torch.device) -> Checkpoint | None:
    """The run's checkpoint, or None if it has not come to one yet.

    Raises:
        IntegrityError: a file of the checkpoint is missing, truncated or of another kind.
    """
    folder = complete(run / CHECKPOINT)
    if not folder.exists():
        return None
    progress = read_json(folder / "progress.json")
    path = folder / "training.pt"
    try:
        training = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise IntegrityError(
            f"{path} cannot be read as tensors and plain values ({first_line}); expected what hatcl train wrote. "
            "Copy the run folder again, or start a new run"
        ) from error
    return Checkpoint(from_pretrained(folder / MODEL).to(device), training, progress)


def tidy(run: Path) -> None:
    """Drop what a finished run does not need: its checkpoint, and what interrupted replacements left behind."""
    shutil.rmtree(run / CHECKPOINT, ignore_errors=True)
    shutil.rmtree(_beside(run / CHECKPOINT, "old"), ignore_errors=True)
    if (run / MODEL).exists():
        shutil.rmtree(_beside(run / MODEL, "old"), ignore_errors=True)
    for path in run.glob(".*.new"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def save_model(run: Path, model: nn.Module) -> None:
    """Replace the run's finished model by this one, all or nothing."""
    with replaced_folder(run / MODEL) as folder:
        save_pretrained(model, folder)


def find_model(run: Path) -> Path:
    """The folder with the newest complete model of a run: the finished one, else the checkpoint's, else `run` itself
    where it is a folder written by `hatcl.save_pretrained`.

    Raises:
        IntegrityError: there is none.
    """
    for folder in (complete(run / MODEL), complete(run / CHECKPOINT) / MODEL, run):
        if folder.is_dir() and any(folder.glob("*.safetensors")):
            return folder
    raise IntegrityError(
        f"{run} holds no model; expected the folder of a run (hatcl train --output {run}) or one written by "
        "hatcl.save_pretrained"
    )


# --- random generators ---


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators, as values that `weights_only` loading accepts."""
    version, words, position = random.getstate()
    state = np.random.get_state(legacy=False)
    out: dict[str, Any] = {
        "python": [version, list(words), position],
        "numpy": [state["state"]["key"].tolist(), state["state"]["pos"], state["has_gauss"], state["gauss"]],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        out["cuda"] = torch.cuda.get_rng_state(device)
    return out


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `random_state` returned."""
    version, words, position = state["python"]
    random.setstate((version, tuple(words), position))
    key, pos, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", np.asarray(key, dtype=np.uint32), pos, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


# --- files and folders, all or nothing ---


@contextlib.contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder to fill; when the block ends normally it takes the place of `target`.

    Two folders cannot trade places in one step, so the old one is moved aside first. After a kill between the two
    moves there is no `target`; `complete` then answers with the old one, which is kept until the new one is in place.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    new, old = _beside(target, "new"), _beside(target, "old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        _sync_tree(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.rename(new, target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def complete(target: Path) -> Path:
    """Where the newest complete content of `target` lies, also after its replacement was interrupted."""
    old = _beside(target, "old")
    return old if old.exists() and not target.exists() else target


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file, all or nothing. Numbers that are not finite are written as null."""
    write_bytes(path, (json.dumps(_finite(content), indent=2, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _beside(path, "new")
    new.write_bytes(content)
    _sync(new)
    os.replace(new, path)
    _sync(path.parent)


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises `IntegrityError` if it is missing or no JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{path} cannot be read as JSON ({error}); expected what hatcl train wrote. Copy the run folder again, "
            "or start a new run"
        ) from error


def _beside(path: Path, word: str) -> Path:
    return path.with_name(f".{path.name}.{word}")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not np.isfinite(content) else content


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Flush a file or folder to disk, so that a rename after it is not seen before its content."""
    if path.is_dir() and os.name != "posix":  # only POSIX lets a folder be opened
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
