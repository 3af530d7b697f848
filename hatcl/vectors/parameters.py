"""Separate a source's parameters from quantised weights, which mean nothing without their scale. A difference cannot be
added to quantised weights, and silently leaving them out would mean computing with half a model."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import IntegrityError, VectorError
from ..files import read_json
from .tensors import RUNNING, Kind, Lazy, TensorSource, buffers_of, kinds_of, named_tensors, pick

EIGHT_BITS = (torch.int8, torch.uint8)
SCALE_NAMES = ("scale", "scales", "SCB", "weight_scale", "weight_scale_inv", "absmax")
DEQUANTISE = "dequantise it first (in transformers by model.dequantize(), or load what it was made from), and use that"


def parameters_of(
    source: TensorSource, buffers: bool = False, *, what: str = "the model", check: bool = True
) -> Mapping[str, Tensor]:
    """The floating-point parameters of a source; with `buffers` also its floating-point running statistics.

    Args:
        what: the error's name for the source. check: refuse a source that holds quantised weights, which are not
            parameters here.

    Raises:
        VectorError: quantised weights, by name.
    """
    if check:
        refuse_quantised(source, what)
    tensors = named_tensors(source)
    skip = set() if buffers else {n for n in tensors if n.rpartition(".")[2] in RUNNING}
    if isinstance(source, nn.Module):
        saved = set(source.state_dict())
        skip |= {n for n in tensors if n not in saved} | (set() if buffers else buffers_of(source))
    return pick(tensors, [n for n, k in kinds_of(tensors).items() if n not in skip and k.dtype.is_floating_point])


def refuse_quantised(source: Any, what: str = "the model") -> None:
    """Raise if a source holds quantised weights (`quantised_in`), or its configuration says so.

    Args:
        what: the error's name for the source. Raises: VectorError: it does; the text has the first name.
    """
    method = _configured(source)
    if method:
        raise VectorError(f"{what} is quantised: its configuration has quantization_config ({method}); {DEQUANTISE}")
    refuse_all_of(quantised_in(source), what)


def refuse_as_target(source: TensorSource, names: Iterable[str], what: str = "the model") -> None:
    """Raise if differences cannot be added to some of a source's tensors, because they are not floating-point numbers
    of 16 bits or more, or are missing in a quantised source.

    Raises:
        VectorError: they cannot; the text has the first name.
    """
    kinds = kinds_of(named_tensors(source))
    found = quantised_in(source)
    for name in names:
        kind = kinds.get(name)
        if name in found or (kind is not None and not kind.dtype.is_floating_point):
            dtype = "" if kind is None else str(kind.dtype).removeprefix("torch.")
            refuse_all_of({name: found.get(name, dtype)}, what)
        if kind is None:
            refuse_all_of(found, what)


def refuse_all_of(found: Mapping[str, str], what: str) -> None:
    """Raise `VectorError` unless this is empty: names of quantised tensors, and what they are."""
    for name, why in found.items():
        raise VectorError(f"{what} is quantised: {name} is {why}, expected float16 or wider; {DEQUANTISE}")


def quantised_in(source: TensorSource) -> dict[str, str]:
    """Name -> description of all quantised weights: tensors in 8 bits (int8, uint8, float8) of two or more dimensions,
    integers with a scale next to them, and tensors that carry their own scale. Counters, indices and causal masks `[1,
    1, n, n]` are not counted. Nothing is read."""
    tensors = named_tensors(source)
    kinds = kinds_of(tensors)
    temporary = buffers_of(source) - set(source.state_dict()) if isinstance(source, nn.Module) else set()
    out = {}
    for name, kind in kinds.items():
        why = None if name in temporary else _why(name, kind, tensors, kinds)
        if why is not None:
            out[name] = why
    return out


def _why(name: str, kind: Kind, tensors: Mapping[str, Tensor], kinds: Mapping[str, Kind]) -> str | None:
    own, _, last = name.rpartition(".")
    text = f"{str(kind.dtype).removeprefix('torch.')} {list(kind.shape)}"
    if last in RUNNING or kind.dtype is torch.bool or kind.dtype.is_complex:
        return None
    if kind.dtype.is_floating_point:
        held = None if isinstance(tensors, Lazy) else tensors[name]
        if held is not None and (held.is_quantized or type(held).dequantize is not Tensor.dequantize):
            return f"a {type(held).__name__}"
        return text if kind.dtype.itemsize < 2 else None
    if kind.dtype in EIGHT_BITS and len(kind.shape) > 1 and not _is_mask(kind.shape):
        return text
    beside = next((n for n in _scales_of(own, name) if n in kinds), None)
    return f"{text} with {beside} next to it" if beside is not None and math.prod(kind.shape) > 1 else None


def _scales_of(own: str, name: str) -> list[str]:
    start = own + "." if own else ""
    return (
        [f"{start}{s}" for s in SCALE_NAMES]
        + [f"{name}.{s}" for s in SCALE_NAMES]
        + [f"{name}_{s}" for s in SCALE_NAMES]
    )


def _is_mask(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]


def configuration_of(source: Any) -> dict[str, Any]:
    """transformers' configuration of a module, a folder, or a file's folder; empty if there is none."""
    if isinstance(source, nn.Module):
        config = getattr(source, "config", None)
        to_dict = getattr(config, "to_dict", None)
        return dict(to_dict()) if callable(to_dict) else {}
    if not isinstance(source, (str, os.PathLike)):
        return {}
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    try:
        return dict(read_json(folder / "config.json"))
    except IntegrityError:  # missing, or another program's file: only the tensors count
        return {}


def _configured(source: Any) -> str:
    config = configuration_of(source)
    given = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    method = given.get("quant_method", "no method named") if isinstance(given, Mapping) else given or ""
    return str(getattr(method, "value", method))
