"""Draws docs/shadows.svg: what the trace carries through a residual block and a transformer block.

    python docs/shadows.py

Each row is an operation of the real trace. The squares are the channels of its output, one colour per unit; grey is
always on. Hatched: not zero where the unit is off.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from hatcl.map import trace as tracing
from hatcl.map.shadow import varying


class ResidualBlock(nn.Module):
    """A stem, and a block that adds to it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.conv1, self.bn1 = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(out)))
        return self.head(x.mean((2, 3)))


class TransformerBlock(nn.Module):
    """Patches with positions, attention of two heads, a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.positions = nn.Parameter(torch.randn(1, 3, 6))
        self.norm1, self.qkv, self.out = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(4, 6)
        self.norm2, self.gate, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.positions
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(x.mean(1))


SHOWN = {
    "convolution", "addmm", "native_batch_norm", "_native_batch_norm_legit_no_training", "relu", "relu_", "add", "mul",
    "mean", "native_layer_norm", "silu", "bmm", "_softmax", "mm",
}  # fmt: skip


def record(model: nn.Module, inputs: Tensor) -> tuple[list[tuple[str, str, Tensor, Any]], Any]:
    """The operations that the trace saw: module path, name, output, shadow."""
    seen: list[tuple[str, str, Tensor, Any]] = []
    plain = tracing.Tracer.__torch_dispatch__

    def watched(self: Any, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = plain(self, func, types, args, kwargs)
        name = func._schema.name.split("::")[1]
        first = next((x for x in tree_flatten(out)[0] if isinstance(x, Tensor)), None)
        shadow = self.coupling.shadow(first)
        if name in SHOWN and first is not None and shadow is not None:
            seen.append((self.coupling.here, name, first, shadow))
        return out

    tracing.Tracer.__torch_dispatch__ = watched
    try:
        found = tracing.trace(model, inputs, norms=lambda m: isinstance(m, (nn.BatchNorm2d, nn.LayerNorm)))
    finally:
        tracing.Tracer.__torch_dispatch__ = plain
    return seen, found


def draw(axes: Any, title: str, model: nn.Module, inputs: Tensor) -> None:
    seen, found = record(model.eval(), inputs)
    labels = found.labels
    read = labels.any_in_component("read")
    colours: dict[int, Any] = {}
    palette = plt.get_cmap("tab20").colors + plt.get_cmap("tab20b").colors
    for row, (path, name, _, shadow) in enumerate(seen):
        y = -row
        axes.text(
            -0.4, y + 0.4, f"{path}  {name.strip('_').replace('native_', '')}", ha="right", va="center", fontsize=8
        )
        left = 0.0
        for slot in shadow.slots or ():
            ids = slot.ids
            dims = varying(ids)
            for d in range(ids.dim()):
                if d not in dims:
                    ids = ids.narrow(d, 0, 1)
            roots = labels.find(ids.reshape(-1).numpy())
            for root in roots.tolist():
                unit = root != 0 and bool(read[root])
                colour = colours.setdefault(root, palette[len(colours) % len(palette)]) if unit else "0.85"
                hatch = None if slot.clean else "////"
                axes.add_patch(
                    Rectangle((left, y + 0.1), 0.9, 0.7, facecolor=colour, edgecolor="0.3", lw=0.5, hatch=hatch)
                )
                left += 1
            left += 0.5
        if not shadow.slots:
            axes.text(0, y + 0.4, "carries no units", va="center", fontsize=7, color="0.4")
    axes.set_xlim(-8, 14)
    axes.set_ylim(-len(seen), 1)
    axes.set_title(title, fontsize=10)
    axes.axis("off")


def main() -> None:
    torch.manual_seed(0)
    plt.rcParams["svg.hashsalt"] = "hatcl"
    figure, axes = plt.subplots(1, 2, figsize=(12, 6.5))
    draw(axes[0], "a residual block", ResidualBlock(), torch.randn(1, 3, 4, 4))
    draw(axes[1], "a transformer block", TransformerBlock(), torch.randn(1, 3, 5))
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("shadows.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
