# %% [markdown]
# # 5. Take a task out: ONNX, and serving several tasks from one model
#
# One network has learned three tasks. Two ways to put it to use: cut one task out as a small network of its own, which
# needs no hatcl and runs in onnxruntime; or keep the one model and answer for all tasks from it, in one batch or from
# several threads.
#
# You need `pip install -e '.[data,onnx]'`, and half a minute.

# %%
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import hatcl

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)


class Net(nn.Module):
    """Two convolutions and a head for 8 x 8 images."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.second = nn.Conv2d(32, 64, 3, padding=1)
        self.head = nn.Linear(64 * 4, 2)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        return self.head(F.max_pool2d(F.relu(self.second(x)), 2).flatten(1))


# %% [markdown]
# ## Three tasks in one model
#
# Task 0 tells 0 from 1, task 1 tells 2 from 3, task 2 tells all ten digits apart: its head is wider.

# %%
mine = [labels < 2, (labels == 2) | (labels == 3), labels >= 0]
goals = [labels % 2, labels % 2, labels]
model = hatcl.convert(Net(), num_tasks=3, example_inputs=images[:2], num_classes=[2, 2, 10])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for task, steps in enumerate((60, 60, 150)):
    x, y = images[mine[task]], goals[task][mine[task]]
    model.train()
    with hatcl.learn(model, task=task, optimizer=optimizer, steps=steps) as learning:
        for _ in range(steps):
            at = torch.randint(len(y), (64,))
            loss = F.cross_entropy(model(x[at]), y[at]) + learning.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with hatcl.task(model, task), torch.no_grad():
        print(f"task {task}: {(model(x).argmax(1) == y).float().mean():.1%} of its training images")
print(hatcl.certify(model, images[:32], strict=True))

# %% [markdown]
# ## One task as a network of its own
#
# A sealed task uses some of the units. `hatcl.extract_task` cuts the network down to these. The result is an
# ordinary module: train it further, compile it, quantise it.

# %%
extracted = hatcl.extract_task(model, 0, images[:8])
print(extracted.report)
print(extracted.model)
with hatcl.task(model, 0), torch.no_grad():
    print("largest difference:", (extracted.model(images) - model(images)).abs().max().item())

# %% [markdown]
# Saved as safetensors and JSON it loads without the model that it came from; as an ONNX file it needs no Python at all.
# Any batch size works.

# %%
folder = Path(tempfile.mkdtemp())
extracted.save(folder)
again = hatcl.load_extracted(folder, base=Net())
onnx = Path(extracted.save(folder, "onnx"))
session = onnxruntime.InferenceSession(onnx)
(answers,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
with torch.no_grad():
    assert torch.equal(again(images), extracted.model(images))
    assert np.allclose(answers, extracted.model(images).numpy(), atol=1e-4)
hatcl.save_pretrained(model, folder / "all")
size = (folder / "all" / "model.safetensors").stat().st_size
print(f"the task as an ONNX file: {onnx.stat().st_size:,} bytes; the model with all tasks: {size:,} bytes")

# %% [markdown]
# ## One batch with a task for each row
#
# To serve all tasks keep the model whole. `hatcl.forward` takes a task for each row; each row gets what its own task gives,
# bit for bit. Where tasks have heads of different widths the answer is a list of rows.

# %%
asked = [0, 1, 2, 1, 2, 0]
rows = hatcl.forward(model, images[:6], tasks=asked)
for task, digit, row in zip(asked, labels, rows):
    print(f"task {task}, an image of a {int(digit)}: answers {int(row.argmax())} of {len(row)} classes")

# %% [markdown]
# ## Several threads
#
# `with hatcl.task(...)` belongs to the thread (or the asyncio task) that runs it. So one model in memory can serve a pool of
# threads, and no request computes under another one's task.


# %%
def answer(task):
    with hatcl.task(model, task), torch.no_grad():
        return model(images)


alone = [answer(task) for task in range(3)]
began = time.perf_counter()
with ThreadPoolExecutor(4) as pool:
    together = list(pool.map(answer, [0, 1, 2] * 4))
print(f"{12 * len(images):,} answers in {time.perf_counter() - began:.2f} s")
assert all(torch.equal(out, alone[i % 3]) for i, out in enumerate(together))

# %% [markdown]
# **Next.** `hatcl extract` does the first part on the command line. If nobody can say which task an input belongs to, see
# [which task is it?](../predict.md).
