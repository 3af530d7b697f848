"""One batch of several tasks."""

from __future__ import annotations

import border_parts as border
import parts
import pytest
import torch
from border_parts import X, out, train, two_tasks
from torch import nn

import hatcl


def test_each_row_has_its_task_bit_for_bit():
    model, _ = two_tasks()
    model.train()
    model[1].eval()
    ids = torch.tensor([0, 1, 1, 0] * 4)
    got = hatcl.forward(model, X, tasks=ids)
    assert model.training and not model[1].training and model.hat_gates.task is None
    for t in (0, 1):
        assert torch.equal(got[ids == t], out(model, t, X[ids == t]))
    assert torch.equal(hatcl.forward(model, (X,), ids.tolist()), got)


@pytest.mark.parametrize("name", ["mlp", "resnet", "vit"])
def test_all_tasks_in_one_forward(name):
    model = parts.pretend(parts.converted(name))
    x = parts.images(name, 12)
    ids = torch.tensor([0, 1, 2, 1] * 3)
    want, got = hatcl.forward(model, x, ids), hatcl.forward(model, x, ids, fused=True)
    # other kernels: measured 2e-7 of the largest
    assert float((want - got).abs().max() / want.abs().max()) < 1e-5
    assert not torch.equal(hatcl.forward(model, x, ids.flip(0), fused=True), got)


def test_all_tasks_of_a_language_model_in_one_forward():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    plain = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    )
    batch = {"input_ids": torch.randint(50, (4, 7)), "use_cache": False}
    model = parts.pretend(hatcl.convert(plain, 2, batch))
    want, got = (hatcl.forward(model, batch, [0, 1, 1, 0], fused=fused)["logits"] for fused in (False, True))
    assert float((want - got).abs().max() / want.abs().max()) < 1e-5


def test_models_that_cannot_be_fused():
    model = hatcl.convert(border.net(), 2, X, num_classes=[3, 5])
    for t in (0, 1):
        train(model, t)
    with pytest.raises(hatcl.TaskError, match=r"cannot compute tasks \[0, 1\] at once .*leave out fused"):
        hatcl.forward(model, X, [0, 1] * 8, fused=True)


def test_heads_of_different_widths_give_a_list_of_rows():
    model = hatcl.convert(border.net(), 2, X, num_classes=[3, 5])
    for t in (0, 1):
        train(model, t)
    ids = torch.tensor([1, 0] * 8)
    got = hatcl.forward(model, X, ids)
    assert [len(row) for row in got] == [5, 3] * 8
    assert torch.equal(torch.stack(got[::2]), out(model, 1, X[::2]))


@pytest.mark.parametrize(
    ("tasks", "text"),
    [
        (
            torch.zeros(3, dtype=torch.long),
            r"tasks: got shape \[3\], and inputs with 16 rows; pass one integer",
        ),
        (torch.zeros(16), r"tasks: got shape \[16\]"),
        ([0, True] * 8, "tasks: got 16 of them"),
        ([0, 2] * 8, "task 2 is not sealed"),
        ([0, 9] * 8, "the model has tasks 0 to 2"),
        ([], "tasks: got 0 of them"),
    ],
)
def test_tasks_that_do_not_fit(tasks, text):
    model, _ = two_tasks()
    with pytest.raises(hatcl.TaskError, match=text):
        hatcl.forward(model, X, tasks)


def test_an_output_without_rows():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = border.net()

        def forward(self, x):
            return self.body(x).mean(0)

    model = hatcl.convert(Mean(), 1, X)
    train(model, 0)
    with pytest.raises(hatcl.TaskError, match=r"for 16 rows of task 0 the model gives a tensor of shape \[3\]"):
        hatcl.forward(model, X, [0] * 16)
