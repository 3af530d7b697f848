"""Adapts an optimizer to a network that grew: new parameters replace old ones in the groups and keep their moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import GuardError
from ...keeper import check_optimizers, same_direction, tensors_within, unwrapped
from .apply import Replaced

ANEW = "build it again over model.parameters() after hatcl.grow"


class Carrier:
    """Carries one optimizer over. It refuses state that cannot be carried before anything changes.

    Raises:
        GuardError: no optimizer, one of another model, or one with state that cannot be carried over.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        check_optimizers(model, [optimizer], ANEW)
        self.optimizer = unwrapped(optimizer)
        kind = type(self.optimizer).__name__
        self.weights: set[Any] = set()  # state keys that hold weights; their new elements are the parameter's
        beside: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        mine = {id(p) for p in model.parameters()}
        for p in (p for group in self.optimizer.param_groups for p in group["params"] if id(p) in mine):
            for key, x in self._state(p).items():
                if isinstance(x, Tensor) and x.shape == p.shape and p.dim():
                    beside.setdefault(key, []).append((p, x))
                elif isinstance(x, Tensor) and x.numel() > 1:
                    raise GuardError(
                        f"optimizer: {kind} keeps {key!r} of shape {list(x.shape)} for a parameter of shape "
                        f"{list(p.shape)}, which cannot be carried over to a larger one; {ANEW}"
                    )
        for name, value in vars(self.optimizer).items():
            held = isinstance(value, (list, tuple)) and any(True for _ in tensors_within(value))
            if held and name != "param_groups":
                raise GuardError(
                    f"optimizer: {kind} keeps tensors in {name!r}, outside its state, which cannot be carried over; "
                    f"{ANEW}"
                )
        self.weights = {key for key, pairs in beside.items() if same_direction(pairs)}

    def _state(self, p: Tensor) -> dict[Any, Any]:
        found = self.optimizer.state.get(p) if hasattr(self.optimizer, "state") else None
        return found if isinstance(found, dict) else {}

    def carry(self, replaced: Sequence[Replaced]) -> None:
        """Replace the old parameters by the new ones."""
        new_of = {id(r.old): r for r in replaced}
        for group in self.optimizer.param_groups:
            group["params"] = [new_of[id(p)].new if id(p) in new_of else p for p in group["params"]]
        for r in replaced:
            if state := self._state(r.old):
                del self.optimizer.state[r.old]
                self.optimizer.state[r.new] = {k: self._grown(k, x, r) for k, x in state.items()}

    def _grown(self, key: Any, x: Any, r: Replaced) -> Any:
        if not isinstance(x, Tensor) or x.shape != r.old.shape:
            return x
        made = r.new.detach().to(x.dtype).clone() if key in self.weights else torch.zeros_like(r.new, dtype=x.dtype)
        made.view(-1)[r.flat] = x.reshape(-1)
        return made
