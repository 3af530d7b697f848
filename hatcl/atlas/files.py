"""The files of the procedures: task vectors, frozen heads, learned coefficients."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import ConfigError, VectorError
from ..files import write_files
from ..vectors.adapters import is_adapter
from ..vectors.compose import Composer
from ..vectors.delta import Delta
from ..vectors.files import read_metadata
from ..vectors.parameters import parameters_of
from ..vectors.task_vector import VECTOR_FORMAT, TaskVector
from ..vectors.tensors import RUNNING, Lazy, kinds_of, named_tensors, pick
from .checkpoints import under_names
from .heads import ClassHead

Named = Callable[[Mapping[str, Any], object], Mapping[str, str]]
COEFFICIENTS = "coefficients"
UNIT = 1e-6  # the error of unit rows in float32: at most 2.0e-7 for 2000 x 4096
ABOUT = "hatcl.atlas"  # one entry of metadata: safetensors writes several in any order


def read_vector(
    path: Path, base: Mapping[str, Tensor] | None, *, without: Sequence[str] = (), named: Named | None = None
) -> TaskVector:
    """A task vector from the path of a saved one, a fine-tuned checkpoint, or the folder of a LoRA adapter. It is read
    on demand.

    Args:
        base: the pretrained parameters; None for saved vectors only.
        without: modules to leave out, such as classifiers (which may then differ in size). named: the names of a
            checkpoint's tensors -> the base's names; other tensors are left out.

    Raises:
        ConfigError: a checkpoint has no base. IntegrityError: the file is missing or damaged. VectorError: tensors,
            which the text names, do not fit the base.
    """
    starts = tuple(f"{w}." for w in without)
    ours = None if base is None else pick(base, [n for n in base if not n.startswith(starts)])
    adapter = is_adapter(path)
    saved = not adapter and VECTOR_FORMAT in read_metadata(path)
    if ours is None and not saved:
        raise ConfigError(f"{path} is not a task vector saved by hatcl; give the base it was fine-tuned from (--base)")
    try:
        if saved or adapter:
            vector = TaskVector.load(path) if saved else TaskVector.between(ours, path)
            vector = _under_names(
                vector, {n: n for n in vector.kinds} if named is None or adapter else named(vector, path), starts
            )
            if ours is not None:
                _check_fits(vector, ours)
            return vector
        theirs = parameters_of(named_tensors(path))
        if named is not None:
            theirs = under_names(theirs, named(theirs, path))
        return TaskVector.between(ours, pick(theirs, [n for n in theirs if not n.startswith(starts)]))
    except VectorError as error:
        raise VectorError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from error


def _under_names(vector: TaskVector, names: Mapping[str, str], starts: tuple[str, ...]) -> TaskVector:
    """The vector with the tensors in `names`, under the names that these have there, without those that start so."""
    old = {new: n for n, new in names.items() if not new.startswith(starts)}
    base = None if vector.base is None else {new: vector.base[n] for new, n in old.items()}

    def read(name: str) -> Delta:
        return vector.delta(old[name])

    return TaskVector(Lazy({new: vector.kinds[n] for new, n in old.items()}, read), base, partial=vector.partial)


def _check_fits(vector: TaskVector, base: Mapping[str, Tensor]) -> None:
    kinds = kinds_of(base)
    wrong = [
        f"{n} is {list(k.shape)}, the base has {list(kinds[n].shape) if n in kinds else 'no such tensor'}"
        for n, k in vector.kinds.items()
        if n.rpartition(".")[2] not in RUNNING and (n not in kinds or kinds[n].shape != k.shape)
    ]
    if wrong:
        raise VectorError(f"{len(wrong)} tensors do not fit: {'; '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}")


# ---- heads -------------------------------------------------------------------------------------------------------


def write_heads(path: Path, heads: Mapping[str, ClassHead]) -> None:
    """Heads by the names of their tasks: `NAME.weight`, and `NAME.bias` or `NAME.scale` where they have one."""
    tensors: dict[str, Tensor] = {}
    for name, head in heads.items():
        tensors |= {f"{name}.{n}": t.cpu().contiguous() for n, t in head.state_dict().items()}
        if head.scale is not None:
            tensors[f"{name}.scale"] = torch.tensor(head.scale, dtype=torch.float64)
    write_files({path: save(tensors)})


def read_head(path: Path, name: str) -> ClassHead:
    """The head of a task in a file of `write_heads`; tensors without a task's name serve every task.

    Raises:
        ConfigError: the task has no weight, or it is not `[classes, d]`. IntegrityError: the file is missing or
            damaged.
    """
    tensors = named_tensors(path)
    at = f"{name}." if f"{name}.weight" in tensors else ""
    if f"{at}weight" not in tensors:
        raise ConfigError(f"{path}: holds {', '.join(sorted(tensors)[:6])}; expected {name}.weight, or weight")
    parts = {n: tensors[at + n] for n in ("weight", "bias", "scale") if at + n in tensors}
    weight, bias = parts["weight"], parts.get("bias")
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise ConfigError(
            f"{path}: {at}weight is {list(weight.shape)}{f' and bias {list(bias.shape)}' if bias is not None else ''}, "
            "expected [classes, d] and [classes]"
        )
    head = ClassHead(weight, bias, float(parts["scale"]) if "scale" in parts else None)
    if bool(((weight.double().norm(dim=1) - 1).abs() < UNIT).all()):  # scaling them to length 1 again would lose a bit
        head.load_state_dict({"weight": weight}, strict=False)
    return head


# ---- coefficients ------------------------------------------------------------------------------------------------


def write_coefficients(folder: Path, composer: Composer, vectors: Sequence[str]) -> None:
    """`coefficients.safetensors` (lambda, `[T, G]`) and `coefficients.csv` (vector, block, value)."""
    lam = composer.coefficients.detach().cpu()
    about = json.dumps({"grain": composer.grain.name, "vectors": list(vectors)})
    content = save({COEFFICIENTS: lam.contiguous()}, {ABOUT: about})
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["vector", "block", "value"])
    groups = group_names(composer)
    for name, row in zip(vectors, lam.tolist(), strict=True):
        table.writerows((name, group, repr(value)) for group, value in zip(groups, row, strict=True))
    path = folder / f"{COEFFICIENTS}.safetensors"
    write_files({path.with_suffix(".csv"): text.getvalue().encode(), path: content})


def group_names(composer: Composer) -> list[str]:
    """The name of each group; if the grain has no names, it is derived from the group's first block: `fc.weight[3]`."""
    if composer.labels:
        return list(composer.labels)
    names = [f"group {g}" for g in range(composer.grain.size)]
    for block in reversed(composer.blocks):
        for k, g in enumerate(block.groups.tolist()):
            names[g] = f"{block.name}[{k}]"
    return names


def per_block(composer: Composer) -> Tensor:
    """The mean coefficient of each block and vector, `[T, J]`."""
    lam = composer.coefficients.detach().cpu()
    return torch.stack([lam[:, b.groups.cpu()].mean(1) for b in composer.blocks], 1)
