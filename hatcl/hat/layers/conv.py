"""Convolutions: `y = a * (W conv x + b)`, the gate folded into the output channels of W and b, or into the batch norm
that directly follows (which would cancel it otherwise). Shapes: x `[B, in, ...]`, y `[B, out, ...]`, gate `[out]`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, is_grad_enabled, nn

from ...errors import ConfigError
from ..registry import register_layer
from .gated import HATLayer, multiply, task_parameter


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
        if len(args) == 1 and not kwargs and (gated := self._hat_by_output(args[0])) is not None:
            return gated
        return self._hat_gate_output(super().forward(*args, **kwargs))  # type: ignore[misc]

    def _hat_by_output(self, x: Tensor) -> Tensor | None:
        """While gates are soft: `a * (W conv x + b)`, if gating the output is cheaper than gating the weight."""
        if type(self) not in (HATConv1d, HATConv2d, HATConv3d) or not is_grad_enabled():
            return None
        raw, owner = self._parameters.get("weight"), self._hat_gate_of_rows("weight")  # type: ignore[attr-defined]
        if owner is None or x.dim() != raw.dim() or x.numel() == 0:
            return None
        places = x.numel() // (x.shape[1] * math.prod(self.stride))  # type: ignore[attr-defined]
        if places >= raw[0].numel():
            return None
        bias = self._parameters["bias"]  # type: ignore[attr-defined]
        return multiply(self._conv_forward(x, raw, bias), owner, 1)  # type: ignore[attr-defined]

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
