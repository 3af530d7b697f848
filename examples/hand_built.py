"""HAT layers put together by hand, without the converter. `reads=` says whose units a layer's input carries."""

import torch
from torch import nn
from torch.nn import functional as F

import hatcl


class Net(nn.Module):
    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.conv1 = hatcl.HATConv2d(3, 16, 3, padding=1, num_tasks=num_tasks)
        self.norm1 = hatcl.TaskIndexedBatchNorm2d(16, units=self.conv1)
        self.conv2 = hatcl.HATConv2d(16, 32, 3, padding=1, reads=self.conv1)
        self.norm2 = hatcl.TaskIndexedBatchNorm2d(32, units=self.conv2)
        self.head = hatcl.TaskIndexedLinear(32, 2, reads=self.conv2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


torch.manual_seed(0)
x, model = torch.randn(64, 3, 8, 8), Net(num_tasks=2)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for t in range(2):
    y = (x[:, t].mean((1, 2)) > 0).long()
    with hatcl.learn(model, task=t, optimizer=optimizer, steps=60) as learning:
        for _ in range(60):
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + learning.penalty()).backward()
            optimizer.step()
print(hatcl.describe(model))
print(hatcl.certify(model, x, strict=True))
