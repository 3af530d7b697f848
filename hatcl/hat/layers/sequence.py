"""Recurrent and transformer layers of torch: they keep copies of their weights, or bypass their own submodules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..registry import register_layer
from .gated import HATLayer


@register_layer(nn.RNNBase)
class _Recurrent(HATLayer):
    """A recurrent layer. torch keeps its weights also in a list; here the list holds the active task's weights."""

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
        """Flatten only the plain model's weights; a task's weights are not contiguous in memory."""
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
    """A transformer encoder. Only the fused layer needs nested tensors, so a task does not use them (see
    `_EncoderLayer`)."""

    hat_always: ClassVar[bool] = True
    use_nested_tensor = _plain_only("use_nested_tensor", False)


@register_layer(nn.TransformerEncoderLayer)
class _EncoderLayer(HATLayer):
    """A transformer encoder layer. In evaluation with relu or gelu, torch runs the whole layer as one fused operation,
    whose norms would take their statistics over all units. Under a task the attribute therefore says neither."""

    hat_always: ClassVar[bool] = True
    activation_relu_or_gelu = _plain_only("activation_relu_or_gelu", 0)
