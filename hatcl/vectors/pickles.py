"""Checkpoints that torch.save wrote (`pytorch_model.bin`), read as tensors and nothing else: nothing in them is run."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import IntegrityError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLED = "pytorch_model.bin"
NESTED = ("state_dict", "model_state_dict", "model", "module")  # under which trainers keep a model's tensors
ANEW = (
    "if you trust it, load it where it was written, and save its tensors by model.save_pretrained(folder) or "
    "safetensors.torch.save_file({n: t.clone() for n, t in model.state_dict().items()}, path)"
)


def read_pickle(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file, by name; those that are tied share their memory, as in the model that was saved. The file
    is mapped, so that a tensor's memory is taken when it is used.

    Raises:
        IntegrityError: it is missing, damaged, or holds something else than tensors.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    except FileNotFoundError:
        raise IntegrityError(f"{path}: no such file") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise IntegrityError(
            f"{path}: not readable as tensors alone ({first_line}); it is damaged, or holds more than tensors: {ANEW}"
        ) from error
    return _tensors(content, path)


def _tensors(content: Any, path: Path) -> Mapping[str, Tensor]:
    if isinstance(content, Mapping) and content and all(isinstance(t, Tensor) for t in content.values()):
        return dict(content)
    inside = [n for n in NESTED if isinstance(content, Mapping) and isinstance(content.get(n), Mapping)]
    if inside:
        return _tensors(content[inside[0]], path)
    raise IntegrityError(f"{path}: holds {type(content).__name__}, expected tensors by name; {ANEW}")


def _can_be_mapped(path: Path) -> bool:
    """Files of torch before 1.6 are no archives."""
    try:
        with open(path, "rb") as f:
            return f.read(4) == b"PK\x03\x04"
    except OSError:
        return False
