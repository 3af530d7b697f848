"""A layer of your own, in one file: a norm whose statistics run over units. Once registered, a task's norm runs over
the units that are on, so that the task computes what the network cut down to its units would compute."""

import torch
from torch import nn
from torch.nn import functional as F

import hatcl


class MeanAbsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / x.abs().mean(-1, keepdim=True).clamp(min=1e-9)


@hatcl.register_layer(MeanAbsNorm)
class HATMeanAbsNorm(hatcl.HATLayer):
    hat_is_norm, hat_output_dim, hat_owner_dims, hat_copied = True, -1, {"weight": 0}, ("weight",)  # a weight per task

    def hat_fold_gate(self, name: str, gate: torch.Tensor) -> torch.Tensor:
        return (gate != 0) * gate.mean()  # the mean divides by all U; with n of them on, n / U corrects it


torch.manual_seed(0)
x = torch.randn(64, 10)
model = hatcl.convert(nn.Sequential(nn.Linear(10, 64), MeanAbsNorm(64), nn.Linear(64, 2)), 2, x)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
for t in range(2):
    with hatcl.learn(model, task=t, optimizer=optimizer, steps=60):
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x), (x[:, t] > 0).long()).backward()
            optimizer.step()
    assert ((x[:, t] > 0) == model(x).argmax(1)).float().mean() > 0.9
print(hatcl.certify(model, x, strict=True))
