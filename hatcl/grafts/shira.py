"""Grafts as adapters of peft: SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175) holds some elements of a linear layer's
weight and the number to add to each."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import GraftError, IntegrityError
from ..files import read_json, write_files
from ..vectors.adapters import CONFIG, WEIGHTS
from ..vectors.tensors import TensorSource, named_tensors
from ..vectors.to_lora import peft_targets
from . import inplace

Elements = tuple[Tensor, Tensor]  # (flat indices in int64, values)
PREFIX, AT, BY = "base_model.model.", ".shira_indices", ".shira_weight"


@dataclass(frozen=True)
class ShiraReport:
    """The parts of a graft that an adapter holds.

    Attributes:
        folder: the adapter's folder. rank: SHiRA's r; a layer's weight `[m, n]` has r (m + n) elements, including
            zeros. elements: the graft's elements in the weights of linear layers. in_full: the modules that are stored
            in full, since SHiRA has no place for the graft's elements of them. error: the largest error of an element
            due to the rounding of `pretrained + difference`; modules stored in full have none.
    """

    folder: Path
    rank: int
    elements: int
    in_full: tuple[str, ...]
    error: float


def write_shira(
    base: nn.Module, found: Mapping[str, Elements], folder: Path, name_or_path: str | None = None
) -> ShiraReport:
    """See `Graft.to_peft`.

    Args:
        found: the model's name of a tensor -> the elements to change.
    """
    names, full = _sparse_places(base, list(found))
    shapes = {n: base.get_parameter(n).shape for n in names}
    needed = {n: math.ceil(len(found[n][0]) / sum(shape)) for n, shape in shapes.items()}
    crowded: list[str] = []
    while True:  # the layer with the most elements sets the rank for all; layers too small for it are stored in full
        full = _with_namesakes(base, [*full, *(n.rpartition(".")[0] for n in crowded)])
        linear = {n: s for n, s in shapes.items() if not any(_part_called(n, module) for module in full)}
        rank = max((needed[n] for n in linear), default=0)
        crowded = [n for n, (m, k) in linear.items() if rank * (m + k) > m * k]
        crowded = [n for n in crowded if needed[n] * sum(linear[n]) > math.prod(linear[n])] or crowded
        if not crowded:
            break
    if not linear:
        raise GraftError(
            "the graft has no elements that SHiRA can hold: part of the weight of a linear layer whose bias does "
            "not change. Save it with graft.save(path), or the whole model after apply_to"
        )
    tensors, error = {}, 0.0
    for name, shape in linear.items():
        at, values = found[name]
        own = base.get_parameter(name).detach().reshape(-1)[at].cpu()
        way = (values.double() - own.double()).float()
        error = max(error, float((_added_up(own, way) - values).double().abs().max()))
        free = torch.ones(math.prod(shape), dtype=torch.bool)
        free[at] = False
        more = free.nonzero().view(-1)[: rank * sum(shape) - len(at)]
        every = torch.cat([at.cpu(), more])
        key = PREFIX + name.removesuffix(".weight")
        tensors[key + BY] = torch.cat([way, torch.zeros(len(more))])
        tensors[key + AT] = torch.stack([every // shape[1], every % shape[1]]).int()
    for module in full:
        for inner, p in base.get_submodule(module).named_parameters():
            name = f"{module}.{inner}"
            whole = p.detach().cpu().clone(memory_format=torch.contiguous_format)
            if name in found:
                inplace.put(whole, *(x.cpu() for x in found[name]))
            tensors[PREFIX + name] = whole
    config = {
        "peft_type": "SHIRA", "task_type": None, "base_model_name_or_path": name_or_path, "inference_mode": True,
        "r": rank, "mask_type": "random", "random_seed": None, "fan_in_fan_out": False, "init_weights": True,
        "target_modules": peft_targets(base, [n.removesuffix(".weight") for n in linear]),
        "modules_to_save": full or None,
    }  # fmt: skip
    text = json.dumps(config, indent=2).encode()
    write_files(
        {folder / WEIGHTS: lambda new: save_file(tensors, new, metadata={"format": "pt"}), folder / CONFIG: text}
    )
    return ShiraReport(folder, rank, sum(len(found[n][0]) for n in linear), tuple(full), error)


def _sparse_places(base: nn.Module, names: list[str]) -> tuple[list[str], list[str]]:
    """The weights of linear layers, and the modules of the other parameters."""
    holders = Counter(id(p) for m in base.modules() for p in m.parameters(recurse=False))
    attention = [path for path, m in base.named_modules() if isinstance(m, nn.MultiheadAttention)]
    linear, full = [], []
    for name in names:
        path, _, own = name.rpartition(".")
        if holders[id(base.get_parameter(name))] > 1:
            raise GraftError(
                f"{name} is shared by several layers, of which peft would change only one; untie them first, or "
                "leave it out "
                f"of the graft (select_graft(..., skip={name!r}))"
            )
        whole = next((a for a in attention if _part_called(name, a)), None)  # which does not call its own layers
        if whole is None and own == "weight" and type(base.get_submodule(path)) is nn.Linear:
            linear.append(name)
        else:
            full.append(path if whole is None else whole)
    if "" in full:
        own = next(n for n in names if "." not in n)
        raise GraftError(
            f"{own} belongs to the model itself rather than a layer, which peft cannot store; leave it out of the "
            f"graft (select_graft(..., skip={own!r}))"
        )
    return linear, full


def _part_called(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


def _with_namesakes(base: nn.Module, modules: list[str]) -> list[str]:
    """The modules plus those that peft also matches, since their paths end in the same letters; only the outer ones."""
    paths = [path for path, _ in base.named_modules() if path]
    taken = [path for path in paths if any(path.endswith(m) for m in modules)]
    return [path for path in taken if not any(_part_called(path, outer) for outer in taken)]


def _added_up(own: Tensor, way: Tensor) -> Tensor:
    """Add a dense and a sparse tensor as peft does: in float32 or wider, then rounded to the dense one's type."""
    return (own.to(torch.promote_types(own.dtype, way.dtype)) + way).to(own.dtype)


def read_shira(folder: Path, pretrained: TensorSource) -> dict[str, Elements]:
    """The elements that a folder with a SHiRA adapter changes, with their new values. See `Graft.from_peft`."""
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "SHIRA":
        raise GraftError(
            f"{folder}: the adapter is {config.get('peft_type')}, expected SHIRA; for LoRA use "
            "TaskVector.between(pretrained, folder)"
        )
    stored, ours = named_tensors(folder / WEIGHTS), named_tensors(pretrained)
    out: dict[str, Elements] = {}
    for key in stored:
        name = key.removeprefix(PREFIX)
        if name.endswith(AT):
            continue
        layer = name.removesuffix(BY)
        name = f"{layer}.weight" if name.endswith(BY) else name
        if name not in ours:
            raise GraftError(f"{folder} changes {name}, which the pretrained model lacks; pass the adapter's own base")
        t = ours[name].detach()
        if key.endswith(BY):
            where = PREFIX + layer + AT
            if where not in stored or stored[where].shape != (2, len(stored[key])) or t.dim() != 2:
                raise IntegrityError(f"{folder}: {layer} lacks indices that match its values; save the adapter again")
            at = stored[where][0].long() * t.shape[1] + stored[where][1].long()
            if len(at) and not 0 <= int(at.min()) <= int(at.max()) < t.numel():
                raise GraftError(
                    f"{folder}: {name} has elements outside of {list(t.shape)}; pass the adapter's own base"
                )
            old, way = t.reshape(-1)[at].cpu(), stored[key]
            order = at[way != 0].argsort()
            at, now = at[way != 0][order], _added_up(old, way)[way != 0][order]
        else:
            if stored[key].shape != t.shape:
                raise GraftError(
                    f"{name} is {list(t.shape)} in the pretrained model, {list(stored[key].shape)} in the adapter; "
                    "pass the adapter's own base"
                )
            now = stored[key].to(t.dtype).reshape(-1)
            at = (now != t.cpu().reshape(-1)).nonzero().view(-1)
            now = now[at]
        if len(at):
            out[name] = at, now
    return out
