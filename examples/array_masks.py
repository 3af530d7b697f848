"""Nine tasks of a third of each layer's units: no two share a weight between two layers, and one is forgotten whole.

Needs scikit-learn: pip install -e '.[data]'
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import hatcl

torch.manual_seed(0)
pixels, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
x, targets = pixels.float() / 16, [(labels == digit).long() for digit in range(9)]  # is it a 0? a 1? ... an 8?
net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 2))

model = hatcl.convert(net, num_tasks=9, example_inputs=x[:2], config={"masks": "array:3"})
at_sealing = []
for t, y in enumerate(targets):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with hatcl.learn(model, task=t, optimizer=optimizer, steps=200):
        for _ in range(200):
            optimizer.zero_grad()
            F.cross_entropy(model(x[1::2]), y[1::2]).backward()
            optimizer.step()
    with torch.no_grad():
        at_sealing.append(model(x[::2]))
    right = at_sealing[t].argmax(1) == y[::2]
    print(f"task {t}: {right.float().mean():.1%}; {hatcl.describe(model).room.free['2']:,} weights of layer 2 are free")

print(report := hatcl.forget_task(model, 4))
assert report.erased["2.weight"] == 96 * 96 // 9  # all that it used between the two layers; the first layer stays
for t in {*range(9)} - {4}:
    with hatcl.task(model, t), torch.no_grad():
        assert torch.equal(model(x[::2]), at_sealing[t])
