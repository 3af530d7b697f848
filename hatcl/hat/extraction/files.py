"""An extracted task on disk: its tensors and a description of their network, or a program for other runtimes."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...calls import shapes
from ...errors import ConfigError, ConversionError, IntegrityError
from ...files import parse_json, write_files
from ...sources import build_source, can_fit, library_config
from ..masked import behind_mask
from ..saving.headers import check_base, making_model, read_with_header
from .cut import Shaping, shaped

log = logging.getLogger(__name__)
TENSORS, ABOUT, HEADER = "model.safetensors", "extracted.json", "hatcl_extracted"
FORMATS = {"safetensors": TENSORS, "pt2": "model.pt2", "onnx": "model.onnx"}


def write_extracted(
    folder: str | os.PathLike[str], model: nn.Module, shaping: Shaping, source: Any, report: Mapping[str, Any]
) -> Path:
    """Write the file that `load_extracted` reads, and a readable copy of its header."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    by_class = can_fit(source) and shaping == Shaping()  # its class alone can make it, so transformers can load it
    for name, t in (model.state_dict(keep_vars=True) if by_class else _every_tensor(model)).items():
        key = (t.data_ptr(), t.storage_offset(), t.shape)
        if t.numel() and key in first:
            tied[name] = first[key]
        else:
            first[key] = name
            tensors[name] = t.detach().contiguous().cpu()
    fixed = [n for n, p in model.named_parameters() if not p.requires_grad]
    about = {"source": source, "shaping": dataclasses.asdict(shaping), "tied": tied, "fixed": fixed, "report": report}
    text = json.dumps(about)
    target = Path(folder)
    files: dict[Path, Any] = {
        target / TENSORS: lambda new: save_file(tensors, new, {"format": "pt", HEADER: text}),
        target / ABOUT: (json.dumps(about, indent=2) + "\n").encode(),
    }
    if by_class:
        files[target / "config.json"] = (json.dumps(library_config(source), indent=2) + "\n").encode()
    write_files(files)
    return target


def load_extracted(folder: str | os.PathLike[str], base: nn.Module | None = None) -> nn.Module:
    """The smaller network that `Extracted.save` wrote, in evaluation mode: an ordinary module without hatcl. No code or
    pickle in the folder is run.

    Args:
        base: the plain module that was converted, needed if hatcl cannot make its class (anything but timm names and
            models of transformers). Its values do not matter, and it is not changed.

    Raises:
        IntegrityError: the file is missing, damaged or of another kind, or its tensors do not fit.
    """
    path = Path(folder) / TENSORS
    about, tensors = _read(path)
    check_base(base, about["source"], path.parent)
    with making_model(path.parent):
        shapes_of = {name: list(x.shape) for name, x in tensors.items()}
        plain = build_source(about["source"]) if base is None else behind_mask(copy.deepcopy(base), shapes_of)
        model = shaped(plain, Shaping(**about["shaping"]))
        for name, other in about["tied"].items():
            tensors[name] = tensors[other]
        there = _every_tensor(model)
        if wrong := sorted((model.state_dict().keys() - tensors.keys()) | (tensors.keys() - there.keys())):
            raise IntegrityError(
                f"{path}: {wrong[0]} is {'missing' if wrong[0] in there else 'not in the model'} ({len(wrong)} such "
                "tensors); was the folder written for another model, or is base= another one?"
            )
        made: dict[str, nn.Parameter] = {}
        for name, value in tensors.items():
            holder, _, leaf = name.rpartition(".")
            module = model.get_submodule(holder)
            if leaf in module._buffers:
                module._buffers[leaf] = value
            else:
                first = about["tied"].get(name, name)
                made.setdefault(first, nn.Parameter(value, first not in about["fixed"]))
                module._parameters[leaf] = made[first]
        return shaped(model, Shaping()).eval()


def _every_tensor(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, including those that are not part of a state dict, each under all of its names."""
    named: list[Any] = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return dict(named)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    text, tensors = read_with_header(path, HEADER, "Extracted.save")
    about: dict[str, Any] = parse_json(text, path)
    if missing := {"source", "shaping", "tied", "fixed"} - about.keys():
        raise IntegrityError(f"{path}: its header lacks {', '.join(sorted(missing))}; it was edited or damaged")
    return about, tensors


# ---- programs ------------------------------------------------------------------------------------------------------


def check_format(name: str) -> str:
    """A format's name, if the packages that write it are installed.

    Raises:
        ConfigError: there is no such format, or a package is missing.
    """
    if name not in FORMATS:
        raise ConfigError(f"format: got {name!r}, expected one of {', '.join(FORMATS)}")
    if name == "onnx":
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"format 'onnx' needs {error.name}, which is not installed; pip install 'hatcl[onnx]'"
            ) from error
    return name


def write_program(folder: str | os.PathLike[str], model: nn.Module, inputs: Any, form: str) -> Path:
    """Write a model as a program with any batch size: `torch.export`'s, or ONNX.

    Raises:
        ConversionError: the program cannot be made; the message quotes torch.
    """
    args, kwargs = _as_call(inputs)
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    dims = _as_parameters(model, _batch_dims(kwargs or args, batch))

    def write(new: Path) -> None:
        try:
            with torch.no_grad():
                program = torch.export.export(model, args, kwargs, dynamic_shapes=dims)
            if form == "pt2":
                torch.export.save(program, new)
            else:
                made: Any = torch.onnx.export(program, dynamo=True, verbose=False, external_data=False)
                made.save(str(new))
        except Exception as error:
            raise ConversionError(
                f"{type(model).__name__}: no {form} program can be made of it on {shapes(inputs)} "
                f"({type(error).__name__}: {str(error)[:600]}); save it as safetensors, and load it with "
                "hatcl.load_extracted"
            ) from error

    target = Path(folder) / FORMATS[form]
    write_files({target: write})
    return target


def _as_parameters(model: nn.Module, dims: Any) -> Any:
    """The dimensions in the form that torch.export needs if the forward's parameters are `*args` or `**kwargs`."""
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL and not isinstance(dims, dict):
            return {name: tuple(dims)}
        if parameter.kind is parameter.VAR_KEYWORD and isinstance(dims, dict):
            return {name: dims}
        if parameter.kind is not parameter.VAR_POSITIONAL:
            break
    return dims


def _as_call(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (list, tuple)) else ((inputs,), {})


def _batch_dims(given: Any, batch: Any) -> Any:
    """Mark the first dimension of every tensor as the batch."""
    if isinstance(given, dict):
        return dict(zip(given, _batch_dims(tuple(given.values()), batch), strict=True))
    return tuple({0: batch} if isinstance(x, Tensor) and x.dim() else None for x in given)
