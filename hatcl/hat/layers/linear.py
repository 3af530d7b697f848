"""Linear layers, embeddings and free parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.nn import functional as tf

from ...functional import is_followed
from ..binding import Binding
from ..registry import register_layer
from .gated import HATLayer, multiply, task_parameter

TABLE, LOOKED_UP = "weight, gated", "rows looked up"


@register_layer(nn.Linear)
class HATLinear(HATLayer, nn.Linear):
    """`y = a * (W x + b)` with the gate a folded into the rows of W and b.

    Shapes: x `[..., in]`, y `[..., out]`, gate `[out]`.
    """

    hat_owner_dims: ClassVar[Mapping[str, int]] = {"weight": 0, "bias": 0}
    hat_reader_dims: ClassVar[Mapping[str, int]] = {"weight": 1}
    hat_output_dim: ClassVar[int] = -1
    hat_direct: ClassVar[bool] = True
    weight = task_parameter("weight")
    bias = task_parameter("bias")

    @classmethod
    def hat_sizes(cls, shapes: Mapping[str, Sequence[int]], groups: int) -> dict[str, int]:
        out, read = shapes["weight"]
        return {"out_features": out, "in_features": read}

    def forward(self, x: Tensor) -> Tensor:
        if type(self) is HATLinear and is_grad_enabled() and (owner := self._hat_gate_of_rows("weight")) is not None:
            raw: Any = self._parameters["weight"]
            if x.numel() < raw.shape[1] ** 2:  # fewer rows than inputs
                return multiply(tf.linear(x, raw, self._parameters["bias"]), owner, -1)
        return self._hat_gate_output(super().forward(x))


class TaskIndexedLinear(HATLinear):
    """A head: every task has its own weight and bias. By hand: `TaskIndexedLinear(64, 10, num_tasks=5,
    reads=layer)`."""

    hat_owner_dims: ClassVar[Mapping[str, int]] = {}
    hat_copied: ClassVar[tuple[str, ...]] = ("weight", "bias")


class TaskIndexedParameter(HATLayer, nn.Module):
    """A free parameter with a copy per task; calling the module returns the active task's copy."""

    hat_copied: ClassVar[tuple[str, ...]] = ("weight",)
    weight = task_parameter("weight")

    def __init__(self, value: Tensor, num_tasks: int) -> None:
        nn.Module.__init__(self)
        self.register_parameter("weight", nn.Parameter(value))
        self._hat_bind_by_hand(num_tasks, None, None, None)

    def forward(self) -> Tensor:
        return self.weight


class _ScaledRows(torch.autograd.Function):
    """Scales rows as torch scales a table with `max_norm`. As in torch, the gradient ignores the scaling."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, max_norm: float, norm_type: float) -> Tensor:
        flat = rows.reshape(-1, rows.shape[-1]).clone()
        torch.embedding_renorm_(flat, torch.arange(len(flat), device=flat.device), max_norm, norm_type)
        return flat.view(rows.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


@register_layer(nn.Embedding)
class HATEmbedding(HATLayer, nn.Embedding):
    """`y = a * W[i]`: the gate multiplies the looked-up rows. In evaluation of a sealed task, the gate multiplies the
    whole table once, when the number of looked-up rows reaches the number of rows in the table.

    Shapes: i integers of any shape `S`, y `[*S, dim]`, gate `[dim]`.
    """

    hat_owner_dims: ClassVar[Mapping[str, int]] = {"weight": 1}
    hat_output_dim: ClassVar[int] = -1
    hat_fold_output: ClassVar[bool] = True
    weight = task_parameter("weight")

    @classmethod
    def hat_sizes(cls, shapes: Mapping[str, Sequence[int]], groups: int) -> dict[str, int]:
        rows, out = shapes["weight"]
        return {"num_embeddings": rows, "embedding_dim": out}

    def _hat_bind_by_hand(self, *args: Any) -> None:
        super()._hat_bind_by_hand(*args)
        plan = self._hat.params["weight"]
        self._hat.output, plan.fold = (-1, plan.axes[0].units), ()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.max_norm is None or self.__dict__.get("_hat") is None:
            plain: Any = super().forward
            if plain.__func__ is nn.Embedding.forward:
                index = args[0] if args else kwargs["input"]
                if (gated := self._hat_gated_table(index)) is not None:
                    return tf.embedding(index, gated)
            return self._hat_gate_output(plain(*args, **kwargs))
        index = args[0] if args else kwargs["input"]
        # torch would scale the table's rows in place, for all tasks; scale only the looked-up rows, over the units on
        table = self.weight
        rows = tf.embedding(index, table, self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse)
        if self._hat_active is None:
            scaled: Tensor = _ScaledRows.apply(rows, self.max_norm, self.norm_type)
            return scaled
        rows = self._hat_gate_output(rows)
        size = rows.detach().norm(self.norm_type, -1, keepdim=True)
        return rows * torch.where(size > self.max_norm, self.max_norm / (size + 1e-7), 1.0)

    def _hat_gated_table(self, index: Tensor) -> Tensor | None:
        """A sealed task's gated table; None as long as gating the looked-up rows is cheaper."""
        hat: Binding | None = self.__dict__.get("_hat")
        kept = None if hat is None or hat.output is None else hat.of_now()
        if hat is None or kept is None or is_followed():
            return None
        table = hat.seen(TABLE, kept)
        if table is None:
            kept[LOOKED_UP] = kept.get(LOOKED_UP, 0) + index.numel()
            params = self.__dict__["_parameters"]
            if kept[LOOKED_UP] < self.num_embeddings or "weight" not in params:
                return None
            with torch.inference_mode(False), torch.no_grad():  # torch does not count writes to an inference tensor
                table = hat.read("weight", params, kept, lambda: self._hat_gate_output(self.weight), TABLE)
        return table
