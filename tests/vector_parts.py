"""Small models for the tests of task vectors, and their files."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from hatcl.vectors.merging import merge
from hatcl.vectors.task_vector import TaskVector

# how many vectors these methods take, exactly
MOST = {"slerp": 2, "nuslerp": 2, "passthrough": 1, "nearswap": 1, "arcee_fusion": 1}


class Tied(nn.Module):
    """An embedding that is also the head, a counter, and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.fc = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("rate", torch.tensor(0.5))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.fc(self.norm(self.embed(x)))))


def moved(model: nn.Module, seed: int = 1, size: float = 0.1) -> nn.Module:
    """A copy whose floating-point tensors, statistics too, have changed."""
    out = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in [*out.parameters(), *(b for b in out.buffers() if b.dtype.is_floating_point)]:
            t += size * torch.randn(t.shape, generator=generator).to(t.dtype)
    return out


def save(model: nn.Module, path: Path) -> Path:
    """As transformers writes a model: tied tensors once."""
    names = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    save_file({n: t.clone() for n, t in model.state_dict().items() if n in names}, path)
    return path


def same(a, b) -> bool:
    """Equal tensors under equal names, in any order (files have their own)."""
    return set(a) == set(b) and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def of_rows(*rows):
    """A task vector of one tensor `w` for each row of numbers."""
    return [TaskVector({"w": torch.tensor(r)}) for r in rows]


def merged_rows(rows, method, **options):
    """The numbers of these vectors' merge."""
    return merge(of_rows(*rows), method, **options)["w"].tolist()
