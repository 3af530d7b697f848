"""A model's tensors, as a run keeps them: tied ones once, and nothing that the model makes by itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..vectors.tensors import check_fit, named_tensors


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and the buffers that are saved, of tied ones the first."""
    saved = model.state_dict()
    return {n: t for n, t in named_tensors(model).items() if n in saved}


@torch.no_grad()
def load_state(model: nn.Module, stored: Mapping[str, Tensor], what: str, lacking: tuple[str, ...] = ()) -> None:
    """Give a model these tensors, after all of them have been found to fit.

    Args:
        what: how an error calls them. lacking: ends of names that may be missing.

    Raises:
        VectorError: names or shapes that differ. IntegrityError: a damaged file.
    """
    ours = state_of(model)
    ours = {n: t for n, t in ours.items() if n in stored or not n.endswith(lacking or ("\0",))}
    check_fit(ours, stored, (type(model).__name__, what), "Give those of the same model")
    for name, t in ours.items():
        t.copy_(stored[name])
