"""The output of `hatcl --version`, which with `--verbose` has what a bug report needs."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import hatcl

REPORTED = (
    "torch", "torchvision", "timm", "transformers", "peft", "accelerate", "lightning", "open_clip_torch", "safetensors",
    "numpy", "scikit-learn", "datasets", "onnx", "onnxruntime",
)  # fmt: skip


def version_of(library: str) -> str:
    """A library's version, without importing it."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def devices() -> str:
    """The devices on which torch can compute here."""
    found = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return ", ".join([f"cpu ({torch.get_num_threads()} threads)", *found])


def environment() -> dict[str, str]:
    """Versions, platform and devices, without names of users, machines or folders."""
    return {
        "hatcl": hatcl.__version__,
        "python": platform.python_version(),
        **{library: version_of(library) for library in REPORTED},
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "devices": devices(),
    }
