"""A network that reads digits learns to read them upside down; a few of its weights hold most of what it learned."""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import hatcl
from hatcl.engine.measures import gain_kept

torch.manual_seed(0)
x, labels = (torch.tensor(a).float() for a in load_digits(return_X_y=True))
images, turned, labels = x / 16, x.flip(1) / 16, labels.long()
pretrained = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def fit(model, images, epochs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for at in (at for _ in range(epochs) for at in torch.randperm(1200).split(20)):
        optimizer.zero_grad()
        cross_entropy(model(images[at]), labels[at]).backward()
        optimizer.step()


def accuracy(model):  # on turned images that nothing was trained on
    return (model(turned[1200:]).argmax(1) == labels[1200:]).double().mean().item()


fit(pretrained, images, 10)
finetuned = copy.deepcopy(pretrained)
fit(finetuned, turned, 5)
batches, loss = torch.arange(1200).split(100), lambda model, at: cross_entropy(model(turned[at]), labels[at])
for share in (0.1, 0.02, 0.005):
    for graft in (hatcl.select_graft(pretrained, finetuned, share),
                  hatcl.learn_graft(pretrained, finetuned, loss, batches, share)):  # fmt: skip
        kept = gain_kept(accuracy(pretrained), accuracy(finetuned), accuracy(graft.apply_to(pretrained)))
        print(f"{type(graft).__name__} of {share:.1%} of the weights: {kept:.0%} of the gain")
