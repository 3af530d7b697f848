"""Saving and loading: safetensors for tensors, JSON for everything else. Files are written to a temporary name and
renamed."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from . import guard
from .config import HATConfig
from .convert import GATES, build
from .errors import HATError, IntegrityError
from .files import write_files
from .gates import gates_of
from .map.units import UnitMap
from .registry import build_source

WEIGHTS, CONFIG, FORMAT = "model.safetensors", "config.json", 1


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write a converted model: `model.safetensors` and `config.json` (options, map, tasks, how to make the plain
    model).

    Raises:
        IntegrityError: a sealed task changed since it was sealed; the disk is full or not writable. ValueError: layers
            put together by hand (save their `state_dict()`; there is no recipe to make the model again).
    """
    model = next((m for m in model.modules() if GATES in m._modules), model)  # not what it is wrapped in
    gates = gates_of(model)
    if len(gates) != 1 or gates[0].unit_map is None:
        raise ValueError(
            "save_pretrained: this model was put together by hand, not converted; save model.state_dict() instead"
        )
    guard.check(model)
    g = gates[0]
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[int, int, torch.Size], str] = {}
    for name, t in model.state_dict().items():
        key = (t.data_ptr(), t.storage_offset(), t.shape)
        if t.numel() and key in first:
            tied[name] = first[key]
        else:
            first[key] = name
            tensors[name] = t.detach().contiguous().cpu()
    meta = {
        "format": FORMAT, "config": g.config.to_dict(), "source": g.source, "map": g.unit_map.to_json(), "tied": tied,
    }  # fmt: skip
    target = Path(folder)
    about = {"format": "pt", "config": _fingerprint(meta)}
    write_files(
        {target / WEIGHTS: lambda new: save_file(tensors, new, about), target / CONFIG: json.dumps(meta).encode()}
    )
    return target


def from_pretrained(folder: str | os.PathLike[str], base: nn.Module | None = None) -> nn.Module:
    """The model that `save_pretrained` wrote, in evaluation mode, its sealed tasks bit for bit.

    Args:
        base: the plain module, for models whose class hatcl cannot make by itself (anything but timm names). It is not
            changed.

    Raises:
        IntegrityError: a file is missing, truncated, tampered with or no safetensors file, or its tensors do not fit.
    """
    path = Path(folder)
    meta = _read_config(path / CONFIG)
    tensors = _read_tensors(path / WEIGHTS, meta)
    if base is None and meta["source"] is None:
        raise IntegrityError(f"{path}: its model class is your own; pass base= an instance of the plain module")
    try:
        plain = build_source(meta["source"]) if base is None else copy.deepcopy(base)
        model = build(plain, UnitMap.from_json(meta["map"]), HATConfig.from_dict(meta["config"]))
        for name, first in meta["tied"].items():
            if first in tensors:
                tensors[name] = tensors[first]
        _fit(model, tensors, path)
        state = model.state_dict()  # torch's own, since some modules ask it for their format's version
        state.update(tensors)
        model.load_state_dict(state)
        guard.check(model)
    except HATError:
        raise
    except Exception as error:
        raise IntegrityError(
            f"{path}: its files do not make a model ({type(error).__name__}: {error}); they were edited or damaged, or "
            "base= is another model than the one that was converted"
        ) from error
    gates_of(model)[0].source = meta["source"]
    return model.eval()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text())
        missing = {"format", "config", "source", "map", "tied"} - set(meta)
    except FileNotFoundError:
        raise IntegrityError(f"{path}: no such file; expected a folder written by hatcl.save_pretrained") from None
    except (ValueError, TypeError) as error:
        raise IntegrityError(f"{path}: not readable as JSON ({error}); the file is truncated or was edited") from error
    if missing:
        raise IntegrityError(
            f"{path}: lacks {', '.join(sorted(missing))}; expected a config written by hatcl.save_pretrained"
        )
    if not isinstance(meta["format"], int):
        raise IntegrityError(f"{path}: format {meta['format']!r}, expected a number up to {FORMAT}; it was edited")
    if meta["format"] > FORMAT:
        raise IntegrityError(f"{path}: format {meta['format']}, this hatcl reads up to {FORMAT}; install a newer hatcl")
    return dict(meta)


def _read_tensors(path: Path, meta: dict[str, Any]) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, "pt") as f:
            written_with = (f.metadata() or {}).get("config")
        tensors = load_file(path)
    except FileNotFoundError:
        raise IntegrityError(f"{path}: no such file; expected a folder written by hatcl.save_pretrained") from None
    except (SafetensorError, ValueError, RuntimeError) as error:
        with open(path, "rb") as f:
            start = f.read(8)
        # safetensors starts with its header's length in eight bytes, of which the last are zero
        if start[:2] == b"PK" or (len(start) == 8 and start[0] == 0x80 and start[4:] != bytes(4)):
            raise IntegrityError(
                f"{path}: a pickle (torch.save), expected a safetensors file; hatcl does not load pickles"
            ) from None
        raise IntegrityError(
            f"{path}: not readable as safetensors ({error}); the file is truncated or damaged"
        ) from error
    if written_with not in (None, _fingerprint(meta)):
        raise IntegrityError(
            f"{path}: was written with another {CONFIG} than the one beside it; that file was edited, or a save was "
            "interrupted between the two: take both files from the same save"
        )
    return tensors


def _fingerprint(meta: dict[str, Any]) -> str:
    """Of what the tensors mean: their map and how the plain model is made. Options may be edited."""
    text = json.dumps([meta["source"], meta["map"], meta["tied"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _fit(model: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Check names and shapes before anything is loaded. Heads may differ in width per task: their copies take the
    file's."""
    state = model.state_dict()
    skip = {f"{GATES}._extra_state"}
    for name, t in tensors.items():
        if name in state and t.shape != state[name].shape and ".hat_tasks." in f".{name}":
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if t.shape[1:] == state[name].shape[1:] and leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(torch.empty_like(t))
                state[name] = t
    problems = [f"missing {n}" for n in state if n not in tensors]
    problems += [f"unexpected {n}" for n in tensors if n not in state]
    problems += [
        f"{n} is {list(tensors[n].shape)}, expected {list(state[n].shape)}"
        for n in state
        if n in tensors and n not in skip and tensors[n].shape != state[n].shape
    ]
    if problems:
        raise IntegrityError(
            f"{path / WEIGHTS}: {len(problems)} tensors do not fit: {'; '.join(problems[:5])}"
            f"{' ...' if len(problems) > 5 else ''}. Was the folder written for another model or base?"
        )
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if name in tensors and tensors[name].dtype != p.dtype:
            p.data = p.data.to(tensors[name].dtype)
