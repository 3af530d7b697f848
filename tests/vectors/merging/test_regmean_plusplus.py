"""RegMean++ layer by layer, against a reference that runs the layers by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hatcl import ConfigError, VectorError
from hatcl.vectors.merging import merge
from hatcl.vectors.merging.regmean_plusplus import block_of
from hatcl.vectors.task_vector import TaskVector

# float32 activations against float64 ones: measured 4e-7 over 20 seeds
SLACK = 1e-5


class Stack(nn.Module):
    """Two blocks of two layers."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)}) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = x + block["down"](block["up"](x).tanh())
        return x


def world(tasks=3):
    base = Stack()
    models = [copy.deepcopy(base) for _ in range(tasks)]
    for m in models:
        with torch.no_grad():
            for p in m.parameters():
                p += 0.5 * torch.randn(p.shape)
    batches = [[torch.randn(20, 4) + t for _ in range(2)] for t in range(tasks)]
    return base, models, [TaskVector.between(base, m) for m in models], batches


def regression(weights, inputs, alpha):
    grams = [x.T @ x / len(x) for x in inputs]
    grams = [alpha * g + (1 - alpha) * torch.diag(g.diagonal()) for g in grams]
    return sum(w @ g for w, g in zip(weights, grams, strict=True)) @ torch.linalg.inv(sum(grams))


def reference(models, batches, alpha):
    """Blocks by hand, in float64."""
    models = [copy.deepcopy(m).double() for m in models]
    hidden = [torch.cat(b).double() for b in batches]
    out = {}
    with torch.no_grad():
        for i in range(2):
            blocks = [m.blocks[i] for m in models]
            inner = [b["up"](x).tanh() for b, x in zip(blocks, hidden, strict=True)]  # the task's own layer
            new = {}
            for part, inputs in (("up", hidden), ("down", inner)):
                new[f"{part}.weight"] = regression([b[part].weight for b in blocks], inputs, alpha)
                new[f"{part}.bias"] = sum(b[part].bias for b in blocks) / len(blocks)
            merged = copy.deepcopy(blocks[0])
            merged.load_state_dict(new)
            hidden = [x + merged["down"](merged["up"](x).tanh()) for x in hidden]  # the merged block
            out |= {f"blocks.{i}.{n}": x for n, x in new.items()}
    return out


@pytest.mark.parametrize("alpha", [0.5, 0.9])
def test_as_in_the_paper(alpha):
    base, models, vectors, batches = world()
    got = merge(vectors, "regmean_plusplus", model=base, batches=batches, alpha=alpha).apply_to(base)
    want = reference(models, batches, alpha)
    for name, p in got.named_parameters():
        assert float((p.detach() - want[name]).abs().max()) < SLACK, name
    plain = merge(vectors, "regmean", model=base, batches=batches, alpha=alpha).apply_to(base)
    gap = {n: float((plain.get_parameter(n).detach() - want[n]).abs().max()) for n in want}
    assert gap["blocks.0.up.weight"] < SLACK and gap["blocks.1.up.weight"] > 1e-3  # the first block sees the same


def test_the_model_stays_as_it_is():
    base, _, vectors, batches = world()
    before = copy.deepcopy(base.state_dict())
    merge(vectors, "regmean_plusplus", model=base, batches=batches)
    assert all(torch.equal(x, before[n]) for n, x in base.state_dict().items())


def test_blocks_by_their_names():
    assert block_of("encoder.layer.3.attention.self.query.weight") == "encoder.layer.3"
    assert block_of("stages.1.blocks.2.mlp.fc1.bias") == "stages.1.blocks.2"
    assert block_of("patch_embed.proj.weight") == "patch_embed.proj"
    assert block_of("0.weight") == "0"


def test_batches_that_are_used_up_after_one_pass_are_refused():
    base, _, vectors, batches = world()
    with pytest.raises(ConfigError, match="batches of task 1: got generator, expected batches that can be iterated"):
        merge(vectors, "regmean_plusplus", model=base, batches=[batches[0], (b for b in batches[1]), batches[2]])


def test_a_layer_that_one_task_does_not_reach():
    base, _, vectors, batches = world(2)

    def half(model, x, task):
        return model(x) if task else model.blocks[0]["up"](x)

    with pytest.raises(VectorError, match="blocks.0.down.weight: vector 0 has no matrix of its inputs"):
        merge(vectors, "regmean_plusplus", model=base, batches=batches, forward=half)
