"""Match the tensors of two checkpoints, even if different programs saved them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ..config import one_of
from ..errors import VectorError
from .bases import known_as
from .parameters import parameters_of, quantised_in, refuse_all_of
from .select import Patterns, chosen_names
from .tensors import Kind, Lazy, TensorSource, buffers_of, check_fit, kinds_of, named_tensors, pick, tied_names

EMBEDDINGS = ("equal", "common")
OURS, THEIRS = "the pretrained model", "the fine-tuned one"
FIT = (
    "Do they have the same architecture and vocabulary? Leave out tensors that only one of them has with skip=, "
    "such as skip='*.inv_freq', or choose the tensors to compare with only="
)

EXPERTS = (
    "One of them holds its experts one by one, the other in one tensor (transformers 5 does so in memory, and not in "
    "files); pass both as folders, or both as models"
)
BY_ONES = re.compile(r"\.experts\.\d+\.")


def paired(
    pretrained: TensorSource,
    finetuned: TensorSource,
    *,
    buffers: bool = False,
    only: Patterns = (),
    skip: Patterns = (),
    embeddings: str = "equal",
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The floating-point parameters of two models, under the pretrained model's names.

    Tied tensors appear once, under the first name in either model. If the two have no name in common but one side's
    names only have an additional prefix (`transformer.h.0` and `h.0`), they are matched without it. A tensor that only
    one side stored and that is an equal copy of another there (a tied head that was written out) counts as that other.

    Args:
        pretrained, finetuned: modules, state dicts, safetensors files, or folders of them.
        buffers: also the running statistics of norms.
        only, skip: patterns of names (`chosen_names`). A tied tensor matches by any of its names.
        embeddings: `common`: for tables with different numbers of rows (a vocabulary that grew, and its head) compare
            the rows that both have; the pretrained model's other rows count as unchanged.

    Raises:
        VectorError: names or shapes differ, there are no parameters, or weights are quantised. ConfigError: patterns
            match nothing or leave nothing.
    """
    one_of("embeddings", embeddings, EMBEDDINGS)
    tied = {**tied_names(finetuned), **tied_names(pretrained)}
    running = set() if buffers else buffers_of(pretrained) | buffers_of(finetuned)  # files do not distinguish them
    choose = bool(only or skip)
    ours, theirs = (
        known_as(parameters_of(side, buffers, what=what, check=not choose), tied, running)
        for side, what in ((pretrained, OURS), (finetuned, THEIRS))
    )
    if not ours:
        raise VectorError(f"{OURS} has no floating-point parameters, only integers or none at all")
    theirs = _under_one_prefix(ours, theirs)
    if choose:
        quantised = {what: quantised_in(side) for side, what in ((pretrained, OURS), (finetuned, THEIRS))}
        others = (*_complex_names(pretrained), *(n for found in quantised.values() for n in found))
        names = {n: [n] for n in (*ours, *theirs, *others)}
        for alias, first in tied.items():
            if first in names and alias != first:
                names[first].append(alias)
        kept = set(chosen_names(names, only, skip))
        ours, theirs = (pick(side, [n for n in side if n in kept]) for side in (ours, theirs))
        for what, found in quantised.items():
            refuse_all_of({n: why for n, why in found.items() if n in kept}, what)
    _refuse_complex(pretrained, finetuned, kept if choose else None)
    ours, theirs = _without_copies(ours, theirs)
    sizes = _grown(kinds_of(ours), kinds_of(theirs))
    if sizes is not None and embeddings == "common":
        theirs = _common_rows(ours, theirs)
    elif sizes is not None:
        raise VectorError(f"{_shapes(ours, theirs)}: {grew(*sizes)}")
    by_ones = [any(BY_ONES.search(n) for n in side) for side in (ours, theirs)]
    stacked = [any(".experts." in n and not BY_ONES.search(n) for n in side) for side in (ours, theirs)]
    other_way = by_ones[0] != by_ones[1] and stacked[0] != stacked[1]
    check_fit(ours, theirs, (OURS, THEIRS), EXPERTS if other_way else FIT)
    return ours, theirs


def _complex_names(source: TensorSource) -> list[str]:
    names = [n for n, k in kinds_of(named_tensors(source)).items() if k.dtype.is_complex]
    return [n for n in names if n not in buffers_of(source)] if names else []


def _refuse_complex(pretrained: TensorSource, finetuned: TensorSource, kept: set[str] | None) -> None:
    """Raise if complex numbers changed: a real vector would silently leave them out."""
    a, b = named_tensors(pretrained), named_tensors(finetuned)
    for name in _complex_names(pretrained):
        if (kept is None or name in kept) and name in b and not torch.equal(a[name], b[name]):
            raise VectorError(
                f"{name} is {str(a[name].dtype).removeprefix('torch.')} and differs; a task vector holds real numbers: "
                f"store it by torch.view_as_real in both models, or leave it out by skip={name!r}"
            )


def grew(ours: int, theirs: int) -> str:
    """The remedy for a vocabulary of another size."""
    return (
        f"the vocabulary has {ours} entries in {OURS} and {theirs} in {THEIRS}; resize the pretrained model first "
        f"(model.resize_token_embeddings({theirs})), or compare the rows that both have by embeddings='common'"
    )


def renamed(side: Mapping[str, Tensor], stored: Mapping[str, str]) -> Mapping[str, Tensor]:
    """Tensors under other names.

    Args:
        stored: new name -> the name in `side`.
    """
    kinds = kinds_of(side)
    return _made(side, {n: kinds[s] for n, s in stored.items()}, lambda n: side[stored[n]])


def _made(like: Mapping[str, Tensor], kinds: Mapping[str, Kind], make: Callable[[str], Tensor]) -> Mapping[str, Tensor]:
    """Tensors made at once, or on demand if a side is read from files."""
    return Lazy(kinds, make) if isinstance(like, Lazy) else {n: make(n) for n in kinds}


def _under_one_prefix(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Theirs under our names, if the two have none in common and most would fit with a prefix before one side's."""
    if any(n in ours for n in theirs):
        return theirs
    after, before = _prefix(ours, theirs), _prefix(theirs, ours)  # what we have in front of theirs, and they of ours
    named = {(after + n if after else n.removeprefix(before)): n for n in theirs}
    a, b = kinds_of(ours), kinds_of(theirs)
    fit = [n for n, stored in named.items() if n in a and a[n].shape == b[stored].shape]
    if 2 * len(fit) < min(len(a), len(b)):
        return theirs
    return renamed(theirs, {(n if n in a else stored): stored for n, stored in named.items()})


def _prefix(longer: Iterable[str], shorter: Iterable[str]) -> str:
    """The prefix that most names of one have before a name of the other; empty if there is none."""
    ends = set(shorter)
    found: Counter[str] = Counter()
    for name in longer:
        parts = name.split(".")
        starts = [i for i in range(1, len(parts)) if ".".join(parts[i:]) in ends]
        if starts:
            found[".".join(parts[: starts[0]]) + "."] += 1
    return found.most_common(1)[0][0] if found else ""


def _without_copies(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    both = [n for n in ours if n in theirs]
    dropped = [n for n in theirs if n not in ours and _copied(n, theirs, both) is not None]
    if dropped:
        theirs = pick(theirs, [n for n in theirs if n not in dropped])
    filled = {n: first for n in ours if n not in theirs and (first := _copied(n, ours, both)) is not None}
    if filled:
        theirs = renamed(theirs, {**{n: n for n in theirs}, **filled})
    return ours, theirs


def _copied(name: str, side: Mapping[str, Tensor], among: Iterable[str]) -> str | None:
    """The tensor that this one is an equal copy of."""
    kinds = kinds_of(side)
    if len(kinds[name].shape) < 2:
        return None
    return next((n for n in among if kinds[n] == kinds[name] and torch.equal(side[n], side[name])), None)


def _grown(ours: Mapping[str, Kind], theirs: Mapping[str, Kind]) -> tuple[int, int] | None:
    """The two numbers of rows, if all tensors with different shapes differ only in these, and one of them is a table.
    (A tensor with a bias belongs to a layer, such as a head with other classes.)"""
    sizes = set()
    for name, kind in ours.items():
        if name in theirs and theirs[name].shape != kind.shape:
            a, b = kind.shape, theirs[name].shape
            if len(a) not in (1, 2) or a[1:] != b[1:] or not a:
                return None
            sizes.add((a[0], b[0]))
    tables = any(
        name in theirs and k.shape != theirs[name].shape and len(k.shape) == 2
        and f"{name.removesuffix('.weight')}.bias" not in ours
        for name, k in ours.items()
    )  # fmt: skip
    return sizes.pop() if len(sizes) == 1 and tables else None


def _shapes(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str:
    a, b = kinds_of(ours), kinds_of(theirs)
    name = next(n for n in a if n in b and a[n].shape != b[n].shape)
    return f"{name} is {list(a[name].shape)} in {OURS}, {list(b[name].shape)} in {THEIRS}"


def _common_rows(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    a, b = kinds_of(ours), kinds_of(theirs)
    kinds = {n: Kind(a[n].shape if n in a else k.shape, k.dtype) for n, k in b.items()}
    lazy = ours if isinstance(ours, Lazy) else theirs
    return _made(lazy, kinds, lambda n: theirs[n] if kinds[n] == b[n] else with_rows_of(ours[n], theirs[n]))


def with_rows_of(base: Tensor, table: Tensor) -> Tensor:
    """A table with as many rows as the base's: the common rows, then the base's own."""
    rows = min(len(base), len(table))
    kind = torch.promote_types(base.dtype, table.dtype)
    return torch.cat([table[:rows].to(base.device, kind), base[rows:].to(kind)])
