"""Train around grafts: their elements stay bit-identical while everything else learns."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraftError
from ..keeper import Keeper, Kept, check_optimizers
from ..vectors.tensors import tied_names
from .checks import found_in
from .graft import Graft


@contextlib.contextmanager
def hold(model: nn.Module, grafts: Graft | Sequence[Graft], optimizer: Any) -> Iterator[None]:
    """Keep the elements of some grafts bit-identical to what they are now, whatever optimizer trains the model:

        graft.apply_(model)
        with hatcl.hold(model, graft, optimizer):
            ...                                    # loss.backward(); optimizer.step()

    Their gradient is zeroed as it arrives, so that clipping sees the norm of the trained elements, and they are
    restored after every step (see `hatcl.keeper.Keeper`). Momentum that an optimizer already has for them is zeroed.
    When the block ends normally, the elements are compared with their former values.

    Args:
        grafts: with or without values; the elements keep the values that the model has now.
        optimizer: one or several that will step inside the block.

    Raises:
        GraftError: grafts do not fit the model, or hold elements of buffers. GuardError: an optimizer cannot be
            guarded, or belongs to another model.

    Warns:
        UserWarning: at the end, if something other than an optimizer wrote to the elements; they are restored.
    """
    given = [grafts] if isinstance(grafts, Graft) else list(grafts)
    optimizers = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    held = _held(model, given)
    check_optimizers(model, optimizers, "build it over the parameters of the model to hold")
    frozen = [
        Kept(p, None if len(at) == p.numel() else at, name) for name, (params, at) in held.items() for p in params
    ]
    keeper = Keeper(frozen, optimizers)
    with keeper:
        yield
    if keeper.written:
        warnings.warn(
            f"{keeper.written[0]}: something other than an optimizer's step wrote to held elements "
            f"({len(keeper.written)} such tensors); they are restored. Write to the model outside of hatcl.hold",
            stacklevel=3,
        )


def _held(model: nn.Module, grafts: Sequence[Graft]) -> dict[str, tuple[list[nn.Parameter], Tensor]]:
    """Name -> the parameters that are this tensor (several where they share memory), and flat indices next to it."""
    if not isinstance(model, nn.Module):
        raise GraftError(f"hold: got {type(model).__name__}, expected a module")
    tied = tied_names(model)
    params: dict[str, dict[int, nn.Parameter]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        params.setdefault(tied[name], {})[id(p)] = p
    parts: dict[str, list[Tensor]] = {}
    for graft in grafts:
        found = found_in(model, graft.shapes, "the model")
        for name, at in graft.indices.items():
            if found[name] not in params:
                raise GraftError(
                    f"{name} is a buffer, which forward passes write to, not optimizers; make the graft from "
                    "parameters only to hold it"
                )
            parts.setdefault(found[name], []).append(at)
    out = {}
    for name, ats in parts.items():
        every = list(params[name].values())
        out[name] = (every, torch.unique(torch.cat(ats)).to(every[0].device, torch.long))
    return out
