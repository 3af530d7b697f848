"""The networks whose cost is measured: how to make each, and a batch of it. Weights and inputs are random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

CLASSES = 10


class Logits(nn.Module):
    """A transformers model that gives its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits


class Last(nn.Module):
    """An LSTM over a sequence, and a head on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(64, 256, batch_first=True), nn.Linear(256, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Words(nn.Module):
    """A bag of words: a large embedding table and a small head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden = nn.Embedding(30_000, 128), nn.Linear(128, 128)
        self.head = nn.Linear(128, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.table(ids).mean(1))))


def image(name: str, size: int, batch: int, last: bool = False) -> Callable[[], tuple[nn.Module, Tensor]]:
    def make() -> tuple[nn.Module, Tensor]:
        more = {"img_size": size} if "vit" in name else {}
        model, x = timm.create_model(name, num_classes=CLASSES, **more), torch.randn(batch, 3, size, size)
        if last:
            model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        return model, x

    return make


def bert() -> tuple[nn.Module, Tensor]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=2000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
        max_position_embeddings=64, num_labels=CLASSES,
    )  # fmt: skip
    return Logits(BertForSequenceClassification(config)), torch.randint(0, 2000, (8, 32))


def mlp() -> tuple[nn.Module, Tensor]:
    parts: list[nn.Module] = []
    for width in (512, 512, 512):
        parts += [nn.Linear(512, width), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(512, CLASSES)), torch.randn(32, 512)


def group_norms() -> tuple[nn.Module, Tensor]:
    parts: list[nn.Module] = []
    for read, width in ((3, 32), (32, 64), (64, 128)):
        parts += [nn.Conv2d(read, width, 3, 2, 1), nn.GroupNorm(8, width), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, CLASSES)]
    return nn.Sequential(*parts, *head), torch.randn(16, 3, 32, 32)


SMALL: dict[str, Callable[[], tuple[Any, Tensor]]] = {
    "resnet18, 32 px, batch 64": image("resnet18", 32, 64),
    "resnet18, 32 px, batch 4": image("resnet18", 32, 4),
    "resnet18, 32 px, batch 16, channels_last": image("resnet18", 32, 16, True),
    "mobilenetv3_small_050, 64 px, batch 16": image("mobilenetv3_small_050", 64, 16),
    "convnext_atto, 64 px, batch 8": image("convnext_atto", 64, 8),
    "vit_tiny_patch16_224, 96 px, batch 8": image("vit_tiny_patch16_224", 96, 8),
    "BERT of 4 layers of 256, batch 8": bert,
    "MLP of 3 x 512, batch 32": mlp,
    "CNN with GroupNorm, batch 16": group_norms,
    "LSTM of 256, batch 16": lambda: (Last(), torch.randn(16, 20, 64)),
    "embedding of 30,000 x 128, batch 32": lambda: (Words(), torch.randint(0, 30_000, (32, 20))),
}
LARGE: dict[str, Callable[[], tuple[Any, Tensor]]] = {
    "vit_tiny_patch16_224, 224 px, batch 8": image("vit_tiny_patch16_224", 224, 8),
    "vit_base_patch16_224, 224 px, batch 8": image("vit_base_patch16_224", 224, 8),
    "resnet50, 224 px, batch 8": image("resnet50", 224, 8),
}
