"""Convolutions: `y = a * (W conv x + b)`, the gate folded into the output channels of W and b, or into the batch norm
that directly follows (which would cancel it otherwise). Shapes: x `[B, in, ...]`, y `[B, out, ...]`, gate `[out]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ...errors import ConfigError
from ..registry import register_layer
from .gated import HATLayer, task_parameter


class _Conv(HATLayer):
    hat_owner_dims: ClassVar[Mapping[str, int]] = {"weight": 0, "bias": 0}
    hat_reader_dims: ClassVar[Mapping[str, int]] = {"weight": 1}
    hat_direct: ClassVar[bool] = True
    weight = task_parameter("weight")
    bias = task_parameter("bias")

    @classmethod
    def hat_sizes(cls, shapes: Mapping[str, Sequence[int]], groups: int) -> dict[str, int]:
        out, read = shapes["weight"][:2]
        return {"out_channels": out, "in_channels": read * groups, "groups": groups}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._hat_gate_output(super().forward(*args, **kwargs))  # type: ignore[misc]

    def _hat_bind_by_hand(self, num_tasks: Any, units: Any, reads: Any, config: Any) -> None:
        if (groups := getattr(self, "groups", 1)) > 1 and reads is not None:
            raise ConfigError(
                f"{type(self).__name__} with groups={groups}: reads= is for groups=1; leave it out "
                "(frozen by output unit alone) or use hatcl.convert, which maps groups exactly"
            )
        super()._hat_bind_by_hand(num_tasks, units, reads, config)


class _ConvTranspose(_Conv):
    hat_owner_dims: ClassVar[Mapping[str, int]] = {"weight": 1, "bias": 0}
    hat_reader_dims: ClassVar[Mapping[str, int]] = {"weight": 0}

    @classmethod
    def hat_sizes(cls, shapes: Mapping[str, Sequence[int]], groups: int) -> dict[str, int]:
        read, out = shapes["weight"][:2]
        return {"out_channels": out * groups, "in_channels": read, "groups": groups}

    def _hat_bind_by_hand(self, *args: Any) -> None:
        if (groups := getattr(self, "groups", 1)) > 1:
            raise ConfigError(f"{type(self).__name__} with groups={groups} by hand is not known; use hatcl.convert")
        super()._hat_bind_by_hand(*args)


@register_layer(nn.Conv1d)
class HATConv1d(_Conv, nn.Conv1d):
    """1-d convolution with gated output channels."""


@register_layer(nn.Conv2d)
class HATConv2d(_Conv, nn.Conv2d):
    """2-d convolution with gated output channels."""


@register_layer(nn.Conv3d)
class HATConv3d(_Conv, nn.Conv3d):
    """3-d convolution with gated output channels."""


@register_layer(nn.ConvTranspose1d)
class HATConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """1-d transposed convolution with gated output channels."""


@register_layer(nn.ConvTranspose2d)
class HATConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """2-d transposed convolution with gated output channels."""


@register_layer(nn.ConvTranspose3d)
class HATConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """3-d transposed convolution with gated output channels."""
