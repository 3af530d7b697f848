"""Recurrent and transformer layers of torch: they keep copies of their weights, or pass over their own submodules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..registry import register_layer
from .gated import HATLayer


@register_layer(nn.RNNBase)
class _Recurrent(HATLayer):
    """torch keeps a recurrent layer's weights in a list in addition to its parameters; here the list holds the active
    task's weights."""

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]  # type: ignore[attr-defined]

    @_flat_weights.setter
    def _flat_weights(self, value: Any) -> None:
        pass

    @classmethod
    def hat_sizes(cls, shapes: Mapping[str, Sequence[int]], groups: int) -> dict[str, int]:
        return {"input_size": shapes["weight_ih_l0"][1], "hidden_size": shapes["weight_hh_l0"][1]}

    def _weights_have_changed(self) -> bool:
        return False

    def flatten_parameters(self) -> None:
        """Only the plain model's weights lie in one piece of memory."""
        if self._hat_active is None:
            super().flatten_parameters()  # type: ignore[misc]


def _plain_only(name: str, otherwise: Any) -> property:
    """An attribute that reads as `otherwise` while a task is active."""

    def get(self: Any) -> Any:
        return self.__dict__[name] if self._hat_active is None else otherwise

    def put(self: Any, value: Any) -> None:
        self.__dict__[name] = value

    return property(get, put)


@register_layer(nn.TransformerEncoder)
class _Encoder(HATLayer):
    """Nested tensors are for the fused layer alone (see `_EncoderLayer`)."""

    hat_always: ClassVar[bool] = True
    use_nested_tensor = _plain_only("use_nested_tensor", False)


@register_layer(nn.TransformerEncoderLayer)
class _EncoderLayer(HATLayer):
    """In evaluation torch runs the whole layer as one fused operation, whose norms would take their statistics over all
    units. It does so for these two activations only, so a task has neither."""

    hat_always: ClassVar[bool] = True
    activation_relu_or_gelu = _plain_only("activation_relu_or_gelu", 0)
