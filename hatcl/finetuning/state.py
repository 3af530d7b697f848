"""A model's tensors in the form that a run keeps: tied ones once, without tensors that the model recomputes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..vectors.tensors import check_fit, named_tensors


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers; of tied ones only the first."""
    saved = model.state_dict()
    return {n: t for n, t in named_tensors(model).items() if n in saved}


@torch.no_grad()
def load_state(model: nn.Module, stored: Mapping[str, Tensor], what: str, lacking: tuple[str, ...] = ()) -> None:
    """Load these tensors into a model, after checking that all of them fit.

    Args:
        what: the error's name for them. lacking: ends of names that may be missing.

    Raises:
        VectorError: names or shapes differ. IntegrityError: the file is damaged.
    """
    ours = state_of(model)
    ours = {n: t for n, t in ours.items() if n in stored or not n.endswith(lacking or ("\0",))}
    check_fit(ours, stored, (type(model).__name__, what), "Give those of the same model")
    for name, t in ours.items():
        t.copy_(stored[name])
