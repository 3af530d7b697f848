"""Saving and loading: safetensors and JSON, sealed tasks bit for bit; a damaged file is refused."""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import hatcl

torch.manual_seed(0)
x, net = torch.randn(64, 10), nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 2))
model = hatcl.convert(net, num_tasks=2, example_inputs=x)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
with hatcl.learn(model, task=0, optimizer=optimizer, steps=50) as learning:
    for _ in range(50):
        optimizer.zero_grad()
        (F.cross_entropy(model(x), (x[:, 0] > 0).long()) + learning.penalty()).backward()
        optimizer.step()

with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
    folder = hatcl.save_pretrained(model, Path(temporary) / "model")
    print(sorted(path.name for path in folder.iterdir()))
    again = hatcl.from_pretrained(folder, base=net)  # base= is for classes of your own; timm's are made by name
    with hatcl.task(again, 0), hatcl.task(model.eval(), 0):
        assert torch.equal(again(x), model(x))
    print("loaded: tasks", hatcl.tasks(again), "bit-equal")

    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    try:
        hatcl.from_pretrained(folder, base=net)
    except hatcl.IntegrityError as error:
        print("refused:", str(error).replace(temporary, "..."))
