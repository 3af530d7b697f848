"""Checkpoints that torch.save wrote (`pytorch_model.bin`), read only as tensors: no code in them is run."""

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
NOTES = (str, int, float, type(None))  # in addition to tensors: a linearised encoder stores its model's name
NESTED = ("state_dict", "model_state_dict", "model", "module")  # keys under which trainers keep a model's tensors
# to be run where the file was made: unpickling needs the classes of its repository, and runs code in the file
CONVERSION = """\
import torch; from safetensors.torch import save_file
state = torch.load("{path}", map_location="cpu", weights_only=False).state_dict()
save_file({{n: t.clone().contiguous() for n, t in state.items()}}, "{new}")"""


def read_pickle(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file, by name; those that are tied share their memory, as in the model that was saved. The file
    is memory-mapped, so a tensor takes memory only when it is used.

    Raises:
        IntegrityError: the file is missing or damaged, or holds something other than tensors; for a pickled module the
            text has the lines that convert it.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    except FileNotFoundError:
        raise IntegrityError(f"{path}: no such file") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        if "TorchScript" in str(error):
            raise IntegrityError(
                f"{path} is a TorchScript archive, expected a state dict; write torch.jit.load(path).state_dict() "
                "with safetensors.torch.save_file"
            ) from error
        if "weights only" in str(error).lower().replace("_", " "):
            lines = CONVERSION.format(path=path, new=path.with_suffix(".safetensors"))
            raise IntegrityError(
                f"{path} is a pickled module, or holds more than tensors; reading it would run code that is in the "
                f"file. If you trust it, run these lines where it was made, and give the new file:\n{lines}"
            ) from error
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise IntegrityError(f"{path} cannot be read as a checkpoint ({first_line}); copy it again") from error
    return _tensors(content, path)


def _tensors(content: Any, path: Path) -> Mapping[str, Tensor]:
    found = {n: t for n, t in content.items() if isinstance(t, Tensor)} if isinstance(content, Mapping) else {}
    if found and all(n in found or isinstance(content[n], NOTES) for n in content):
        return found
    inside = [n for n in NESTED if isinstance(content, Mapping) and isinstance(content.get(n), Mapping)]
    if inside:
        return _tensors(content[inside[0]], path)
    raise IntegrityError(
        f"{path} holds {type(content).__name__}, expected a state dict, which maps names to tensors; write one with "
        "safetensors.torch.save_file({n: t.clone() for n, t in model.state_dict().items()}, path)"
    )


def _can_be_mapped(path: Path) -> bool:
    """Whether the file can be memory-mapped; files of torch before 1.6 cannot."""
    try:
        with open(path, "rb") as f:
            return f.read(4) == b"PK\x03\x04"
    except OSError:
        return False
