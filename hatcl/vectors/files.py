"""Writing named tensors as safetensors, one shard in memory at a time. A write that was interrupted never looks
complete: shards gather in a hidden folder, move next to their place when all are there, and the index comes last."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError
from ..files import alone, write_files, writing
from .pickles import PICKLES
from .tensors import INDEX, IS_SHARD, SINGLE, Kind, files_of, kinds_of, named_tensors, opened

SHARD_BYTES = 100 << 20
UNFINISHED = ".unfinished"  # the folder inside the target that collects shards until all are written
PLAN = "plan.json"  # in it: the content being written, so that the same write resumes and another one starts again
# weights of other formats, and adapters, which would be read together with the written files or instead of them
OTHER_WEIGHTS = (
    "adapter_config.json", "adapter_model.*", "pytorch_model*.bin*", "tf_model*.h5*", "flax_model*.msgpack*",
    "consolidated*.pth", "consolidated*.safetensors",
)  # fmt: skip
AGAIN = "Finished files stay: run the same again"  # what an error of writing says at its end


def write_tensors(
    path: Path,
    kinds: Mapping[str, Kind],
    make: Callable[[str], Mapping[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
    *,
    shard_bytes: int | None = None,
    recipe: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write tensors one shard after another. The old content stays readable until all of the new is written. A
    second write of the same folder waits for the first.

    Args:
        path: a file that ends in `.safetensors`, or a folder: `model.safetensors`, or shards and an index as in
        transformers if there are more than `shard_bytes` (default 100 MiB). A shard, or a single file, is in memory
        while it is written.
        kinds: the tensors to write. make: returns the tensors to store for a name (which may be several).
        metadata: text for the files' headers; by default `format: pt`, which transformers expects. recipe: a
            description of the sources. An interrupted write resumes if the recipe is the same. progress: called with
            the bytes of each finished tensor.

    Raises:
        ConfigError: the folder holds weights of another format, or an adapter.
        IntegrityError: the disk is full or not writable.
    """
    meta = dict(metadata or {"format": "pt"})
    if path.name.endswith(".safetensors"):
        with writing(path, AGAIN):
            path.parent.mkdir(parents=True, exist_ok=True)
        _write_file(path, list(kinds), make, meta, kinds, progress)
        return path
    refuse_left_overs(path, OTHER_WEIGHTS)
    with writing(path, AGAIN):
        path.mkdir(parents=True, exist_ok=True)
    shards = _plan(kinds, SHARD_BYTES if shard_bytes is None else shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE]
    scratch = path / UNFINISHED
    with alone(path):
        _begin(scratch, recipe, shards)
        for name, inside in zip(names, shards, strict=True):
            if not (scratch / name).exists():
                _write_file(scratch / name, inside, make, meta, kinds, progress)
            elif progress is not None:
                progress(sum(nbytes(kinds[n]) for n in inside))
        _move_in(path, names)
    return path


def refuse_left_overs(folder: Path, patterns: Sequence[str], replaced: Container[str] = ()) -> None:
    """Raise `ConfigError` if a folder holds another model's files, which would be read together with the new ones.

    Args:
        patterns: of names, as `Path.glob` has them. replaced: the names that are written again.
    """
    found = {f.name for pattern in patterns for f in folder.glob(pattern) if f.is_file()}
    left = sorted(name for name in found if name not in replaced)
    if left:
        raise ConfigError(
            f"out: {folder} holds {', '.join(left[:5])}{' ...' if len(left) > 5 else ''} of another model, which would "
            "be read together with the result; remove that, or name another folder"
        )


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file, or of a folder's first shard. (What torch.save wrote has none.)"""
    file = files_of(path)[0]
    if file.suffix in PICKLES:
        return {}
    with opened(file) as f:
        return dict(f.metadata() or {})


def nbytes(kind: Kind) -> int:
    return math.prod(kind.shape) * kind.dtype.itemsize


def _plan(kinds: Mapping[str, Kind], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, kind in kinds.items():
        size = nbytes(kind)
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _begin(scratch: Path, recipe: str | None, shards: list[list[str]]) -> None:
    """Prepare an empty folder for the shards, unless it holds part of the same write."""
    plan = json.dumps({"recipe": recipe, "shards": shards}).encode()
    with writing(scratch / PLAN, AGAIN):
        if recipe is not None and (scratch / PLAN).exists() and (scratch / PLAN).read_bytes() == plan:
            return
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    write_files({scratch / PLAN: plan}, then=AGAIN)


def _move_in(path: Path, names: list[str]) -> None:
    """Replace the old content by the finished shards. In between, the folder cannot be read as a mixture: the old index
    is removed first, shards without an index are refused, and the new index is written last."""
    scratch = path / UNFINISHED
    stored = {name: kinds_of(named_tensors(scratch / name)) for name in names}
    with writing(path, AGAIN):
        (path / INDEX).unlink(missing_ok=True)
        for old in path.glob("*.safetensors"):
            if old.name not in names and (old.name == SINGLE or IS_SHARD.search(old.name)):
                old.unlink()
        for name in names:
            os.replace(scratch / name, path / name)
        if names != [SINGLE]:
            total = sum(nbytes(k) for kinds in stored.values() for k in kinds.values())
            where = {n: name for name, kinds in stored.items() for n in kinds}
            index = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2)
            write_files({path / INDEX: index.encode()}, then=AGAIN)
        shutil.rmtree(scratch)


def _write_file(
    file: Path,
    names: list[str],
    make: Callable[[str], Mapping[str, Tensor]],
    meta: dict[str, str],
    kinds: Mapping[str, Kind],
    progress: Callable[[int], None] | None,
) -> None:
    tensors: dict[str, Tensor] = {}
    for name in names:
        for n, t in make(name).items():
            t = t.detach().contiguous().cpu()
            # safetensors refuses tensors that share memory
            shared = any(t.untyped_storage().data_ptr() == o.untyped_storage().data_ptr() for o in tensors.values())
            tensors[n] = t.clone() if shared else t
        if progress is not None:
            progress(nbytes(kinds[name]))
    write_files({file: lambda new: save_file(tensors, new, metadata=meta)}, then=AGAIN)
