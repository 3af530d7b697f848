"""Task vectors: what fine-tuning added to a model, to compute with, save, and put onto the model again.

With scale 1 a vector gives the fine-tuned model back bit for bit, with scale 0 the base. The same on files of any size:
hatcl merge base.safetensors even.safetensors:0.5 large.safetensors:0.5 --output merged
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import hatcl
from hatcl.vectors.conflicts import sign_conflicts

torch.manual_seed(0)
x = torch.randn(256, 20)
goals = {"even": (x[:, ::2].sum(1) > 0).long(), "large": (x.abs().sum(1) > 16).long()}
base = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))


def finetune(model: nn.Module, y: torch.Tensor) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


tuned = {task: finetune(copy.deepcopy(base), y) for task, y in goals.items()}
even, large = (hatcl.TaskVector.between(base, model) for model in tuned.values())
assert torch.equal(even.apply_to(base)(x), tuned["even"](x)) and torch.equal(even.apply_to(base, 0)(x), base(x))

for name, vector in {"even": even, "large": large, "both": even + large, "half even": even / 2}.items():
    model = vector.apply_to(base)
    print(f"{name:>9}", {task: f"{(model(x).argmax(1) == y).float().mean():.0%}" for task, y in goals.items()})
print(f"cosine {even.cosine(large):.2f}, norms {even.norm():.2f} and {large.norm():.2f}")
print(sign_conflicts([even, large]))
