"""The linearised composition: a first-order Taylor expansion around theta0 instead of the model."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..calls import tensor_of
from ..errors import ConfigError
from ..map.grains import Grain
from ..vectors.block import Block
from ..vectors.compose import Composer

FUSED = ("flash_attention", "flex_attention")  # kernels of transformers without a forward-mode derivative


class Linearised(nn.Module):
    """`f_lin(x) = f(x; theta0) + J(x) sum_i lambda_ij tau_ij`, J the Jacobian at theta0 (Ortiz-Jimenez et al. 2023,
    arXiv 2305.12827; aTLAS over linearised vectors: Zhang et al. 2024).

    The Jacobian is never built: one forward pass in forward mode gives both terms (`torch.func.jvp`). It shares the
    composer's coefficients and can replace it in every procedure. It has no merged weights.

    Fused attention kernels have no forward-mode derivative. `F.scaled_dot_product_attention` is switched to its plain
    kernel and PyTorch's fused transformer layer is switched off while it runs; others are refused.

    Args:
        composer: its model, vectors and coefficients are used. Running statistics stay as they are.

    Raises:
        ConfigError: a transformers model is set to its own fused attention.
    """

    def __init__(self, composer: Composer) -> None:
        super().__init__()
        for module in composer.model.modules():
            kind = getattr(getattr(module, "config", None), "_attn_implementation", None)
            if isinstance(kind, str) and kind.startswith(FUSED):
                raise ConfigError(
                    f"linearised: the model's attention is {kind}, which has no forward-mode derivative; load it with "
                    "attn_implementation='sdpa' or 'eager'"
                )
        self.composer = composer

    @property
    def coefficients(self) -> nn.Parameter:
        """lambda, `[T, G]`: the composer's own."""
        return self.composer.coefficients

    @property
    def grain(self) -> Grain:
        """The composer's."""
        return self.composer.grain

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        composer = self.composer
        composer._put_back()
        parts = composer._parts(self.coefficients)
        tangents = {b.name: _Tangent.apply(part, b) for b, part in zip(composer.blocks, parts, strict=True)}
        theta0 = {b.name: b.theta0 for b in composer.blocks}

        def f(params: Mapping[str, Tensor]) -> Tensor:
            return tensor_of(torch.func.functional_call(composer.model, dict(params), args, kwargs))

        with plain_attention():
            try:
                at_theta0, change = torch.func.jvp(f, (theta0,), (tangents,))  # type: ignore[misc]
            except (NotImplementedError, RuntimeError) as error:
                if not re.search("forward AD|forward[- ]mode|functorch", str(error)):
                    raise
                raise ConfigError(
                    f"linearised: an operation of the model has no forward-mode derivative "
                    f"({str(error).splitlines()[0]}); use its plain PyTorch form, or the composer itself"
                ) from error
        out: Tensor = at_theta0 + change
        return out

    def extra_repr(self) -> str:
        return self.composer.extra_repr()


Composed = Composer | Linearised


def linearised(composer: Composer) -> Linearised:
    """See `Linearised`."""
    return Linearised(composer)


class _Tangent(torch.autograd.Function):
    """`sum_i lambda_i tau_i` of one block. The derivative needs only the vectors, as in `Composer`."""

    @staticmethod
    def forward(ctx: Any, lam: Tensor, block: Block) -> Tensor:
        ctx.block = block
        out = torch.zeros_like(block.theta0)
        for c, d in zip(block.coefficients(lam), block.deltas, strict=True):
            out.add_((c.to(out.dtype) * d.value.to(out.dtype)).view_as(out))  # a number's coefficient is `[1]`
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.block.products(grad), None


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as matrix products, which can be differentiated in forward mode."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
