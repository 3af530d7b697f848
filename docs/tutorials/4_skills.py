# %% [markdown]
# # 4. Find the few weights that hold a skill
#
# Fine-tuning moves every weight, but few of the changes matter. A **graft** is a choice of elements: these are taken from
# the fine-tuned model, and all others stay the pretrained model's. We look for the smallest graft that keeps the skill,
# move it onto the pretrained model and off again, and hold it in place while something else is learned.
#
# You need `pip install -e '.[data]'`, and half a minute.

# %%
import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import hatcl
from hatcl.engine.measures import gain_kept

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
turned = images.flip(1)
train, test = torch.arange(len(labels)).split([1200, 597])


def fit(net, x, steps, lr=0.1):
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    for _ in range(steps):
        at = train[torch.randint(len(train), (32,))]
        optimizer.zero_grad()
        F.cross_entropy(net(x[at]), labels[at]).backward()
        optimizer.step()
    return net


def accuracy(net, x):
    with torch.no_grad():
        return (net(x[test]).argmax(1) == labels[test]).double().mean().item()


# %% [markdown]
# ## A skill to look for
#
# The network reads digits; then it is fine-tuned on digits that are upside down. We train with SGD: after AdamW a skill is
# spread over more weights ([grafts](../grafts.md) says why, and what helps).

# %%
net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
pretrained = fit(net, images, 400)
finetuned = fit(copy.deepcopy(pretrained), turned, 200)
print(f"upright:     pretrained {accuracy(pretrained, images):.3f}, fine-tuned {accuracy(finetuned, images):.3f}")
print(f"upside down: pretrained {accuracy(pretrained, turned):.3f}, fine-tuned {accuracy(finetuned, turned):.3f}")

# %% [markdown]
# ## Chosen by size, at random, and learned
#
# The largest changes are a first guess. `hatcl.learn_graft` does better: it trains the choice itself, on the loss of the
# task. The figure to look at is the share of the *gain* that the graft keeps, from pretrained (0 %) to fine-tuned (100 %).

# %%
batches = list(train.split(100))


def loss(net, at):
    return F.cross_entropy(net(turned[at]), labels[at])


def kept(graft):
    values = [accuracy(model, turned) for model in (pretrained, finetuned, graft.apply_to(pretrained))]
    return f"{gain_kept(*values):6.1%}"


print("share of weights   random   largest   learned")
for share in (0.1, 0.02, 0.005):
    grafts = [hatcl.select_graft(pretrained, finetuned, share, by=by) for by in ("random", "magnitude")]
    learned = hatcl.learn_graft(pretrained, finetuned, loss, batches, sparsity=share)
    print(f"{share:16.1%}   {kept(grafts[0])}    {kept(grafts[1])}    {kept(learned)}")

# %% [markdown]
# ## On and off
#
# A graft is stored as positions and values, so its file has the size of what it holds. Putting it on and taking it off
# moves values and computes nothing, so that every bit of the pretrained model comes back.

# %%
graft = hatcl.learn_graft(pretrained, finetuned, loss, batches, sparsity=0.02)
path = graft.save("runs/upside_down.safetensors")
print(graft, f"{path.stat().st_size:,} bytes")
before = copy.deepcopy(pretrained.state_dict())
with graft.applied(pretrained):
    print(f"with the graft: upright {accuracy(pretrained, images):.3f}, upside down {accuracy(pretrained, turned):.3f}")
assert all(torch.equal(a, b) for a, b in zip(before.values(), pretrained.state_dict().values()))
print(f"without it:     upright {accuracy(pretrained, images):.3f}, upside down {accuracy(pretrained, turned):.3f}")

# %% [markdown]
# ## Where does the skill sit?

# %%
for name, mask in graft.masks().items():
    print(f"{name:10} {int(mask.sum()):5} of {mask.numel():6} elements")

# %% [markdown]
# ## Held while something else is learned
#
# In `hatcl.hold` the elements of a graft do not move, whatever the optimizer does.

# %%
model = graft.apply_to(pretrained)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
with hatcl.hold(model, graft, optimizer):
    for _ in range(100):
        at = train[torch.randint(len(train), (32,))]
        optimizer.zero_grad()
        F.cross_entropy(model(1 - images[at]), labels[at]).backward()  # a new task: digits in negative
        optimizer.step()
masks, now = graft.masks(), dict(model.named_parameters())
put_on = dict(graft.apply_to(pretrained).named_parameters())
assert all(torch.equal(now[name][mask], put_on[name][mask]) for name, mask in masks.items())
print(f"negative {accuracy(model, 1 - images):.3f}, upside down {accuracy(model, turned):.3f}; the graft did not move")

# %% [markdown]
# The graft's own elements are as they were, but the others moved and with them what the network computes. A graft names
# the weights that matter; to keep a task's *outputs* bit for bit, use [tutorial 1](1_five_tasks.md).
#
# **Next.** [Grafts](../grafts.md) has the methods and commands (`hatcl finetune`, `hatcl graft`), and [TaSL](../tasl.md)
# looks for skills in LoRA adapters.
