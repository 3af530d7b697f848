"""Small models of several kinds and grafts over them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from hatcl.grafts import Graft

SIZE = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
GPT2 = {
    "vocab_size": 30,
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


class Turned(nn.Module):
    """Parameters that lie in memory in another order than their elements, and one of no dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3).t())
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.conv(x)


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def convolutional() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=3)  # with batch norms


def bert() -> Any:
    import transformers

    return transformers.BertModel(transformers.BertConfig(**SIZE, max_position_embeddings=8))


def tied() -> Any:
    import transformers

    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))


MODELS = {
    "linear": linear,
    "convolutional": convolutional,
    "bert": bert,
    "tied": tied,
    "turned": Turned,
    "float16": lambda: linear().half(),
    "bfloat16": lambda: bert().bfloat16(),
    "float64": lambda: linear().double(),
}


def pair(kind: str, seed: int = 0) -> tuple[Any, Any]:
    """A model, and the same after it was trained: every parameter moved, some to the other side of zero."""
    torch.manual_seed(seed)
    pre = MODELS[kind]().eval()
    ft = copy.deepcopy(pre)
    with torch.no_grad():
        for p in ft.parameters():
            p.add_(0.1 * torch.randn_like(p) * (1 + p.abs()))
            p.copy_(torch.where(torch.rand_like(p) < 0.1, -p, p))
    return pre, ft


def masks(model: nn.Module, share: float, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=generator) < share for n, p in model.named_parameters()}


def graft(pre: nn.Module, ft: nn.Module, share: float = 0.3, seed: int = 0) -> Graft:
    return Graft.from_masks(masks(pre, share, seed), ft, pre)


def as_ints(t: Tensor) -> Tensor:
    """Every bit, comparable."""
    return t.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]).clone()


def bits(model: Any) -> dict[str, Tensor]:
    """Of all tensors of a model or state dict, in floating point."""
    tensors = model.state_dict() if isinstance(model, nn.Module) else model
    return {n: as_ints(t) for n, t in tensors.items() if t.is_floating_point()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Of what `bits` gave: is every one equal?"""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def tiny(at, values=None, shape=(2, 3), base=None):
    """A graft over one tensor w."""
    return Graft(
        {"w": shape},
        {"w": torch.tensor(at, dtype=torch.int32)},
        None if values is None else {"w": torch.tensor(values)},
        base,
    )


def refused(error, call, *texts):
    with pytest.raises(error) as caught:
        call()
    for text in texts:
        assert text in str(caught.value), str(caught.value)
