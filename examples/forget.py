"""Forgetting task 1 of 3: the dry run says what goes, tasks 0 and 2 stay bit for bit, the index can be learned again.

`reuse="none"` gives every task units of its own, so that forgetting one leaves nothing of it. With the default,
`reuse="all"`, what other tasks also use stays; the report says how much.
"""

import torch
from torch import nn
from torch.nn import functional as F

import hatcl

torch.manual_seed(0)
x = torch.randn(256, 20)
goals = [(x @ torch.randn(20) > 0).long() for _ in range(3)]
net = nn.Sequential(nn.Linear(20, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 2))
model = hatcl.convert(net, num_tasks=3, example_inputs=x, config={"reuse": "none", "penalty_weight": 2.0})
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)


def learn(t: int) -> torch.Tensor:
    with hatcl.learn(model, task=t, optimizer=optimizer, steps=100) as learning:
        for _ in range(100):
            optimizer.zero_grad()
            (F.cross_entropy(model(x), goals[t]) + learning.penalty()).backward()
            optimizer.step()
    print(f"task {t}: {(model(x).argmax(1) == goals[t]).float().mean():.1%}, units {hatcl.describe(model).use[t]}")
    return model(x)


at_sealing = [learn(t) for t in range(3)]
print(hatcl.forget_task(model, 1, dry_run=True))
print(hatcl.forget_task(model, 1))
learn(1)  # the index and the units were free again
for t in (0, 2):
    with hatcl.task(model, t):
        assert torch.equal(model(x), at_sealing[t])
print("tasks 0 and 2: bit-equal throughout")
