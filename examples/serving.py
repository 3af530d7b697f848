"""One model serves two tasks at once: in a thread pool, in asyncio, and in one batch. `with hatcl.task(...)` belongs to
the thread or the asyncio task that runs it, so no request computes under another one's task."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn import functional as F

import hatcl

torch.manual_seed(0)
x = torch.randn(16, 8)
plain = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
model = hatcl.convert(plain, num_tasks=2, example_inputs=x)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for t in range(2):
    with hatcl.learn(model, task=t, optimizer=optimizer, steps=50) as learning:
        for _ in range(50):
            optimizer.zero_grad()
            (F.cross_entropy(model(x), (x[:, t] > 0).long()) + learning.penalty()).backward()
            optimizer.step()
model.eval()


def answer(task):
    with hatcl.task(model, task), torch.no_grad():  # no `await` in here: no_grad belongs to the whole thread
        return model(x)


async def answer_all(tasks):
    return await asyncio.gather(*[asyncio.to_thread(answer, t) for t in tasks])


asked, alone = [0, 1] * 8, torch.stack([answer(0), answer(1)])
with ThreadPoolExecutor(4) as pool:
    assert torch.equal(torch.stack([*pool.map(answer, asked)]), alone[asked])
assert torch.equal(torch.stack(asyncio.run(answer_all(asked))), alone[asked])
print("One batch, a task per row:", hatcl.forward(model, x, tasks=asked).argmax(1).tolist())
