"""Reads a safetensors file with a description in its header: one file, so that one rename replaces a whole state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...errors import ConversionError, HATError, IntegrityError
from ..gates import Gates

READERS = {"hatcl": "hatcl.from_pretrained", "hatcl_extracted": "hatcl.load_extracted"}  # header entry -> its reader


@contextlib.contextmanager
def making_model(folder: Path) -> Iterator[None]:
    """Turn errors inside the block, except hatcl's own, into an `IntegrityError` that names the folder being read. A
    `ConversionError` is turned too."""
    try:
        yield
    except ConversionError as error:
        raise IntegrityError(
            f"{folder}: base=, or what the folder says of its model, is another model than the one that was converted, "
            f"or has other sizes ({error})"
        ) from error
    except HATError:
        raise
    except Exception as error:
        raise IntegrityError(
            f"{folder}: it does not make a model ({type(error).__name__}: {error}); it was edited or damaged, or base= "
            "is another model than the one that was converted"
        ) from error


def check_base(base: Any, source: Any, folder: Path) -> None:
    """Check that `base` is a plain module, or None if the folder says how to build its model.

    Raises:
        IntegrityError: it is neither.
    """
    if base is None and source is None:
        raise IntegrityError(
            f"{folder}: its model class is your own; pass base= an instance of the plain module, made with the same "
            "arguments as the one that was converted"
        )
    if isinstance(base, type):
        raise IntegrityError(
            f"{folder}: base= got the class {base.__qualname__}, expected an instance; pass {base.__qualname__}(...)"
        )
    if base is not None and not isinstance(base, nn.Module):
        raise IntegrityError(f"{folder}: base= got {type(base).__name__}, expected the plain module")
    if base is not None and any(isinstance(m, Gates) for m in base.modules()):
        raise IntegrityError(
            f"{folder}: base= got a HAT model, expected the plain module, as it was before hatcl.convert"
        )


def read_with_header(path: Path, entry: str, writer: str, *, tensors: bool = True) -> tuple[str, dict[str, Tensor]]:
    """The text under `entry` of a file's header, and the file's tensors.

    Args:
        writer: the function that writes such files, for error messages. tensors: False = read only the header.

    Raises:
        IntegrityError: the file is missing, a pickle, truncated, damaged, or has no such entry.
    """
    try:
        with safe_open(path, "pt") as f:
            header, names = f.metadata() or {}, list(f.keys())
            stored = {name: f.get_tensor(name) for name in names} if tensors else {}
    except FileNotFoundError:
        raise IntegrityError(f"{path}: no such file; expected a folder written by {writer}{_deeper(path)}") from None
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        if _is_pickle(path):
            raise IntegrityError(
                f"{path}: a pickle (torch.save), expected a safetensors file; hatcl does not load pickles"
            ) from None
        raise IntegrityError(
            f"{path}: not readable as safetensors ({error}); the file is truncated or damaged. Copy it again from "
            "where it came"
        ) from error
    if entry not in header:
        reader = next((read for other, read in READERS.items() if other in header), None)
        of_states = any(".hat_tasks." in f".{name}" or "hat_gates." in name for name in names)
        hint = f". {reader} reads it" if reader else _state_alone(path) if of_states else ""
        raise IntegrityError(
            f"{path}: its header says nothing of {'hatcl' if entry == 'hatcl' else 'an extracted task'}; expected what "
            f"{writer} wrote, as it wrote it{hint}"
        )
    return header[entry], stored


def _deeper(path: Path) -> str:
    """A hint for errors: subfolders with such a file, as in a run or a Trainer's output folder."""
    found = sorted(p.parent.name for p in path.parent.glob(f"*/{path.name}"))
    return f". There is one in {', '.join(found[-3:])}: give that folder" if found else ""


def _state_alone(path: Path) -> str:
    return (
        ". It holds the state of a converted model, without what makes the model again: convert the same model with "
        f"the same options, and give it model.load_state_dict(safetensors.torch.load_file({str(path)!r}))"
    )


def _is_pickle(path: Path) -> bool:
    try:
        with open(path, "rb") as f:
            start = f.read(8)
    except OSError:
        return False
    # a safetensors file starts with its header's length in eight bytes, the last of which are zero
    return start[:2] == b"PK" or (len(start) == 8 and start[0] == 0x80 and start[4:] != bytes(4))
