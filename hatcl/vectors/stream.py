"""Compose checkpoints as files, tensor by tensor, with memory for only one shard and a few tensors."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

from ..errors import ConfigError
from .adapters import CONFIG, WEIGHTS, is_adapter
from .bases import digests_of, joined_bases
from .checkpoint import complete_folder, dtype_named, refuse_others, tokenizer_folder, transformers_config
from .files import SHARD_BYTES, nbytes, read_metadata, write_tensors
from .merging.layers import restricted
from .select import Patterns, applicable, chosen_names, left_by
from .task_vector import VECTOR_FORMAT, TaskVector, combined, composed
from .tensors import Kind, files_of, kinds_of, named_tensors, pick, stamps_of

log = logging.getLogger(__name__)
AnyPath = Union[str, "os.PathLike[str]"]


def compose_files(
    base: AnyPath,
    parts: Sequence[tuple[AnyPath, float]],
    out: AnyPath,
    *,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    vector: bool = False,
    buffers: bool = False,
    check: bool = True,
    only: Patterns = (),
    skip: Patterns = (),
    embeddings: str = "equal",
    dtype: str | None = None,
    tokenizer: str = "base",
    card: str = "",
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `theta0 + sum_i c_i tau_i`, summed in float64 and rounded once: a single part with coefficient 1 reproduces
    its fine-tuned checkpoint bit for bit. The result is byte for byte that of the same vectors in memory.

    If the base is a folder of transformers and `out` a folder, its config and generation config, a tokenizer and a
    model card are written too, so that `from_pretrained` loads the result.

    Calling it again with the same files and options resumes an interrupted write.

    Args:
        base: the pretrained checkpoint: a safetensors file, or a folder with one or with shards.
        parts: pairs of a path and a coefficient. A path is a fine-tuned checkpoint (its difference to `base` is taken),
            a saved task vector, or the folder of a peft LoRA adapter.
        out: a folder, or a file that ends in `.safetensors` (which is assembled in memory).
        method: a merging method of `hatcl.merge` instead of the sum, with its `options`; it gets the vectors
            `c_i tau_i`.
        vector: write the task vector instead of the checkpoint.
        buffers: also compose running statistics; otherwise they are taken from the base, as integers always are.
        check: compare the base with the digests that saved task vectors hold.
        only, skip: patterns (`fnmatch`) of the tensors to compose, and of those to leave as in the base. A pattern
        needs to match in only one of the files.
        embeddings: `common`: if a part's vocabulary has another size, use the rows that it and the base have.
        dtype: the type for storing floating-point tensors, such as `bfloat16`, after rounding to the base's own.
        tokenizer: `base`, or the part whose tokenizer the result gets. card: the recipe as the model card shows it.
        progress: called with the bytes that are finished and those in all.

    Raises:
        ConfigError: there are no parts, a coefficient is not finite, the output would replace a file that is read, or
            the folder holds another model's files. VectorError: a part does not fit the base. IntegrityError: a file is
            missing or damaged, a vector has another base, or the disk is full.
    """
    if not parts:
        raise ConfigError("compose: no parts; pass at least one checkpoint, task vector or adapter")
    for path, c in parts:
        if not math.isfinite(c):
            raise ConfigError(f"coefficient of {path}: got {c}, expected a finite number")
    if options and method is None:
        raise ConfigError(f"options: got {', '.join(options)} without a method that takes them; name one with method=")
    if shard_bytes <= 0:
        raise ConfigError(f"shard_bytes: got {shard_bytes}, expected a positive number")
    read = [files_read(Path(p)) for p in (base, *(p for p, _ in parts))]
    target = Path(out).resolve()
    for file in (f.resolve() for files in read for f in files):
        if target in (file, file.parent):
            raise ConfigError(f"out: {out} would replace {file}, which is read; name another folder")
    if method is not None:
        from .merging.registry import merge, merge_info  # it knows all methods

        merge_info(method)
    stored, config = dtype_named(dtype), transformers_config(Path(base))
    texts = tokenizer_folder(tokenizer, Path(base), [Path(p) for p, _ in parts]) if tokenizer != "base" else None
    if not vector:
        refuse_others(Path(out), Path(base), config, tokenizer=texts)
    theta0 = named_tensors(base)
    if only or skip:
        every = {name: [name] for path in (base, *(p for p, _ in parts)) for name in _names_in(path)}
        chosen_names(every, only, skip)  # raises if a pattern matches in none of them
    found = [_vector(base, path, buffers, only, skip, embeddings) for path, _ in parts]
    some = next((v for v in found if v is not None), None)
    if some is None:
        raise ConfigError(f"only={only!r} and skip={skip!r} leave none of the tensors that the parts change")
    unchanged = restricted(some, [next(iter(some))]) * 0.0
    terms = [(float(c), unchanged if v is None else v) for v, (_, c) in zip(found, parts, strict=True)]
    recipe = json.dumps(
        [
            [stamps_of(files) for files in read],
            [c for c, _ in terms], method, dict(options or {}), vector, buffers, only, skip, embeddings, dtype,
        ],
        default=repr,
    )  # fmt: skip
    if method is not None:
        given = {"pretrained": theta0} if "pretrained" in merge_info(method).needs else {}
        terms = [(1.0, merge([v * c for c, v in terms], method=method, **{**given, **(options or {})}))]
    made = composed(theta0, terms, check=check)  # raises if a vector does not fit
    if vector:
        summed = combined(terms, check=check)
        digests = digests_of(pick(theta0, list(summed)))
        base_of = joined_bases([summed.base, digests], summed) if check else digests
        done = TaskVector(summed._deltas, base_of, partial=summed.partial)
        return done.save(out, shard_bytes=shard_bytes, recipe=recipe, progress=_towards(done.kinds, progress))
    kinds = {
        n: k._replace(dtype=stored if stored and k.dtype.is_floating_point else k.dtype)
        for n, k in kinds_of(made).items()
    }
    path = write_tensors(
        Path(out), kinds, lambda name: {name: made[name].to(kinds[name].dtype)},
        shard_bytes=shard_bytes, recipe=recipe, progress=_towards(kinds, progress),
    )  # fmt: skip
    if path.is_dir():
        named = [str(base), *(str(p) for p, _ in parts)]
        complete_folder(path, Path(base), config, dtype=stored, tokenizer=texts, models=named, recipe=card or recipe)
    return path


def files_read(path: Path) -> list[Path]:
    """The files of a checkpoint, a task vector or an adapter."""
    return [path / CONFIG, path / WEIGHTS] if is_adapter(path) else files_of(path)


def _names_in(path: AnyPath) -> set[str]:
    """The names of a file's tensors; an adapter's are the base's."""
    return set() if is_adapter(path) else set(named_tensors(path))


def _vector(
    base: AnyPath, path: AnyPath, buffers: bool, only: Patterns, skip: Patterns, embeddings: str
) -> TaskVector | None:
    """A part's vector. Only patterns that match in it are applied, since others may be meant for another part; None if
    they leave nothing of it."""
    adapter = is_adapter(path)
    saved = None if adapter or VECTOR_FORMAT not in read_metadata(path) else TaskVector.load(path)
    whole = TaskVector.between(base, path, buffers=buffers, embeddings=embeddings) if adapter else saved
    every = sorted(_names_in(base) | _names_in(path)) if whole is None else list(whole)
    kept = left_by(every, only, skip)
    if not kept:
        log.warning("%s: only=%r and skip=%r leave none of its tensors; it counts as unchanged", path, only, skip)
        return None
    if whole is None:
        only, skip = applicable(only, every), applicable(skip, every)
        vector = TaskVector.between(base, path, buffers=buffers, only=only, skip=skip, embeddings=embeddings)
    else:
        vector = restricted(whole, kept) if only or skip else whole
    if saved is None:
        vector.base = None  # it was made from this very base, so nothing needs to be hashed
    return vector


def _towards(kinds: Mapping[str, Kind], progress: Callable[[int, int], None] | None) -> Callable[[int], None]:
    total, settled = sum(nbytes(k) for k in kinds.values()), 0

    def add(count: int) -> None:
        nonlocal settled
        settled += count
        if progress is not None:
            progress(settled, total)

    return add
