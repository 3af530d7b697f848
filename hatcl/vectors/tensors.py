"""Named tensors in a module, a state dict, or files that are read tensor by tensor."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, Union

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import IntegrityError, VectorError
from ..files import read_json
from .pickles import PICKLED, PICKLES, read_pickle

TensorSource = Union[nn.Module, Mapping[str, Tensor], str, "os.PathLike[str]"]
SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
IS_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
FINETUNED = "finetuned.safetensors"  # a run of `hatcl finetune` keeps the pretrained weights next to it
# running statistics and counters; in files only the names distinguish them from parameters
RUNNING = ("running_mean", "running_var", "num_batches_tracked")


class Kind(NamedTuple):
    """A tensor's shape and dtype, known before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


Value = TypeVar("Value")


class Lazy(Mapping[str, Value], Generic[Value]):
    """Tensors (or values made from them) that are made on demand and not kept.

    Args:
        kinds: name -> shape and dtype. read: makes a tensor by name.
    """

    def __init__(self, kinds: Mapping[str, Kind], read: Callable[[str], Value]) -> None:
        self.kinds = dict(kinds)
        self.read = read

    def __getitem__(self, name: str) -> Value:
        if name not in self.kinds:
            raise KeyError(name)
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)

    def __contains__(self, name: object) -> bool:  # `Mapping` would read the tensor to find out
        return name in self.kinds


def kinds_of(tensors: Mapping[str, Tensor]) -> dict[str, Kind]:
    """Shape and dtype of every tensor, without reading any."""
    known = getattr(tensors, "kinds", None)  # `Lazy` and task vectors have it
    if known is not None:
        return dict(known)
    return {name: Kind(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def named_tensors(source: TensorSource) -> Mapping[str, Tensor]:
    """All tensors of a model, a state dict, a safetensors file or one that torch.save wrote, or a folder of them
    (`find_file`). Tied tensors appear once, under their first name; files are read on demand.

    Raises:
        IntegrityError: a file is missing, damaged, or holds something else. VectorError: the source is none of these.
    """
    if isinstance(source, nn.Module):
        return _once({**dict(source.named_parameters()), **dict(source.named_buffers())})
    if isinstance(source, Lazy):
        return source
    if isinstance(source, Mapping):
        wrong = next((n for n, t in source.items() if not isinstance(t, Tensor)), None)
        if wrong is not None:
            raise VectorError(
                f"{wrong}: got {type(source[wrong]).__name__}, expected a tensor; pass model.state_dict()"
            )
        return _once(source)
    if isinstance(source, (str, os.PathLike)):
        return _lazy_files(Path(source))
    raise VectorError(f"got {type(source).__name__}, expected a module, a state dict, or the path of safetensors files")


def buffers_of(source: Any) -> set[str]:
    """The names of a module's buffers; other sources do not distinguish them from parameters."""
    return {n for n, _ in source.named_buffers()} if isinstance(source, nn.Module) else set()


def pick(tensors: Mapping[str, Tensor], names: list[str]) -> Mapping[str, Tensor]:
    """Some of the tensors, still unread where they were."""
    if isinstance(tensors, Lazy):
        return Lazy({n: tensors.kinds[n] for n in names}, tensors.read)
    return {n: tensors[n] for n in names}


def check_fit(
    expected: Mapping[str, Tensor], got: Mapping[str, Tensor], what: tuple[str, str], remedy: str = ""
) -> None:
    """Raise `VectorError` if two sets of tensors differ in names or shapes.

    Args:
        what: the error's names for the two. remedy: what to do, at the end of the text.
    """
    ours, theirs = kinds_of(expected), kinds_of(got)
    problems = [f"{n} only in {what[0]}" for n in ours if n not in theirs]
    problems += [f"{n} only in {what[1]}" for n in theirs if n not in ours]
    problems += [
        f"{n} is {list(ours[n].shape)} in {what[0]}, {list(theirs[n].shape)} in {what[1]}"
        for n in ours
        if n in theirs and ours[n].shape != theirs[n].shape
    ]
    if problems:
        raise VectorError(
            f"{what[0]} and {what[1]} differ in {len(problems)} tensors: {'; '.join(problems[:5])}"
            f"{' ...' if len(problems) > 5 else ''}{'. ' if remedy else ''}{remedy}"
        )


def tied_names(source: Any) -> dict[str, str]:
    """Name -> the first name of the tensor, for all tensors of a module or state dict that share one. Empty for files,
    which do not show it."""
    if isinstance(source, nn.Module):
        named = {**dict(source.named_parameters(remove_duplicate=False)), **dict(source.named_buffers())}
    elif isinstance(source, Mapping) and not isinstance(source, Lazy):
        named = dict(source)
    else:
        return {}
    first: dict[Any, str] = {}
    return {n: first.setdefault(_identity(t), n) for n, t in named.items()}


def _identity(t: Tensor) -> object:
    """A key that is equal for tensors with the same elements in memory. (Wrapper tensors, such as quantised ones, have
    no memory of their own.)"""
    if t.is_meta or not t.numel() or not t.data_ptr():
        return id(t)
    return t.data_ptr(), t.shape, t.stride(), t.dtype


def _once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tied = tied_names(tensors)
    return {name: t.detach() for name, t in tensors.items() if tied[name] == name}


def find_file(path: Path) -> Path:
    """The file, or the index of shards, for a path (of either, or of a folder): in a folder its index, else
    `model.safetensors`, whatever lies next to it, else the one file of its kind, else `pytorch_model.bin` or its index,
    else the fine-tuned weights of a run of `hatcl finetune`.

    Raises:
        IntegrityError: there is none, or more than one.
    """
    if not path.is_dir():
        return path
    for name in (INDEX, SINGLE):
        if (path / name).exists():
            return path / name
    found = sorted(path.glob("*.safetensors.index.json"))
    files = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if not found and len(files) == 1 and not IS_SHARD.search(files[0].name):
        return files[0]
    if (path / FINETUNED).exists():
        return path / FINETUNED
    if not found and not files:
        for name in (f"{PICKLED}.index.json", PICKLED):
            if (path / name).exists():
                return path / name
        pickled = sorted(f for f in path.iterdir() if f.suffix in PICKLES)
        if pickled:
            raise IntegrityError(f"{path} holds no safetensors files; pass the path of the one to read, {pickled[0]}")
    raise IntegrityError(
        f"{path} holds {len(files)} safetensors files and no {INDEX}; pass one file's path, or write the shards again "
        "(an interrupted write has no index)"
    )


def shards_of(path: Path) -> dict[str, Path]:
    """The file of each tensor in an index.

    Raises:
        IntegrityError: it is not an index, or names files outside its folder.
    """
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict):
        raise IntegrityError(f"{path} is not an index of safetensors shards (it has no weight_map); write it again")
    for name, file in where.items():
        if not isinstance(file, str) or Path(file).is_absolute() or not {"", ".."}.isdisjoint(file.split("/")):
            raise IntegrityError(
                f"{path}: {name} is assigned to {file!r}, expected a file in the same folder. Was it edited? Write "
                "it again"
            )
    return {name: path.parent / file for name, file in where.items()}


def files_of(path: str | os.PathLike[str]) -> list[Path]:
    """The tensors' files for a path."""
    file = find_file(Path(path))
    return sorted(set(shards_of(file).values())) if file.suffix == ".json" else [file]


def stamps_of(files: list[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of each file, which reveal a changed file."""
    return [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def _lazy_files(path: Path) -> Lazy[Tensor]:
    """Every tensor of a file, or of a folder with one or with an index of its shards; tied tensors of a pickle once."""
    file = find_file(path)
    if file.suffix != ".json":
        return _lazy_pickles([file]) if file.suffix in PICKLES else Lazy(_header(file), partial(_read_tensor, file))
    where = shards_of(file)
    shards = sorted(set(where.values()))
    if all(f.suffix in PICKLES for f in shards):
        return _lazy_pickles(shards)
    kinds = {n: k for f in shards for n, k in _header(f).items() if where.get(n) == f}
    missing = [n for n in where if n not in kinds]
    if missing:
        raise IntegrityError(
            f"{file}: {where[missing[0]].name} lacks {missing[0]}; its shards come from different writes, write "
            "them again"
        )
    return Lazy(kinds, lambda name: _read_tensor(where[name], name))


def _lazy_pickles(files: list[Path]) -> Lazy[Tensor]:
    held: dict[str, Tensor] = {}
    for file in files:
        held |= _once(read_pickle(file))
    return Lazy(kinds_of(held), held.__getitem__)


STORED_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "C64": torch.complex64, "BOOL": torch.bool,
}  # fmt: skip


def _header(path: Path) -> dict[str, Kind]:
    out = {}
    with opened(path) as f:
        for name in f.keys():  # noqa: SIM118 (not a dict)
            s = f.get_slice(name)
            out[name] = Kind(tuple(s.get_shape()), STORED_DTYPES.get(s.get_dtype(), torch.uint8))
    return out


def _read_tensor(path: Path, name: str) -> Tensor:
    with opened(path) as f:
        return f.get_tensor(name)


def opened(path: Path) -> Any:
    """`safetensors.safe_open`, with errors that name what is wrong with the file."""
    try:
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise IntegrityError(f"{path}: no such file; expected safetensors") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise IntegrityError(
            f"{path} cannot be read as safetensors ({error}); the file is truncated, damaged, or of another format"
        ) from error
