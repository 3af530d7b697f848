"""Answers without being told the task: a router keeps statistics of every sealed task's features, and no example.

What it said before a task was added can be had again bit for bit, and a task can be taken out as if it had never been
there.
"""

import torch
from torch import nn
from torch.nn import functional as F

import hatcl

torch.manual_seed(0)
y = torch.arange(120) % 3
tasks = [torch.randn(3, 20)[y] + 0.5 * torch.randn(120, 20) for _ in range(3)]
net = nn.Sequential(nn.Linear(20, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 3))
model = hatcl.convert(net, num_tasks=3, example_inputs=tasks[0])
router = hatcl.TaskRouter(model)
said = []
for t, x in enumerate(tasks):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with hatcl.learn(model, t, optimizer, steps=40) as learning:
        for _ in range(40):
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + learning.penalty()).backward()
            optimizer.step()
    router.add_task(t, x, y)
    said.append(hatcl.predict(model, torch.cat(tasks), router=router))

right = (said[-1].task == torch.arange(3).repeat_interleave(120)).float().mean()
print(f"the task is found for {right:.1%} of the inputs")
then = hatcl.predict(model, torch.cat(tasks), router=router, among=range(2))
assert torch.equal(then.probability, said[1].probability)
router.remove_task(2)
now = hatcl.predict(model, torch.cat(tasks), router=router, among=router.tasks)
assert torch.equal(now.probability, said[1].probability)
