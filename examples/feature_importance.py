"""Which pixels a task looks at: gates over the inputs, learned per task, and a picture of them in `features.png`."""

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import hatcl

pixels, digits = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
pixels, tasks, steps = pixels.float() / 16, 3, 150
few = {"penalty_weight": 1.0, "embedding_lr_scale": 2.0, "compensation": "exact"}  # each task is to do with few pixels

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 2))
model = hatcl.convert(net, tasks, pixels[:2], mask_inputs=True, config=few)
figure = Figure(figsize=(2.2 * tasks, 2.6))
for t in range(tasks):
    x, y = pixels[digits // 2 == t], digits[digits // 2 == t] % 2  # zeros and ones, twos and threes, ...
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with hatcl.learn(model.train(), t, optimizer, steps) as learning:
        for _ in range(steps):
            at = torch.randint(len(x), (32,))
            optimizer.zero_grad()
            (F.cross_entropy(model(x[at]), y[at]) + learning.penalty()).backward()
            optimizer.step()
    with hatcl.task(model.eval(), t), torch.no_grad():
        right = float((model(x).argmax(1) == y).float().mean())
    print(f"task {t}: {int(model.features_of(t).sum())} of 64 pixels, {right:.1%} of its images")
    axes = figure.add_subplot(1, tasks, t + 1, title=f"{2 * t} or {2 * t + 1}")
    axes.imshow(x.mean(0).view(8, 8), cmap="Greys")
    rows, columns = model.features_of(t).view(8, 8).nonzero().T
    axes.scatter(columns, rows, marker="s", color="#d1603d", s=40)
figure.savefig("features.png")
print(hatcl.certify(model, pixels[:8], strict=True))
