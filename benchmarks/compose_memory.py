"""How much memory `hatcl merge` takes on files: eight fine-tunes of a ViT-B are added to their base, 3.1 GB in all.

    python benchmarks/compose_memory.py [--parts 8] [--model vit_base_patch16_224]
    python benchmarks/compose_memory.py --parts 3 --recipe ties      # a recipe of mergekit instead of the sum

The composition runs in its own process while its anonymous memory is polled (RssAnon of /proc/<pid>/status; pages of
mapped files also count as resident, but the kernel can reclaim them at any time). Limit: 400 MB above the memory of the
process after its imports. The result is compared, tensor by tensor, with the same vectors composed in memory. All
weights are random and unrelated. This is the worst case, since many elements need remainders (a fine-tune of small
steps needs none). The files lie in a temporary folder and are removed afterwards.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from common import save
from safetensors.torch import load_file, save_file

from hatcl.vectors.mergekit import follow_recipe
from hatcl.vectors.stream import compose_files
from hatcl.vectors.task_vector import TaskVector, composed
from hatcl.vectors.tensors import named_tensors

LIMIT = 400e6
POLL = 0.005
READY = "ready"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm name")
    parser.add_argument("--parts", type=int, default=8, help="how many fine-tunes")
    parser.add_argument("--recipe", help="one of mergekit's methods: measure a recipe with it")
    parser.add_argument("--scratch", type=Path, help="where the files go; by default the system's temporary folder")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        return child(options.child, options.parts, options.recipe)
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        folder = Path(name)
        size = write_files(folder, options.model, options.parts)
        result: dict[str, Any] = {"model": options.model, "parts": options.parts, "bytes_read": size}
        result |= measure(folder, options.parts, options.recipe)
        if options.recipe is None:
            result |= equal(folder, options.parts)
    result["limit_bytes"] = int(LIMIT)
    print(result)
    if options.recipe is not None:
        save(f"recipe_memory_{options.recipe}", result)
        return
    if options.parts == 8 and options.model == "vit_base_patch16_224":
        save("compose_memory", result)
    assert result["equal_to_in_memory"] and result["peak_above_import_bytes"] <= LIMIT


def coefficients(parts: int) -> list[float]:
    return [0.1 + 0.05 * i for i in range(parts)]


def write_files(folder: Path, model: str, parts: int) -> int:
    """A base and its fine-tunes; their bytes in all."""
    torch.manual_seed(0)
    base = {n: t.clone() for n, t in timm.create_model(model).state_dict().items()}
    size = sum(t.numel() * t.element_size() for t in base.values()) * (parts + 1)
    free = shutil.disk_usage(folder).free
    if free < 2 * size:
        raise SystemExit(f"{folder}: {free / 1e9:.1f} GB free, expected {2 * size / 1e9:.1f}; name another --scratch")
    save_file(base, folder / "base.safetensors")
    for i in range(parts):
        moved = {n: 0.02 * torch.randn_like(t) if t.is_floating_point() else t for n, t in base.items()}
        save_file(moved, folder / f"{i}.safetensors")
    return size


def child(folder: Path, parts: int, recipe: str | None) -> None:
    print(READY, flush=True)
    sys.stdin.readline()
    if recipe is not None:
        own = {"weight": 0.5, "density": 0.5}
        models = [{"model": str(folder / f"{i}.safetensors"), "parameters": own} for i in range(parts)]
        base = str(folder / "base.safetensors")
        follow_recipe({"merge_method": recipe, "base_model": base, "models": models}, folder / "out")
        return
    sources = [(folder / f"{i}.safetensors", c) for i, c in enumerate(coefficients(parts))]
    compose_files(folder / "base.safetensors", sources, folder / "out")


def measure(folder: Path, parts: int, recipe: str | None) -> dict[str, Any]:
    """Compose in a process of its own and watch it."""
    command = [sys.executable, __file__, "--child", str(folder), "--parts", str(parts)]
    command += ["--recipe", recipe] if recipe is not None else []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline().strip() == READY
        imported = peak = anonymous(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        began = time.perf_counter()
        polls = 0
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            polls += 1
            time.sleep(POLL)
        seconds = time.perf_counter() - began
    assert process.returncode == 0
    return {
        "peak_above_import_bytes": peak - imported, "after_import_bytes": imported, "seconds": seconds, "polls": polls,
        "shards": len(list((folder / "out").glob("*.safetensors"))),
    }  # fmt: skip


def anonymous(pid: int) -> int:
    """RssAnon in bytes; 0 when the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def equal(folder: Path, parts: int) -> dict[str, Any]:
    """Are the tensors on disk those that the same vectors give in memory, bit for bit?"""
    base = load_file(folder / "base.safetensors")
    terms, shares = [], []
    for i, c in enumerate(coefficients(parts)):
        v = TaskVector.between(base, load_file(folder / f"{i}.safetensors"))
        shares.append(sum(d.at.numel() for n in v if (d := v.delta(n)).at is not None) / v.numel)
        terms.append((c, v))
    want, got = composed(base, terms), named_tensors(folder / "out")
    same = set(got) == set(want) and all(torch.equal(got[n], want[n]) for n in want)
    return {"equal_to_in_memory": same, "share_with_remainders": sum(shares) / len(shares)}


if __name__ == "__main__":
    main()
