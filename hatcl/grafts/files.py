"""Grafts and scores as safetensors files, one file each; its metadata state which of the two it holds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import GraftError, IntegrityError
from ..files import parse_json, write_files
from ..functional import content_digest
from ..vectors.files import read_metadata
from ..vectors.tensors import named_tensors

ENTRY = "hatcl.graft"  # one entry of metadata, since safetensors writes several in any order
BITS, SCORES = "bits", "scores"
LOADED_BY = {BITS: "Graft.load", SCORES: "GraftScores.load"}


def write(path: str | os.PathLike[str], holds: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Path:
    """Write one file, all or nothing. Its metadata name its kind of content and a digest of all its tensors.

    Raises:
        GraftError: the path has another suffix. IntegrityError: the disk is full or not writable.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise GraftError(f"{path}: got {path.suffix or 'no suffix'}, expected a file that ends in .safetensors")
    own = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}  # safetensors refuses views
    text = json.dumps({"holds": holds, **about, "digest": content_digest(own)})
    write_files({path: lambda new: save_file(own, new, metadata={ENTRY: text})})
    return path


def read(path: str | os.PathLike[str], holds: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and metadata of a file that `write` wrote.

    Raises:
        IntegrityError: the file is missing or damaged. GraftError: it holds the other kind, or something else.
    """
    stored, about = named_tensors(path), _what_it_says(path)
    found, digest = about["holds"], about["digest"]
    if found != holds:
        raise GraftError(
            f"{path} holds {found}, expected {holds}; call {LOADED_BY.get(found, 'the loader of its kind')} instead "
            f"of {LOADED_BY[holds]}" + ("; its .graft(sparsity=...) gives the bits" if found == SCORES else "")
        )
    tensors = {name: stored[name].clone() for name in stored}  # the file's tensors are memory-mapped
    if content_digest(tensors) != digest:
        raise IntegrityError(f"{path}: its content has changed since it was saved; the file is damaged, save it again")
    return tensors, about


def held_by(path: str | os.PathLike[str]) -> str:
    """The kind of content that a file declares, `bits` or `scores`; its tensors are not read.

    Raises:
        IntegrityError, GraftError: as `read`.
    """
    return str(_what_it_says(path)["holds"])


def packed(at: Tensor, size: int) -> Tensor:
    """One bit per element, set at the indices: uint8 `[ceil(size / 8)]`."""
    on = np.zeros(size, dtype=bool)
    on[at.numpy()] = True
    return torch.from_numpy(np.packbits(on))


def unpacked(bits: Tensor, size: int) -> Tensor:
    """The indices of the set bits. Raises `IntegrityError` if the number of bits does not fit."""
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (-(-size // 8),):
        raise IntegrityError(f"got {bits.numel()} bytes of bits for {size} elements; save the graft again")
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=size).nonzero()[0])


def _what_it_says(path: str | os.PathLike[str]) -> dict[str, Any]:
    stored, text = named_tensors(path), read_metadata(path).get(ENTRY)
    if text is None:
        raise GraftError(
            f"{path} holds {', '.join(sorted(stored)[:5]) or 'nothing'} and does not state whether these are bits "
            "or scores; expected a file written by Graft.save or GraftScores.save. Graft.from_masks makes a graft "
            "from your own masks"
        )
    try:
        about: dict[str, Any] = parse_json(text, path)
        return {**about, "holds": about["holds"], "digest": about["digest"]}
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{path}: its metadata cannot be read ({error!r}); save it again") from error
