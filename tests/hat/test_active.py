"""The active task belongs to the context: threads, asyncio, recomputation in backward."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import border_parts as border
import pytest
import torch
from border_parts import X, out, train, two_tasks
from torch import nn
from torch.utils.checkpoint import checkpoint

import hatcl
from hatcl.hat import active
from hatcl.hat.gates import gates_of


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
