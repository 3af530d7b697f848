# %% [markdown]
# # 1. A network that learns five tasks and forgets none, and one on purpose
#
# One small network learns to tell 0 from 1, then 2 from 3, and so on up to 8 and 9, on the real handwritten digits that
# come with scikit-learn. Trained in the ordinary way it forgets; with hatcl it does not, and that can be proved. In the end
# it forgets one task because we ask it to.
#
# You need `pip install -e '.[data]'`, and half a minute.

# %%
import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import hatcl

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)


def data_of(task, part):
    """Images and labels 0 or 1 of one task; every third image is for testing."""
    mine = (labels // 2 == task) & ((torch.arange(len(labels)) % 3 == 0) == (part == "test"))
    return images[mine], labels[mine] % 2


def accuracy(model, task):
    x, y = data_of(task, "test")
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def show(rows):
    for i, row in enumerate(rows):
        print(f"after task {i}:", "  ".join(f"{100 * value:5.1f}" for value in row))


# %% [markdown]
# ## Ordinary training forgets
#
# Each row of the table is the accuracy, in percent, on the tasks learned so far.

# %%
net = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 2))
plain = copy.deepcopy(net)
optimizer = torch.optim.AdamW(plain.parameters(), lr=2e-3)
rows = []
for task in range(5):
    x, y = data_of(task, "train")
    for _ in range(100):
        at = torch.randint(len(y), (32,))
        optimizer.zero_grad()
        F.cross_entropy(plain(x[at]), y[at]).backward()
        optimizer.step()
    rows.append([accuracy(plain, t) for t in range(task + 1)])
show(rows)

# %% [markdown]
# ## The same loop with hatcl
#
# `hatcl.convert` runs the network once, finds its units, and returns a copy in which every task can switch units on and
# off. `hatcl.learn` wraps the loop that you have. While a task is learned its gates open and close; when the block ends
# they are hard, the task is **sealed**, and what it uses can no longer move.

# %%
model = hatcl.convert(net, num_tasks=5, example_inputs=images[:2], config={"penalty_weight": 1.5})
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)


def learn(task, steps=100):
    x, y = data_of(task, "train")
    model.train()
    with hatcl.learn(model, task=task, optimizer=optimizer, steps=steps) as learning:
        for _ in range(steps):
            at = torch.randint(len(y), (32,))
            loss = F.cross_entropy(model(x[at]), y[at]) + learning.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


def row(tasks):
    found = []
    for t in tasks:
        with hatcl.task(model, t):
            found.append(accuracy(model, t))
    return found


rows = []
for task in range(5):
    learn(task)
    rows.append(row(range(task + 1)))
show(rows)

# %% [markdown]
# No number in a column changes: the outputs are equal to the last bit, not only the accuracy. The optimizer is an ordinary
# AdamW with momentum and weight decay, built once for all tasks.
#
# The penalty asks each task to use few new units. `hatcl.describe` shows what is used and what is still free.

# %%
print(hatcl.describe(model))

# %% [markdown]
# ## The proof
#
# The certificate does not trust the training. For every task it overwrites everything in the network that is not the
# task's own with large random numbers, on a copy, and demands the same bits.

# %%
certificate = hatcl.certify(model, images[:50])
print(certificate)
assert certificate.exact

# %% [markdown]
# ## Forgetting on purpose
#
# `dry_run=True` says what would be erased. Elements that another task uses as well have to stay, and the report says
# how many these are.

# %%
print(hatcl.forget_task(model, 1, dry_run=True))

# %%
before = {}
for t in (0, 2, 3, 4):
    with hatcl.task(model, t), torch.no_grad():
        before[t] = model(images)
print(hatcl.forget_task(model, 1))
for t, logits in before.items():
    with hatcl.task(model, t), torch.no_grad():
        assert torch.equal(model(images), logits)
print("sealed tasks:", hatcl.tasks(model), "- all others gave the same bits as before")

# %% [markdown]
# Its place is free again, and a task can be learned there.

# %%
learn(1)
show([row(range(5))])
hatcl.save_pretrained(model, "runs/five_tasks", card={"names": {t: f"{2 * t} or {2 * t + 1}" for t in range(5)}})

# %% [markdown]
# **Next.** `hatcl train` does all this on the command line, with a picture and a report. [Hard
# attention](../hat.md) has every option, and [your stack](../stack.md) the same for transformers, Lightning and timm.
