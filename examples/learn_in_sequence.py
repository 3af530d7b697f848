"""Five tasks, one optimizer with momentum and weight decay for all of them: no task's logits move by a bit.

Needs scikit-learn: pip install -e '.[data]'
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import hatcl

torch.manual_seed(0)
pixels, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
tasks = [(pixels[labels // 2 == t].float() / 16, labels[labels // 2 == t] % 2) for t in range(5)]
net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))

model = hatcl.convert(net, num_tasks=5, example_inputs=tasks[0][0][:2])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
at_sealing = []
for t, (x, y) in enumerate(tasks):
    x_test, y_test, x, y = x[::5], y[::5], x[1::5], y[1::5]
    with hatcl.learn(model, task=t, optimizer=optimizer, steps=120) as learning:
        for _ in range(120):
            loss = F.cross_entropy(model(x), y) + learning.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        at_sealing.append(model(x_test))  # after learning, the task stays the active one
    print(f"task {t}: {(at_sealing[t].argmax(1) == y_test).float().mean():.1%}")

for t, (x, _) in enumerate(tasks):
    with hatcl.task(model, t), torch.no_grad():
        assert torch.equal(model(x[::5]), at_sealing[t])
print("all five tasks: logits bit-equal to those at sealing")
