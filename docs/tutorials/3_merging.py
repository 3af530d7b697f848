# %% [markdown]
# # 3. Merge three fine-tuned models and learn the coefficients
#
# A network that reads digits is fine-tuned three times: on digits that are upside down, faint, and noisy. Three
# models, one skill each. Without training any weight we make one model of the three: first by published merging methods,
# then with coefficients that are learned, as in aTLAS.
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
changes = {
    "upside down": lambda x: x.flip(1),
    "faint": lambda x: 0.3 * x + 0.5,
    "noisy": lambda x: x + 0.4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)),
}
train, validation, test = torch.arange(len(labels)).split([1000, 400, 397])


def fit(net, x, steps):
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(steps):
        at = train[torch.randint(len(train), (64,))]
        optimizer.zero_grad()
        F.cross_entropy(net(x[at]), labels[at]).backward()
        optimizer.step()
    return net


def accuracies(net, part):
    with torch.no_grad():
        return [
            (net(change(images)[part]).argmax(1) == labels[part]).float().mean().item() for change in changes.values()
        ]


def show(name, net):
    found = accuracies(net, test)
    print(f"{name:24}", "  ".join(f"{100 * value:5.1f}" for value in found), f"  mean {100 * sum(found) / 3:5.1f}")


# %% [markdown]
# ## Three fine-tuned models
#
# The columns are the accuracies, in percent, on test images that are upside down, faint and noisy.

# %%
net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
base = fit(net, images, 300)
show("base", base)
finetuned = {}
for name, change in changes.items():
    finetuned[name] = fit(copy.deepcopy(base), change(images), 300)
    show(f"fine-tuned: {name}", finetuned[name])

# %% [markdown]
# ## Task vectors
#
# A **task vector** is the fine-tuned model minus the base. Vectors can be added, scaled and subtracted. Added with
# coefficient 1 a vector gives its model back bit for bit.

# %%
vectors = [hatcl.TaskVector.between(base, net) for net in finetuned.values()]
again = vectors[0].apply_to(base)
assert all(torch.equal(a, b) for a, b in zip(again.parameters(), finetuned["upside down"].parameters()))
print("cosines:", [round(vectors[i].cosine(vectors[j]), 2) for i, j in ((0, 1), (0, 2), (1, 2))])
print(hatcl.sign_conflicts(vectors))

# %% [markdown]
# ## Merging methods
#
# `hatcl.merge` has more than thirty methods under one name each; `hatcl.list_merges()` lists them.

# %%
for method, options in {"mean": {}, "arithmetic": {"scale": 0.6}, "ties": {"density": 0.5}, "magmax": {}}.items():
    show(method, hatcl.merge(vectors, method, **options).apply_to(base))

# %% [markdown]
# ## Coefficients that are learned
#
# One number for all is a compromise. `hatcl.compose` gives every parameter tensor of every vector a coefficient of its own,
# and these are all that is trained: 18 numbers here, on 400 validation images.

# %%
composer = hatcl.compose(base, vectors, grain="block")
print("coefficients:", tuple(composer.coefficients.shape))
data = [[(change(images)[at], labels[at]) for at in validation.split(100)] for change in changes.values()]
tasks = [hatcl.atlas.AtlasTask(name, batches) for name, batches in zip(changes, data)]
result = hatcl.atlas.add(composer, tasks, options={"epochs": 15, "lr": 3e-2})
show("learned coefficients", composer.merge())
for name, row in zip(changes, composer.coefficients.detach()):
    print(f"{name:12}", [round(value, 2) for value in row.tolist()])

# %% [markdown]
# `composer.merge()` is an ordinary model without hatcl. The coefficients also tell something: which layers each task
# changed for the better.
#
# **Next.** The same on files of any size: `hatcl merge BASE one:0.6 two:0.4 --output merged`, or by a recipe of mergekit.
# [Merging](../merging.md) describes the methods, [aTLAS](../atlas.md) the learned coefficients.
