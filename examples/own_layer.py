"""A layer of your own: a norm whose statistics run over units. Once registered, a task's norm runs over the units that
are on, so that the task computes what the network cut down to its units would compute."""

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


@hatcl.register(MeanAbsNorm)
class HATMeanAbsNorm(hatcl.HATLayer):
    hat_is_norm, hat_output_dim, hat_owner_dims, hat_copied = True, -1, {"weight": 0}, ("weight",)  # a weight per task

    def hat_fold_gate(self, name: str, gate: torch.Tensor) -> torch.Tensor:
        return (gate != 0) * gate.mean()  # the mean divides by all U; with n of them on, n / U corrects it


torch.manual_seed(0)
x = torch.randn(64, 10)
net = nn.Sequential(nn.Linear(10, 64), MeanAbsNorm(64), nn.Linear(64, 2))
model = hatcl.convert(net, num_tasks=2, example_inputs=x)
with hatcl.learn(model, task=0, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), steps=1):
    pass  # sealed as it was drawn: about half of the units are on
on = model.hat_gates.masks[0]
hidden = F.linear(x, model[0].weight[on], model[0].bias[on])
cut = F.linear(hidden / hidden.abs().mean(-1, keepdim=True), model[2].weight[:, on], model[2].bias)
torch.testing.assert_close(model(x), cut)
print(f"equals the network cut down to its {int(on.sum())} of {len(on)} units;", hatcl.certify(model, x, strict=True))
