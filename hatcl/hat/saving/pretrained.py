"""Saving and loading as one safetensors file with the config in its header, so that one rename replaces a whole
state."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import distributed, nn

from ...config import HATConfig
from ...errors import HATError, IntegrityError
from ...files import parse_json, refuse_run, sha256_of, write_files
from ...map.units import UnitMap
from ...shards import gathered_in, sharded_modules
from ...sources import build_source, library_config
from .. import digests
from ..build import GATES, build
from ..gates import Gates, gates_of
from ..growth.apply import apply_growth, take_stages
from ..growth.grown import Growth
from ..masked import behind_mask
from ..tasks import tasks
from .card import CARD, CardFacts, model_card, writable
from .headers import check_base, making_model, read_with_header
from .hub import located, uploaded
from .writers import MARK, Way, check_options, is_mixed, take_over

WEIGHTS, CONFIG, FORMAT = "model.safetensors", "config.json", 3
TRIES = 100  # how often a file is read again that was replaced during reading
DEEPER = "deeper"  # in the header: each tensor has a leading dimension of size 1, which `ModelHubMixin` cannot load
HEADER = "hatcl"  # the entry of the file's header that holds the config
KEYS = {"format", "config", "source", "map", "tied", "dtypes", "digests", "fingerprint"}


def save_pretrained(
    model: nn.Module, folder: str | os.PathLike[str], *, card: CardFacts | Mapping[str, Any] | None = None
) -> Path:
    """Write a converted model as three files: `model.safetensors`, whose header holds everything except the tensors
    (options, map, digests, how to build the plain model); `config.json`, a readable copy of this header that is never
    read back; and a model card, `README.md`. A README.md that hatcl did not write is left unchanged.

    The digests in the file detect accidents. An attacker who can write the file can also write the digests, so keep the
    file's checksum in another place, and pass it when loading:

        folder = hatcl.save_pretrained(model, "runs/model")
        checksum = hatcl.files.sha256_of(folder / "model.safetensors")
        model = hatcl.from_pretrained(folder, sha256=checksum)

    Several processes: for a model in DistributedDataParallel, or after `fully_shard`, the process of rank 0 writes the
    file. All processes may call this, and for a sharded model all must; wait (`torch.distributed.barrier()`) before
    another process reads it.

    Args:
        card: facts that the model does not contain: names of tasks and classes, scores (see `CardFacts`).

    Raises:
        ConfigError: a fact about a task that the model does not have; the folder is that of a run.
        IntegrityError: a sealed task changed since it was sealed; the disk is full or not writable. HATError: layers
            assembled by hand (save their `state_dict()`; hatcl cannot build such a model), also around a converted
            model.
    """
    writes = True
    if isinstance(model, nn.parallel.DistributedDataParallel):
        writes = distributed.get_rank() == 0
    model = _unwrapped(model)
    if sharded_modules(model):
        writes = distributed.get_rank() == 0
        whole = gathered_in(model, writes, "cpu")
        model = model if whole is None else whole
    if not writes:
        return Path(folder)
    gates = gates_of(model)
    if len(gates) != 1 or gates[0].unit_map is None:
        raise HATError(
            "save_pretrained: this model was put together by hand, not converted; save model.state_dict() instead"
        )
    digests.check_sealed(model)
    g, target = gates[0], Path(folder)
    refuse_run(target)
    own_card = model_card(model, CardFacts.of(card)) if writable(target / CARD) else None
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[int, int, torch.Size], str] = {}
    for name, t in model.state_dict().items():
        key = (t.data_ptr(), t.storage_offset(), t.shape)
        if t.numel() and key in first:
            tied[name] = first[key]
        else:
            first[key] = name
            tensors[name] = t.detach().contiguous().cpu()
    mixed = is_mixed(model)
    if mixed:
        tensors = {name: t[None] for name, t in tensors.items()}
    text = _signed({
        **library_config(g.source), **MARK,
        **_converted(g), **({DEEPER: True} if mixed else {}), "inputs": g.takes, "format": FORMAT,
        "source": g.source, "tied": tied,
        "dtypes": {name: _name_of(t) for name, t in tensors.items()},
        "digests": {t: g.digests.get(t) or digests.task_digests(model, t) for t in tasks(model)},
    })  # fmt: skip
    header = {HEADER: text}  # one entry: safetensors writes several in any order
    files: dict[Path, Any] = {target / WEIGHTS: lambda new: save_file(tensors, new, header)}
    files[target / CONFIG] = text.encode()
    if own_card is not None:
        files[target / CARD] = own_card.encode()
    write_files(files)
    return target


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    card: CardFacts | Mapping[str, Any] | None = None,
    commit_message: str = "A model with tasks, written by hatcl",
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
) -> str:
    """Upload the files of `save_pretrained` to a hub, as `huggingface_hub.ModelHubMixin.push_to_hub` does, and return
    the address of the commit. `hatcl.from_pretrained(repo_id)` loads the model.

    Args:
        repo_id: ORGANISATION/NAME; created if it does not exist. card: see `save_pretrained`. private: whether a new
            repository is private. token: default: that of `hf auth login`. branch: default: main. create_pr: open a
            pull request instead.

    Raises:
        HATError: see `save_pretrained`, before anything is created on the hub. Errors of huggingface_hub are passed on.
    """
    return uploaded(
        lambda folder: save_pretrained(model, folder, card=card), repo_id, token, private,
        commit_message=commit_message, revision=branch, create_pr=create_pr,
    )  # fmt: skip


def _save_as_its_class(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    *,
    is_main_process: bool = True,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    card: CardFacts | Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """`save_pretrained` as transformers, peft and huggingface_hub call it."""
    pushes = options.pop("push_to_hub", False)
    named = ("repo_id", "private", "token", "commit_message")
    to: dict[str, Any] = {name: options.pop(name) for name in named if name in options}
    check_options(model, state_dict, options if pushes else {**options, **to})
    if is_main_process:
        save_pretrained(model, save_directory, card=card)
        if pushes:
            push_to_hub(model, to.pop("repo_id", Path(save_directory).name), card=card, **to)


_WAYS: dict[str, Way] = {"save_pretrained": _save_as_its_class, "push_to_hub": push_to_hub}


def write_as_hatcl(model: nn.Module) -> nn.Module:
    """If a converted model's class has `save_pretrained` or `push_to_hub`, replace these on the model, so that they
    write a file for `from_pretrained`. The class's own methods would write a plain network with other outputs."""
    take_over(model, _WAYS)
    return model


def from_pretrained(
    folder: str | os.PathLike[str],
    base: nn.Module | None = None,
    *,
    sha256: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> nn.Module:
    """Load a model that `save_pretrained` wrote, in evaluation mode, with bit-equal sealed tasks.

    Nothing in the folder is trusted: no code or pickle in it is run, and no file outside of it is opened. Options come
    from the header of `model.safetensors`; an edited `config.json` only causes a warning.

    Args:
        folder: the written folder, or a Trainer's checkpoint; or the name of a model on a hub, ORGANISATION/NAME.
        base: the plain module, for models that hatcl cannot build itself (all except names of timm and models of
            transformers). It is not changed.
        sha256: the expected checksum of `model.safetensors` (see `save_pretrained`); any other file is refused.
        revision, token, cache_dir, local_files_only, force_download: for a model on a hub, as in
            `huggingface_hub.hf_hub_download`.

    Raises:
        ConfigError: an option of the hub for a folder.
        IntegrityError: the file is missing, truncated, tampered with, has another checksum, is no safetensors file, or
            its tensors do not fit.
    """
    path = located(
        folder, WEIGHTS, (CONFIG, CARD), revision=revision, token=token, cache_dir=cache_dir,
        local_files_only=local_files_only, force_download=force_download,
    ) / WEIGHTS  # fmt: skip
    meta, tensors = _read_model(path, sha256)
    _check_copy(path.parent / CONFIG)
    check_base(base, meta["source"], path.parent)
    with making_model(path.parent):
        unit_map = UnitMap.from_json(meta["map"])
        shapes = {name: entry.shape for name, entry in unit_map.entries.items()}
        plain = build_source(meta["source"]) if base is None else behind_mask(copy.deepcopy(base), shapes)
        model = build(plain, unit_map, HATConfig.from_dict(meta["config"]))
        for growth in meta.get("growths", ()):
            apply_growth(model, Growth.from_json(growth))
        _load(model, meta, tensors, path)
    gates = gates_of(model)[0]
    gates.source, gates.takes = meta["source"], meta.get("inputs")
    return write_as_hatcl(model).eval()


def load_pretrained_(model: nn.Module, folder: str | os.PathLike[str], grow: bool = False) -> None:
    """Load a file of `save_pretrained` in place, into a model that was converted in the same way.

    Args:
        grow: if the file's model has grown further, first grow this one in the same way; its optimizers must then be
            built again.

    Raises:
        IntegrityError: as `from_pretrained`; or the file belongs to a model that was converted differently.
    """
    path = Path(folder) / WEIGHTS
    meta, tensors = _read_model(path, None)
    model = next((m for m in model.modules() if GATES in m._modules), model)
    g = gates_of(model)[0]
    now = {"growths": [], **_converted(g)}
    since = meta.get("growths", [])[len(g.growths) :] if grow else []
    if since and {"growths": [], **meta}["growths"][: len(g.growths)] == json.loads(json.dumps(now["growths"])):
        now["growths"] = meta["growths"]
    for what, ours in json.loads(json.dumps(now)).items():
        theirs = meta.get(what, [])
        if what == "config":  # options that are newer than the file have their defaults
            theirs = {**HATConfig().to_dict(), **theirs}
        if theirs != ours:
            differ = (
                [k for k in {**theirs, **(ours or {})} if ours is None or theirs.get(k) != ours.get(k)]
                if isinstance(theirs, dict)
                else ["its sizes"]
            )
            raise IntegrityError(
                f"{path}: its model was converted otherwise than this one ({what}: {', '.join(sorted(differ)[:3])} "
                "differ); convert the same model with the same options, or take hatcl.from_pretrained"
            )
    for growth in since:
        apply_growth(model, Growth.from_json(growth))
    _load(model, meta, tensors, path)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The converted model without its wrappers (DistributedDataParallel, torch.compile, a host's module).

    Raises:
        HATError: a wrapper has parameters of its own, which would be lost.
    """
    inner = next((m for m in model.modules() if GATES in m._modules), model)
    mine = {id(p) for p in inner.parameters()}
    outside = [name for name, p in model.named_parameters() if id(p) not in mine]
    if outside:
        raise HATError(
            f"save_pretrained: {outside[0]} lies outside of the converted {type(inner).__name__} ({len(outside)} such "
            "parameters), which alone would be written; save model.state_dict(), and load it into a model that was put "
            "together alike (a mask of the inputs belongs to the model by hatcl.convert(..., mask_inputs=True))"
        )
    return inner


def _converted(gates: Gates) -> dict[str, Any]:
    """The options and map that a model was converted with, and its growths since."""
    first = gates.map_at(0)
    grown = {"growths": [growth.to_json() for growth in gates.growths]} if gates.growths else {}
    return {"config": gates.config.to_dict(), "map": None if first is None else first.to_json(), **grown}


def is_converted(model: nn.Module) -> bool:
    """Is it a model that `hatcl.convert` made, which `save_pretrained` can write?"""
    found = [g for m in model.modules() if (g := m._modules.get(GATES)) is not None]
    return len(found) == 1 and getattr(found[0], "unit_map", None) is not None


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked header of a saved model's file: `config`, `source`, `map`, `digests` and so on.

    Raises:
        IntegrityError: as `from_pretrained`.
    """
    return _read_model(Path(folder) / WEIGHTS, None, tensors=False)[0]


# ---- the file ------------------------------------------------------------------------------------------------------


def _read_model(path: Path, sha256: str | None, tensors: bool = True) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and tensors from the same file: safetensors opens it twice, and another save may replace it in between."""
    for _ in range(TRIES):
        before = _stamp(path)
        try:
            if sha256 is not None and before and (found := sha256_of(path)) != sha256.lower():
                raise IntegrityError(
                    f"{path}: its SHA-256 is {found}, expected {sha256}; this is not the file that the checksum was "
                    "taken of, and it was not read"
                )
            text, stored = read_with_header(path, HEADER, "hatcl.save_pretrained", tensors=tensors)
            if _stamp(path) == before:
                meta = _as_written(text, path)
                return meta, {name: t[0] for name, t in stored.items()} if meta.get(DEEPER) else stored
        except IntegrityError:
            if _stamp(path) == before:
                raise
    raise IntegrityError(
        f"{path}: was replaced {TRIES} times while it was read; load it when the process that saves there is done"
    )


def _stamp(path: Path) -> tuple[int, ...]:
    """A stamp that changes when the file is replaced or written to; empty if there is no file."""
    try:
        s = path.stat()
    except OSError:
        return ()
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns


def _signed(meta: dict[str, Any]) -> str:
    """The config as JSON, with a digest of itself."""
    meta = json.loads(json.dumps(meta))  # in the form in which it will be read
    return json.dumps({**meta, "fingerprint": _fingerprint(meta)})


def _fingerprint(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _as_written(text: str | bytes, path: Path) -> dict[str, Any]:
    """Parse a config, and check its format and fingerprint."""
    meta: dict[str, Any] = parse_json(text, path)
    version = meta.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise IntegrityError(f"{path}: format {version}, this hatcl reads up to {FORMAT}; install a newer hatcl")
    if missing := KEYS - set(meta):
        raise IntegrityError(
            f"{path}: its config lacks {', '.join(sorted(missing))}; expected what hatcl.save_pretrained wrote"
        )
    if meta.pop("fingerprint") != _fingerprint(meta) or version != FORMAT:
        raise IntegrityError(
            f"{path}: its config is not as hatcl.save_pretrained wrote it (its fingerprint is another one); the file "
            "was edited or damaged. Load the model with another copy of it, change it, and save it again"
        )
    return meta


def _check_copy(copied: Path) -> None:
    """Warn of an edited copy, since the edit has no effect. A valid copy from another save is not an edit: that save
    may still be in progress."""
    try:
        text = copied.read_bytes()
    except OSError:
        return  # loading does not need it
    try:
        _as_written(text, copied)
    except IntegrityError as error:
        warnings.warn(
            f"{copied} is not as it was saved, which changes nothing: it is a copy to look at, and what counts is the "
            f"header of {WEIGHTS}. To change options, load the model, set hatcl.hat.gates.gates_of(model)[0].config, "
            f"and save it again ({error})",
            stacklevel=3,
        )


# ---- what it holds -------------------------------------------------------------------------------------------------


def _load(model: nn.Module, meta: dict[str, Any], tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Load tensors into a model, and check everything that the header says about them."""
    _check_dtypes(tensors, meta["dtypes"], path)
    for name, first in meta["tied"].items():
        if first in tensors:
            tensors[name] = tensors[first]
    table = next((x for name, x in tensors.items() if name.endswith("stage_table")), None)
    gates = gates_of(model)[0]
    if table is not None and gates.growths:
        stages = table.tolist()
        if len(stages) != gates.num_tasks or not all(0 <= stage <= len(gates.growths) for stage in stages):
            raise IntegrityError(
                f"{path}: stage_table says {stages}, expected for each of {gates.num_tasks} tasks after how many of "
                f"{len(gates.growths)} growths it was sealed; the file was edited or damaged"
            )
        take_stages(model, stages)
    _fit(model, tensors, path)
    state = model.state_dict()  # torch's own, since some modules ask it for their format's version
    state.update(tensors)
    model.load_state_dict(state)
    _check_digests(model, meta["digests"], path)


def _name_of(t: torch.Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _check_dtypes(tensors: dict[str, torch.Tensor], dtypes: dict[str, str], path: Path) -> None:
    """Check dtypes: a tensor with another dtype would count as cast by the user, and its digest would be recomputed
    instead of compared."""
    wrong = [(n, _name_of(t), dtypes.get(n, "not there")) for n, t in tensors.items() if _name_of(t) != dtypes.get(n)]
    if wrong:
        name, found, saved = wrong[0]
        raise IntegrityError(
            f"{path}: {name} is {found}, but was saved as {saved} ({len(wrong)} such tensors); the file was edited. "
            "To change a model's dtype, load it, cast it (model.half()), and save it again"
        )


def _check_digests(model: nn.Module, stored: dict[str, dict[str, str]], path: Path) -> None:
    """Check that digests exist for everything that a sealed task uses, and that they are equal."""
    gates, sealed = gates_of(model)[0], tasks(model)
    if without := [t for t in sealed if not stored.get(str(t))]:
        raise IntegrityError(
            f"{path}: task {without[0]} is sealed, but the digests of what it uses are not there ({len(without)} such "
            "tasks); the file was edited"
        )
    gates.digests = {t: dict(stored[str(t)]) for t in sealed}
    digests.check_sealed(model)  # names changes; computes the digests again, for everything and in its current dtype
    for t in sealed:
        now, was = gates.digests[t], stored[str(t)]
        if wrong := sorted(n for n in {**now, **was} if now.get(n) != was.get(n)):
            raise IntegrityError(
                f"{path}: task {t} uses {wrong[0]}, of which there is no digest in the dtype that it has "
                f"({len(wrong)} such names); the file was edited"
            )


def _fit(model: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Check names and shapes before anything is loaded. Heads may differ in width per task: their copies take the width
    of the file."""
    state = model.state_dict()
    for name, t in tensors.items():
        if name in state and t.shape != state[name].shape and ".hat_tasks." in f".{name}":
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if t.shape[1:] == state[name].shape[1:] and leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(torch.empty_like(t))
                state[name] = t
    problems = [f"missing {n}" for n in state if n not in tensors]
    problems += [f"unexpected {n}" for n in tensors if n not in state]
    problems += [
        f"{n} is {list(tensors[n].shape)}, expected {list(state[n].shape)}"
        for n in state
        if n in tensors and tensors[n].shape != state[n].shape
    ]
    if problems:
        raise IntegrityError(
            f"{path}: {len(problems)} tensors do not fit: {'; '.join(problems[:5])}"
            f"{' ...' if len(problems) > 5 else ''}. Was the folder written for another model or base?"
        )
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if name in tensors and tensors[name].dtype != p.dtype:
            p.data = p.data.to(tensors[name].dtype)
