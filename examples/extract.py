"""From a model that learned two tasks to one task in onnxruntime, in a file of a fraction of the size."""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import nn
from torch.nn import functional as F

import hatcl

torch.manual_seed(0)
x = torch.randn(256, 20)
goals = [(x @ torch.randn(20) > 0).long() for _ in range(2)]
net = nn.Sequential(nn.Linear(20, 400), nn.LayerNorm(400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 2))
model = hatcl.convert(net, num_tasks=2, example_inputs=x, config={"penalty_weight": 2.0})
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for t, y in enumerate(goals):
    with hatcl.learn(model, task=t, optimizer=optimizer, steps=100) as learning:
        for _ in range(100):
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + learning.penalty()).backward()
            optimizer.step()

small = hatcl.extract_task(model, 1, x)
print(small.report, small.model, sep="\n")
with tempfile.TemporaryDirectory() as folder:
    small.save(folder)  # safetensors and JSON
    again = hatcl.load_extracted(folder, base=net)  # an ordinary module: train it, compile it, quantise it
    session = onnxruntime.InferenceSession(Path(small.save(folder, "onnx")))
    (out,) = session.run(None, {session.get_inputs()[0].name: x[:5].numpy()})  # any batch size
with hatcl.task(model, 1), torch.no_grad():
    assert torch.allclose(model(x), again(x), atol=1e-4)
    assert torch.allclose(model(x[:5]), torch.from_numpy(out), atol=1e-4)
print("onnxruntime, the loaded module and the model under task 1 agree")
