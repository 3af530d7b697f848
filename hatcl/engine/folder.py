"""Run folders that survive a kill at any moment: whole folders and files are written beside their target, synced to
disk and renamed, so that a reader finds either the old content or the new one, complete."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import IntegrityError
from ..files import beside, complete, drop_left_overs, read_json, read_torch, replaced_folder, write_files
from ..hat.pretrained import from_pretrained, save_pretrained

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
    training = read_torch(folder / "training.pt")
    return Checkpoint(from_pretrained(folder / MODEL).to(device), training, progress)


def tidy(run: Path) -> None:
    """Drop what a finished run does not need: its checkpoint, and what interrupted replacements left behind."""
    shutil.rmtree(run / CHECKPOINT, ignore_errors=True)
    shutil.rmtree(beside(run / CHECKPOINT, "old"), ignore_errors=True)
    if (run / MODEL).exists():
        shutil.rmtree(beside(run / MODEL, "old"), ignore_errors=True)
    drop_left_overs(run)


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


# --- JSON ---


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file, all or nothing. Numbers that are not finite are written as null."""
    write_files({path: (json.dumps(_finite(content), indent=2, allow_nan=False) + "\n").encode()})


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not np.isfinite(content) else content
