"""Operations along dimensions: reductions, softmax and similar ones, pooling. Over different units they lose track of
the units."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..coupling import Coupling
from ..shadow import Shadow, Slot, reshape, varying
from .registry import Call, Moved, disown, rule

LINEAR = {"mean", "sum", "amax", "amin", "linalg_vector_norm", "norm"}  # their result scales with their input
DIM_BY_PLACE = {"max", "min", "argmax", "argmin", "any", "all", "prod", "median"}
NOT_ZERO = {"logsumexp", "argmax", "argmin", "all"}  # for an input of zeros


@rule(
    "mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm",
    "logsumexp", "prod", "argmax", "argmin", "any", "all", "median",
)  # fmt: skip
def reduce(call: Call, coupling: Coupling) -> Shadow:
    """A unit is kept if the reduction runs within it. Branches that are added share their channels, and each channel is
    one unit."""
    s = call.shadows[0]
    if s is None:
        return Shadow()
    dims = _dims(call)
    target = next(x for x in call.outs if isinstance(x, Tensor)).shape
    slots = []
    for slot in s.slots:
        ids = slot.ids
        if _meets(ids, dims):
            ids = coupling.canonical(ids)
        if call.name == "sum" and not s.of_parameters and set(varying(ids)) - set(dims):
            ids = coupling.couple_along(ids, dims)
        if _meets(ids, dims):
            if s.of_parameters:
                coupling.drop(slot)
            else:
                coupling.mixes(call.name, ids)
            continue
        for d in dims:
            ids = ids.narrow(d, 0, 1)
        folds = slot.folds if call.name in LINEAR else None
        slots.append(Slot(reshape(ids, target), slot.clean and call.name not in NOT_ZERO, folds))
    return Shadow(tuple(slots), s.sources)


def _meets(ids: Tensor, dims: list[int]) -> bool:
    """Do labels differ along one of these dimensions?"""
    return any(d in varying(ids) for d in dims)


def _dims(call: Call) -> list[int]:
    """The dimensions over which a reduction runs."""
    count = call.args[0].dim()
    dims = next((a for a in call.args[1:] if isinstance(a, (list, tuple))), None)
    if dims is None:
        dims = call.kwargs.get("dim")
    if dims is None and len(call.args) > 1 and isinstance(call.args[1], int) and call.name in DIM_BY_PLACE:
        dims = [call.args[1]]
    if isinstance(dims, int):
        dims = [dims]
    return [d % max(count, 1) for d in dims] if dims else list(range(count))


@rule(
    "_softmax", "_log_softmax", "cumsum", "cumprod", "sort", "logcumsumexp", "_safe_softmax", "softmax", "log_softmax"
)
def softmax(call: Call, coupling: Coupling) -> Moved:
    """Softmax and similar operations keep positions, but zeros do not stay zero."""
    s = call.shadows[0]
    if s is None:
        return None
    if s.of_parameters:
        return disown(s, coupling)
    dim = call.args[1] if len(call.args) > 1 and isinstance(call.args[1], int) else -1
    dim %= max(call.outs[0].dim(), 1)
    slots = []
    for slot in s.slots:
        ids = slot.ids
        if dim in varying(ids) and "softmax" not in call.name:
            coupling.note(f"{call.name} over differing units forgets them")
            continue
        if set(varying(ids)) == {dim}:
            coupling.note(f"{call.name} over units, in which off ones would take part: they are always on")
            coupling.mark("whole", ids)
        elif dim in varying(ids):
            ids = coupling.couple_along(ids, [dim])
        slots.append(replace(slot, ids=ids, clean=call.name == "cumsum" and slot.clean))
    return Shadow(tuple(slots))


@rule("avg_pool1d", "max_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d", "upsample_linear1d")
def pool1d(call: Call, coupling: Coupling) -> Moved:
    """Pooling and interpolation of sequences."""
    return within_channels(call, coupling, dims=1)


@rule(
    "avg_pool2d", "max_pool2d", "max_pool2d_with_indices", "_adaptive_avg_pool2d", "adaptive_max_pool2d",
    "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d", "_upsample_bicubic2d_aa",
)  # fmt: skip
def pool2d(call: Call, coupling: Coupling) -> Moved:
    """Pooling and interpolation of images."""
    return within_channels(call, coupling, dims=2)


@rule("avg_pool3d", "max_pool3d_with_indices", "_adaptive_avg_pool3d", "adaptive_max_pool3d", "upsample_trilinear3d")
def pool3d(call: Call, coupling: Coupling) -> Moved:
    """Pooling and interpolation of volumes."""
    return within_channels(call, coupling, dims=3)


def within_channels(call: Call, coupling: Coupling, dims: int) -> Shadow | None:
    """The result over a channel's positions (the last `dims` dimensions) belongs to the channel, and is zero if they
    are. Positions that belong to different units lose them."""
    s = call.shadows[0]
    if s is None:
        return None
    slots = []
    for slot in s.slots:
        ids = slot.ids
        positions = range(ids.dim() - dims, ids.dim())
        if any(d in positions for d in varying(ids)):
            coupling.note("pooling over positions that belong to different units forgets them")
            continue
        for d in positions:
            ids = ids.narrow(d, 0, 1)
        slots.append(replace(slot, ids=ids.expand(call.outs[0].shape), folds=None))
    return Shadow(tuple(slots), s.sources)
