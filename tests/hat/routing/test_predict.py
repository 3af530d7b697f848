"""Prediction without being told the task."""

from __future__ import annotations

from collections import UserDict
from concurrent.futures import ThreadPoolExecutor

import parts
import pytest
import torch
from torch import nn

import hatcl
from hatcl.errors import ConfigError

WIDTHS = [4, 2, 3]


def data(task, shape, count=48):
    return parts.problem(shape, task, count, WIDTHS[task])


def learned(name="mlp", tasks=3):
    """Three tasks with heads of different widths, learned, and their router."""
    shape = parts.shape_of(name)
    torch.manual_seed(0)
    model = hatcl.convert(parts.plain(name), 3, parts.images(name, 2), num_classes=WIDTHS)
    router = hatcl.TaskRouter(model, {"width": 48})
    for t in range(tasks):
        parts.train(model, t, torch.optim.Adam(model.parameters(), lr=1e-2), data(t, shape), steps=15)
        router.add_task(t, *data(t, shape))
    return model, router


class _Shared(nn.Module):
    """A model whose second input is the same for all rows."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        return self.model(x + y)


@pytest.fixture(scope="module")
def sealed():
    return learned()


SHAPE = parts.shape_of("mlp")
X = torch.cat([data(t, SHAPE)[0] for t in range(3)])
TASK = torch.arange(3).repeat_interleave(48)
LABEL = torch.cat([data(t, SHAPE)[1] for t in range(3)])


def test_the_answer(sealed):
    model, router = sealed
    model.train()
    model[1].eval()
    p = hatcl.predict(model, X, router=router)
    assert model.training and not model[1].training
    assert p.task.dtype == p.label.dtype == torch.int64 and p.rejected.dtype == torch.bool
    assert p.tasks == [0, 1, 2] and p.task_probability.shape == (len(X), 3)
    assert float(((p.task == TASK) & (p.label == LABEL)).float().mean()) > 0.9
    for i in range(0, len(X), 17):  # argmax over t and c of P(t|x) softmax(z_t(x))_c
        best = max(
            (float(p.task_probability[i, t]) * float(q), t, c)
            for t in range(3)
            for c, q in enumerate(parts.logits(model, t, X)[i].softmax(0))
        )
        assert (int(p.task[i]), int(p.label[i])) == best[1:] and abs(float(p.probability[i]) - best[0]) < 1e-6


@pytest.mark.parametrize("top", [1, 2, 7])
def test_only_the_likeliest_tasks_are_run(sealed, top):
    model, router = sealed
    ran = []
    seen = router.seen
    router.seen = lambda model, x, task, rows=None: (ran.append((task, len(x))), seen(model, x, task, rows))[1]
    try:
        p = hatcl.predict(model, X, router=router, top=top)
    finally:
        del router.seen
    k = min(top, 3)
    assert ran[0] == (0, len(X)) and sum(rows for _, rows in ran[1:]) == k * len(X)
    once = router.at_first_sight(seen(model, X, 0)[0])
    assert torch.equal(p.task_probability, once.float())
    joint = torch.cat([once[:, t : t + 1] * parts.logits(model, t, X).double().softmax(1) for t in range(3)], 1)
    owner = torch.cat([torch.full((width,), t) for t, width in enumerate(WIDTHS)])
    allowed = (once.topk(k, 1).indices.unsqueeze(2) == owner).any(1)
    want = joint.where(allowed, 0.0).max(1)
    assert torch.equal(p.task, owner[want.indices])
    assert torch.allclose(p.probability.double(), want.values, atol=1e-6)  # measured 1e-7: batches of other sizes
    assert float(((p.task == TASK) & (p.label == LABEL)).float().mean()) > 0.8


def test_a_number_of_tasks_that_does_not_fit(sealed):
    with pytest.raises(ConfigError, match="top: got 0"):
        hatcl.predict(sealed[0], X, router=sealed[1], top=0)


def test_rows_of_what_a_tokenizer_gives_are_told_apart(sealed):
    """A `BatchEncoding` is a `UserDict`, into which torch does not look."""
    model, router = sealed
    want = hatcl.predict(model, X, router=router, top=1)
    got = hatcl.predict(model, UserDict(input=X), router=router, top=1)
    assert len(set(want.task.tolist())) == 3 and torch.equal(got.probability, want.probability)
    rows = hatcl.forward(model, X, want.task)
    again = hatcl.forward(model, UserDict(input=X), want.task)
    assert all(torch.equal(a, b) for a, b in zip(rows, again, strict=True))


def test_an_input_that_all_rows_share_is_no_batch(sealed):
    model, router = sealed
    with pytest.raises(ConfigError, match="top: got inputs with 1, 144 rows, expected tensors that all have a row per"):
        hatcl.predict(_Shared(model), (X, torch.zeros(1)), router=router, top=1)


def test_a_model_that_is_learning_answers_too(sealed):
    model, router = learned(tasks=2)
    want = hatcl.predict(model, X, router=router)
    optimizer = torch.optim.Adam(model.parameters())
    with hatcl.learn(model, 2, optimizer, 2) as learning:
        for _ in range(2):
            got = hatcl.predict(model, X, router=router)
            assert torch.equal(got.task_probability, want.task_probability) and model.hat_gates.task == 2
            optimizer.zero_grad()
            (model(X).square().mean() + learning.penalty()).backward()
            optimizer.step()
    with pytest.raises(hatcl.TaskError, match=r"predict: task 2 is sealed and not in the router, which has \[0, 1\]"):
        hatcl.predict(model, X, router=router)
    again = hatcl.predict(model, X, router=router, among=[0, 1])
    assert torch.equal(again.probability, want.probability) and torch.equal(again.label, want.label)


def test_earlier_answers_are_had_again_bit_for_bit():
    model, router = learned(tasks=1)
    then = {}
    for t in (1, 2):
        then[t] = hatcl.predict(model, X, router=router)
        parts.train(model, t, torch.optim.Adam(model.parameters(), lr=1e-2), data(t, SHAPE), steps=5)
        router.add_task(t, *data(t, SHAPE))
    for k, was in then.items():
        now = hatcl.predict(model, X, router=router, among=range(k))
        assert all(torch.equal(getattr(now, n), getattr(was, n)) for n in ("task", "label", "probability", "rejected"))
        everything = hatcl.predict(model, X, router=router)
        assert not torch.equal(everything.probability, was.probability)


def test_rejection(sealed):
    model, router = sealed
    free = hatcl.predict(model, X, router=router)
    theta = float(free.task_probability.max(1).values.median())
    strict = hatcl.TaskRouter(model, {"width": 48, "threshold": theta})
    for t in range(3):
        strict.add_task(t, *data(t, SHAPE))
    p = hatcl.predict(model, X, router=strict)
    assert not free.rejected.any() and 60 < int(p.rejected.sum()) < 84  # half of 144
    assert float(p.task_probability[p.rejected].max()) <= theta + 1e-6
    assert torch.equal(p.task, free.task)


def test_a_forgotten_task_is_refused_then_taken_out():
    model, router = learned()
    without = hatcl.predict(model, X, router=router, among=[0, 2])
    hatcl.forget_task(model, 1)
    with pytest.raises(hatcl.TaskError, match="task 1 is in the router and not sealed in the model: it was forgotten"):
        hatcl.predict(model, X, router=router)
    router.remove_task(1)
    got = hatcl.predict(model, X, router=router)
    assert torch.equal(got.probability, without.probability) and 1 not in got.task


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_other_models(name):
    model, router = learned(name)
    shape = parts.shape_of(name)
    x = torch.cat([data(t, shape, 12)[0] for t in range(3)])
    p = hatcl.predict(model, (x,), router=router)
    right = torch.arange(3).repeat_interleave(12)
    assert float((p.task == right).float().mean()) > 0.5  # chance 1/3
    assert torch.equal(hatcl.predict(model, (x,), router=router).probability, p.probability)


def test_threads(sealed):
    model, router = sealed
    model.eval()
    want = hatcl.predict(model, X, router=router)
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda _: hatcl.predict(model, X, router=router), range(8)))
    assert all(torch.equal(p.probability, want.probability) for p in got)


def test_a_compiled_model(sealed):
    model, router = sealed
    compiled = torch.compile(model, backend="eager")
    want = hatcl.predict(model, X, router=router)
    assert torch.equal(hatcl.predict(compiled, X, router=router).probability, want.probability)


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (X[:, :, :2], "task 0: the model does not take these inputs"),
        (X / 0, "its features of these inputs are not fin"),
    ],
)
def test_inputs_that_do_not_fit(sealed, x, text):
    model, router = sealed
    with pytest.raises(ConfigError, match=text):
        hatcl.predict(model, x, router=router)


def test_an_answer_per_place_is_refused():
    x = torch.randn(4, 5, 6)
    model = parts.pretend(hatcl.convert(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), 1, x))
    router = hatcl.TaskRouter(model, {"width": 8})
    with pytest.raises(
        ConfigError, match=r"features \[4, 8\] and logits \[4, 5, 3\], expected .* one answer per example"
    ):
        router.add_task(0, x, torch.arange(4) % 3)
