"""Turn a full fine-tune into the nearest LoRA adapter of a rank, matrix by matrix, in peft's own format."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import whole
from ..errors import IntegrityError, VectorError
from ..files import write_files
from ..functional import digest_of
from .adapters import CONFIG, WEIGHTS
from .tensors import check_fit, named_tensors, pick

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LoRAReport:
    """The part of a vector that an adapter keeps.

    Attributes:
        folder: the adapter's folder. rank: the rank of every layer's pair. errors: weight -> `||tau - B A||_F /
        ||tau||_F`.
        left_out: changed tensors that LoRA cannot hold -> their share `||tau_i||_F / ||tau||_F` of the vector. error:
            the relative error of the whole vector, including tensors that were left out.
    """

    folder: Path
    rank: int
    errors: dict[str, float]
    left_out: dict[str, float]
    error: float

    def __str__(self) -> str:
        worst = max(self.errors, key=lambda n: self.errors[n])
        out = f"rank {self.rank} keeps {len(self.errors)} weights with a relative error of {self.error:.3g} in all"
        out += f", {self.errors[worst]:.3g} in {worst}"
        if self.left_out:
            largest = max(self.left_out, key=lambda n: self.left_out[n])
            out += f"; {len(self.left_out)} tensors are left out, such as {largest} ({self.left_out[largest]:.3g})"
        return out


def write_lora(
    vector: Mapping[str, Tensor], digests: Mapping[str, str] | None, rank: int, base: nn.Module, folder: Path
) -> LoRAReport:
    """See `TaskVector.to_lora`. `digests` belong to the tensors of the vector's base."""
    rank = whole("rank", rank)
    if not isinstance(base, nn.Module):
        raise VectorError(
            f"base: got a {type(base).__name__}, expected the pretrained model as a module: files do not show which "
            "layers LoRA can adapt"
        )
    tensors = named_tensors(base)
    check_fit(
        pick(tensors, [n for n in tensors if n in vector]), vector, ("the model", "the vector"),
        "Pass the model that the vector was taken from",
    )  # fmt: skip
    for name in vector:
        if digests is not None and digests[name] != digest_of(tensors[name]):
            raise IntegrityError(f"{name} differs from this vector's base; pass its own base")
    layers = _paired_layers(base)
    factors: dict[str, Tensor] = {}
    errors, left_out, lost, mass = {}, {}, [], []
    for name in vector:
        tau = vector[name].double()
        size = float(tau.square().sum())
        mass.append(size)
        if not size:
            continue
        if name not in layers:
            left_out[name] = math.sqrt(size)
            lost.append(size)
            continue
        turned = _inputs_first(layers[name])
        a, b = _lora_factors(tau.T if turned else tau.flatten(1), rank)
        gap = float(((tau.T if turned else tau.flatten(1)) - b.double() @ a.double()).square().sum())
        errors[name] = math.sqrt(gap / size)
        lost.append(gap)
        key = f"base_model.model.{name.removesuffix('.weight')}"
        conv = isinstance(layers[name], CONVS)
        factors[f"{key}.lora_A.weight"] = a.view(rank, *tau.shape[1:]) if conv else a
        factors[f"{key}.lora_B.weight"] = b.view(-1, rank, *[1] * (tau.dim() - 2)) if conv else b
    if not errors:
        raise VectorError(
            "the vector changes no weight that LoRA can adapt; it takes linear layers and convolutions without "
            f"groups, the vector changes {', '.join(list(left_out)[:5]) or 'nothing'}"
        )
    config = _peft_config(
        base, rank, [n.removesuffix(".weight") for n in errors], all(_inputs_first(layers[n]) for n in errors)
    )
    text = json.dumps(config, indent=2).encode()
    write_files(
        {folder / WEIGHTS: lambda new: save_file(factors, new, metadata={"format": "pt"}), folder / CONFIG: text}
    )
    whole_norm = math.sqrt(math.fsum(mass))
    shares = {n: x / whole_norm for n, x in left_out.items()}
    return LoRAReport(folder, rank, errors, shares, math.sqrt(math.fsum(lost)) / whole_norm)


def _paired_layers(base: nn.Module) -> dict[str, nn.Module]:
    """Name of a weight -> the layer that peft gives a pair. Without weights that other layers share (a tied head),
    since the pair would change only one of them, and without those inside `nn.MultiheadAttention`, which does not call
    its layers."""
    holders = Counter(id(p) for m in base.modules() for p in m.parameters(recurse=False))
    inside = {id(m) for a in base.modules() if isinstance(a, nn.MultiheadAttention) for m in a.modules()}
    return {
        f"{path}.weight": m
        for path, m in base.named_modules()
        if id(m) not in inside
        and (isinstance(m, nn.Linear) or _inputs_first(m) or (isinstance(m, CONVS) and m.groups == 1))
        and holders[id(m.weight)] == 1
    }


def _inputs_first(layer: nn.Module) -> bool:
    """Whether a layer holds its weight as [in, out]; peft knows such layers as transformers' Conv1D, as in GPT-2."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def _lora_factors(tau: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A `[rank, in]` and B `[out, rank]`, float32, with equal singular values, padded with zeros."""
    u, s, vh = torch.linalg.svd(tau, full_matrices=False)
    root = s[:rank].sqrt()
    a, b = torch.zeros(rank, tau.shape[1]), torch.zeros(tau.shape[0], rank)
    a[: len(root)], b[:, : len(root)] = root[:, None] * vh[:rank], u[:, :rank] * root
    return a, b


def _peft_config(base: nn.Module, rank: int, targets: list[str], turned: bool) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(base, "config", None), "_name_or_path", None),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": turned,
        "init_lora_weights": True,
        "target_modules": peft_targets(base, targets),
    }


def peft_targets(base: nn.Module, targets: list[str]) -> list[str] | str:
    """Layers in the form of peft's configurations. A name in a list matches every module that ends in it; if it would
    match others too, the names become a regular expression that must match in full."""
    paths = [path for path, _ in base.named_modules()]
    ambiguous = any(path.endswith(f".{target}") for target in targets for path in paths)
    return "|".join(map(re.escape, targets)) if ambiguous else targets
