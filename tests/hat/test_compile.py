"""torch.compile: a training step of a HAT model is one graph, and the compiled model computes the same."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import parts
import pytest
import timm
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter
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


# ---- a whole task, and evaluation: one graph ----------------------------------------------------------------------


def small(name):
    """A converted model, a call of it on its inputs, and labels."""
    if name != "llama":
        model = parts.converted(name, 2)
        x, y = parts.problem(parts.shape_of(name))
        return model, lambda f: f(x), y
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    plain = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    batch = {"input_ids": torch.randint(50, (4, 7)), "attention_mask": torch.ones(4, 7, dtype=torch.long)}
    return hatcl.convert(plain, 2, batch), lambda f: f(**batch).logits.mean(1)[:, :4], torch.arange(4)


@pytest.mark.parametrize("name", ["mlp", "resnet", "vit", "llama"])
def test_a_task_is_one_graph_from_its_first_step_to_its_last(name):
    """And a task's evaluation one more, however often tasks take turns."""
    torch._dynamo.reset()
    model, call, y = small(name)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    graphs = []
    for t in range(2):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with hatcl.learn(model, t, optimizer, steps=20) as learning:
            model.train()
            for _ in range(20):
                optimizer.zero_grad()
                (F.cross_entropy(call(compiled), y) + learning.penalty()).backward()
                optimizer.step()
            assert learning.settled
        graphs.append(counter.frame_count)
    model.eval()
    with torch.no_grad():
        for t in (0, 1, 0, 1, 1, 0):
            with hatcl.task(model, t):
                assert torch.equal(call(compiled), call(model))
    assert [*graphs, counter.frame_count] == [1, 2, 4]


def test_two_threads_with_one_compiled_model():
    torch._dynamo.reset()
    model = parts.pretend(parts.converted("mlp", 2))
    x = parts.images("mlp")
    compiled = torch.compile(model.eval(), backend="eager", fullgraph=True)
    want = [parts.logits(model, t, x) for t in (0, 1)]

    def serve(t):
        with torch.no_grad(), hatcl.task(model, t):
            return all(torch.equal(compiled(x), want[t]) for _ in range(20))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(serve, (0, 1))) == [True, True]
