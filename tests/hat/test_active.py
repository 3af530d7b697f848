"""The active task belongs to the context: threads, asyncio, recomputation in backward, one batch of several tasks."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import border_parts as border
import parts
import pytest
import torch
from border_parts import X, out, train
from torch import nn
from torch.utils.checkpoint import checkpoint

import hatcl
from hatcl.hat import active
from hatcl.hat.gates import gates_of


def two_tasks():
    model, first = border.learned()
    train(model, 1)
    hatcl.set_task(model, None)
    return model, [first, out(model, 1)]


def served_wrongly(model, want, rounds=60):
    wrong = []

    def serve(t):
        for _ in range(rounds):
            with hatcl.task(model, t), torch.no_grad():
                if not torch.equal(model(X), want[t]):
                    wrong.append(t)

    threads = [threading.Thread(target=serve, args=(t,)) for t in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


def test_two_threads_serve_two_tasks():
    assert served_wrongly(*two_tasks()) == []


def test_twin_with_one_attribute_of_the_model_they_answer_for_each_other(monkeypatch):
    @contextlib.contextmanager
    def on_the_model(keys, task):
        before = [(g, g._default) for g in gates]
        for g in gates:
            g.task = task
        yield
        for g, t in before:
            g.task = t

    model, want = two_tasks()
    gates = gates_of(model)
    monkeypatch.setattr(active, "choose", on_the_model)
    assert served_wrongly(model, want, 300)


def test_a_pool_and_the_default_of_all_threads():
    model, want = two_tasks()
    hatcl.set_task(model, 1)  # of every thread that chooses nothing

    def answer(t):
        with torch.no_grad():
            if t is None:
                return model(X)
            with hatcl.task(model, t):
                return model(X)

    asked = [0, None, 1, 0] * 10
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(answer, asked))
    assert all(torch.equal(y, want[1 if t is None else t]) for t, y in zip(asked, answers, strict=True))


def test_asyncio_tasks_keep_their_own():
    model, want = two_tasks()

    async def serve(t):
        right = True
        for _ in range(20):
            with hatcl.task(model, t):
                await asyncio.sleep(0)  # the other one runs
                right &= torch.equal(model(X), want[t])
        return right

    async def both():
        return await asyncio.gather(serve(0), serve(1))

    assert asyncio.run(both()) == [True, True]


def test_a_block_may_be_left_in_another_context():
    model, want = two_tasks()
    block = hatcl.task(model, 0)
    contextvars.copy_context().run(block.__enter__)
    with torch.no_grad():
        assert model.hat_gates.task is None
        block.__exit__(None, None, None)
        assert model.hat_gates.task is None
    with hatcl.task(model, 1), hatcl.task(model, 0):
        assert torch.equal(model(X), want[0])
    copied = copy.deepcopy(model)
    with hatcl.task(model, 0):
        assert copied.hat_gates.task is None  # a choice is for one model


def test_an_evaluation_thread_beside_training():
    model, want = border.learned()
    stop, wrong, steps = threading.Event(), [], []

    def evaluate():
        while not stop.is_set():
            with hatcl.task(model, 0), torch.no_grad():
                steps.append(torch.equal(model(X), want))

    optimizer = border.adamw(model)
    thread = threading.Thread(target=evaluate)
    with hatcl.learn(model, 1, optimizer, steps=60) as learning:
        thread.start()
        for _ in range(60):
            wrong.append(gates_of(model)[0].task != 1)
            optimizer.zero_grad()
            border.loss_of(model, 1, learning).backward()
            optimizer.step()
        stop.set()
        thread.join()
    assert not any(wrong) and steps and all(steps)


def test_twin_without_the_lock_the_thread_sees_the_middle_of_a_step(monkeypatch):
    """An optimizer that moves everything and waits: the other thread then reads what is not put back yet."""
    model, want = border.learned()
    seen = []

    class Slow(torch.optim.SGD):
        def step(self, closure=None):
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.add_(1.0)
            thread = threading.Thread(target=lambda: seen.append(torch.equal(out(model, 0), want)))
            thread.start()
            thread.join(0.5 if locked else None)
            waiting.append(thread)

    for locked in (True, False):
        waiting = []
        with hatcl.learn(model, 1, Slow(model.parameters(), lr=0.1), steps=1) as learning:
            border.loss_of(model, 1, learning).backward()
            if not locked:
                gates_of(model)[0].lock = None
            learning.guard.optimizers[0].step()
            for thread in waiting:
                thread.join()
        hatcl.forget_task(model, 1)
        want = out(model, 0)
    assert seen == [True, False]


def test_the_default_does_not_change_under_a_block_or_a_learning_thread():
    model, _ = two_tasks()
    with hatcl.task(model, 0), pytest.raises(hatcl.TaskError, match="inside a `with hatcl.task.*leave the block first"):
        hatcl.set_task(model, 1)
    with hatcl.task(model, 0), pytest.raises(hatcl.TaskError, match="learn: task 2 cannot be learned inside"):
        with hatcl.learn(model, 2, border.adamw(model), steps=1):
            pass
    with hatcl.task(model, 1), pytest.raises(hatcl.TaskError, match="task 1 is active in a `with hatcl.task"):
        hatcl.forget_task(model, 1)
    said = []

    def other():
        try:
            hatcl.set_task(model, 0)
        except hatcl.TaskError as error:
            said.append(str(error))

    optimizer = border.adamw(model)
    with hatcl.learn(model, 2, optimizer, steps=1) as learning:
        border.loss_of(model, 2, learning).backward()
        optimizer.step()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another thread is learning task 2" in said[0]


def test_data_parallel_is_refused():
    model, _ = two_tasks()
    with pytest.raises(hatcl.TaskError, match="use torch.nn.parallel.DistributedDataParallel"):
        model.hat_gates._replicate_for_data_parallel()


# ---- activation checkpointing -------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.body, self.head, self.reentrant = border.net()[:5], nn.Linear(24, 3), reentrant
        self.on = False

    def forward(self, x):
        y = checkpoint(self.body, x, use_reentrant=self.reentrant) if self.on else self.body(x)
        return self.head(y)


def gradient(model, on, training, other=1):
    """Of task 0's output, with another task active in backward."""
    model.on = on
    x = X.clone().requires_grad_()
    model.train(training)
    with hatcl.task(model, 0):
        loss = model(x).sum()
    with hatcl.task(model, other):
        model.zero_grad()
        loss.backward()
    return x.grad


@pytest.fixture(params=[False, True], ids=["saved tensors", "reentrant"])
def checkpointed(request):
    model = hatcl.convert(Checkpointed(request.param), 2, X)
    for t in range(2):
        train(model, t)
    return model


def test_recomputation_has_the_task_of_its_forward(checkpointed):
    assert torch.equal(gradient(checkpointed, True, True), gradient(checkpointed, False, True))
    if not checkpointed.reentrant:
        assert torch.equal(gradient(checkpointed, True, False), gradient(checkpointed, False, False))


def test_a_forward_whose_task_cannot_be_told_is_refused():
    """The reentrant form in evaluation: nothing tells it from a plain evaluation without gradients."""
    model = hatcl.convert(Checkpointed(True), 2, X)
    for t in range(2):
        train(model, t)
    with pytest.raises(hatcl.TaskError, match="hatcl cannot tell under which task .* use_reentrant=False"):
        gradient(model, True, False)


def test_twin_with_the_active_task_the_gradient_is_anothers(checkpointed, monkeypatch):
    want = gradient(checkpointed, False, True)
    monkeypatch.setattr(active, "of_forward", lambda key, task, training: task)
    assert not torch.equal(gradient(checkpointed, True, True), want)


def test_nested_regions_and_two_forwards_in_one_backward():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.on = border.net()[:3], nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)), 0

        def inner(self, h):
            return checkpoint(self.b, h, use_reentrant=False)

        def forward(self, x):
            if not self.on:
                return self.b(self.a(x))
            return checkpoint(lambda v: self.inner(self.a(v)), x, use_reentrant=False)

    model = hatcl.convert(Nested(), 2, X)
    for t in range(2):
        train(model, t)

    def both(on):
        model.on = on
        x = X.clone().requires_grad_()
        with hatcl.task(model, 0):
            first = model(x).sum()
        with hatcl.task(model, 1):
            second = model(x).pow(2).sum()
        (first + second).backward()
        return x.grad

    assert torch.allclose(both(1), both(0), atol=1e-6)  # sums in another order; measured 2e-7


# ---- one batch of several tasks -----------------------------------------------------------------------------------


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
