"""torch.compile: a training step of a HAT model is one graph, and the compiled model computes the same."""

from __future__ import annotations

import pytest
import timm
import torch
import torch._dynamo
from torch.nn import functional as F

import hatcl


@pytest.mark.parametrize(("name", "size"), [("resnet10t", 32)])
def test_one_graph_and_the_same_numbers(name, size):
    torch.manual_seed(0)
    torch._dynamo.reset()

    model = timm.create_model(f"hat_{name}", num_tasks=2, num_classes=4, verify=False)
    x, y = torch.randn(4, 3, size, size), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters())
    with hatcl.learn(model, 0, optimizer, steps=3) as learning:
        assert torch._dynamo.explain(model)(x).graph_break_count == 0
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(3):
            loss = F.cross_entropy(compiled(x), y) + learning.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad(), hatcl.task(model, 0):
        assert torch.equal(compiled(x), model(x))
