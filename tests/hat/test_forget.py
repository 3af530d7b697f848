"""Forgetting (M8): what only one task used is gone, everything else stays bit for bit."""

from __future__ import annotations

import copy
import dataclasses

import parts
import pytest
import torch
from torch.nn import functional as tf

import hatcl
from hatcl.hat.digests import task_digests
from hatcl.hat.gates import gates_of
from hatcl.hat.held import held, own_buffers
from hatcl.hat.layers.gated import HATLayer

CLASSES = 8


def problem(name, task, seed=0, count=64):
    """Eight classes: the same patterns of a task under other noise per seed."""
    shape = parts.shape_of(name)
    generator = torch.Generator().manual_seed(300 + task)
    pattern = torch.randn(CLASSES, *shape, generator=generator)
    y = torch.arange(count) % CLASSES
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(1000 * task + seed))
    return pattern[y] + 0.3 * noise, y


def accuracy(model, task, data):
    x, y = data
    return float((parts.logits(model, task, x).argmax(-1) == y).float().mean())


def train(model, task, data, steps=40):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return parts.train(model, task, optimizer, data, steps)


def only_in_one(model):
    """Name -> which shared elements are live for task 1 and for no other."""
    shared = [h for h in held(model) if h.task is None and not h.plain]
    return {h.name: h.live(1) & ~h.live(0) & ~h.live(2) for h in shared}


BUILDERS = {
    "mlp": lambda: parts.mlp(width=64),
    "resnet": lambda: parts.resnet(channels=(16, 24, 24, 32)),
    "vit": lambda: parts.vit(embed_dim=48, num_heads=4),
}


@pytest.fixture(scope="module", params=BUILDERS)
def three_tasks(request):
    """Name and a model that has learned three tasks of eight classes each."""
    name = request.param
    torch.manual_seed(0)
    source = BUILDERS[name]()
    x, _ = problem(name, 0)
    model = hatcl.convert(source, 3, x, num_classes=[CLASSES] * 3, config={"reuse": "none", "init": "sparse"})
    torch.manual_seed(0)
    for t in range(3):
        with torch.no_grad():  # a third of the units each, so that all three learn
            e = gates_of(model)[0].embeddings[t]
            e.copy_(torch.where(torch.arange(len(e)) % 3 == t, 2.0, -2.0))
        train(model, t, problem(name, t))
    return name, model


@pytest.fixture
def learned(three_tasks):
    name, model = three_tasks
    return name, copy.deepcopy(model)


def test_all_three_were_learned(learned):
    name, model = learned
    for t in range(3):
        assert accuracy(model, t, problem(name, t, seed=1)) > 0.8


def test_the_task_is_gone_and_the_others_are_bit_equal(learned):
    name, model = learned
    x, _ = problem(name, 1, seed=1)
    want = {t: parts.logits(model, t, x) for t in (0, 2)}
    digests = {t: task_digests(model, t) for t in (0, 2)}
    report = hatcl.forget_task(model, 1)
    assert report.total_erased > 0 and report.units_freed > 0 and not report.dry_run
    assert hatcl.tasks(model) == [0, 2]
    assert all(torch.equal(parts.logits(model, t, x), want[t]) for t in want)
    assert {t: task_digests(model, t) for t in (0, 2)} == digests
    assert hatcl.certify(model, x, strict=True).exact
    with pytest.raises(hatcl.TaskError, match="task 1 is not sealed"):
        hatcl.set_task(model, 1)
    assert not bool(gates_of(model)[0].masks[1].any())


@torch.no_grad()
def put_back(model, kept):
    """What an attacker kept of the forgotten task 1: its gates, copies and statistics."""
    g, old = gates_of(model)[0], gates_of(kept)[0]
    g.masks[1], g.sealed[1] = old.masks[1], True
    g.epoch += 1
    for a, b in zip(held(model), held(kept), strict=True):
        if a.task == 1:
            a.param.copy_(b.param)
    for (_, a), (_, b) in zip(own_buffers(model, 1), own_buffers(kept, 1), strict=True):
        a.copy_(b)


def test_an_attacker_with_the_old_gates_head_and_norms_is_at_chance(learned):
    """They are put back as they were. What looks _hat_redrawn may also be set to zero or scaled."""
    name, model = learned
    kept = copy.deepcopy(model)
    data = problem(name, 1, seed=1)
    known = accuracy(model, 1, data)
    scores = []
    for seed in range(3):
        torch.manual_seed(seed)
        attacked = copy.deepcopy(model)
        plan = {h.name: h.live(1) & ~h.live(0) & ~h.live(2) for h in held(model) if h.task is None and not h.plain}
        hatcl.forget_task(attacked, 1)
        put_back(attacked, kept)
        scores.append(accuracy(attacked, 1, data))
        for factor in (0.0, 0.05, 20.0):
            with torch.no_grad():
                trial = copy.deepcopy(attacked)
                for h in held(trial):
                    if h.name in plan:
                        h.param[plan[h.name]] *= factor
            scores.append(accuracy(trial, 1, data))
    # chance is 1/8; with 64 pictures and classes whole patterns, a random network's scores spread by 0.1
    assert known > 0.8
    assert sum(scores) / len(scores) < 0.3, scores


def test_twin_without_redrawing_the_attacker_has_it_all_back(learned, monkeypatch):
    name, model = learned
    data = problem(name, 1, seed=1)
    kept = copy.deepcopy(model)

    def as_it_was(self, shapes=None):
        params = {n: p.detach() for n, p in self._parameters.items() if p is not None}
        return params if shapes is None else {n: params[n].new_zeros(shape) for n, shape in shapes.items()}

    monkeypatch.setattr(HATLayer, "_hat_redrawn", as_it_was)
    hatcl.forget_task(model, 1)
    put_back(model, kept)
    assert accuracy(model, 1, data) == accuracy(kept, 1, data)


def test_a_dry_run_reports_exactly_what_a_run_erases(learned):
    name, model = learned
    before = parts.snapshot(model)
    plan = hatcl.forget_task(model, 1, dry_run=True)
    assert plan.dry_run and parts.same(before, parts.snapshot(model))
    live = only_in_one(model)
    assert plan.erased == {n: int(m.sum()) for n, m in live.items() if m.any()}
    report = hatcl.forget_task(model, 1)
    assert (report.erased, report.kept, report.own, report.units_freed) == (
        plan.erased, plan.kept, plan.own, plan.units_freed)  # fmt: skip
    state = model.state_dict()
    for n, mask in live.items():
        moved = state[n] != before[n]
        assert not bool((moved & ~mask).any()), n
        if state[n].dim() > 1:  # an initialiser may set a bias to the zero that it was
            assert torch.equal(moved, mask), n


def test_redrawn_elements_have_the_spread_of_the_layers_initialiser(learned):
    """No louder than a new layer's: noise twenty times the weights' size can be told apart and zeroed."""
    name, model = learned
    torch.manual_seed(0)
    fresh = BUILDERS[name]().state_dict()
    masks = only_in_one(model)
    hatcl.forget_task(model, 1)
    state, seen = model.state_dict(), 0
    for n, mask in masks.items():
        if int(mask.sum()) > 500 and n in fresh:
            ratio = float(state[n][mask].std() / fresh[n].std())
            seen += 1
            assert 0.2 < ratio < 5, (n, ratio)
    assert seen


def test_the_room_can_be_learned_again(learned):
    name, model = learned
    x, _ = problem(name, 1)
    hatcl.forget_task(model, 1)
    want = {t: parts.logits(model, t, x) for t in (0, 2)}
    with torch.no_grad():
        e = gates_of(model)[0].embeddings[1]
        e.copy_(torch.where(torch.arange(len(e)) % 3 == 1, 2.0, -2.0))
    train(model, 1, problem(name, 7))
    assert accuracy(model, 1, problem(name, 7, seed=1)) > 0.6  # chance is 1/8
    assert all(torch.equal(parts.logits(model, t, x), want[t]) for t in want)


@pytest.mark.parametrize("name", parts.MODELS)
def test_what_other_tasks_hold_stays(name):
    """Gates that overlap: every element that a remaining task uses is left as it is, and counted."""
    model = parts.pretend(parts.converted(name), share=0.7)
    x = parts.images(name)
    want = {t: parts.logits(model, t, x) for t in (0, 2)}
    live = {h.name: (h.live(1), h.live(0) | h.live(2)) for h in held(model) if h.task is None and not h.plain}
    report = hatcl.forget_task(model, 1)
    assert report.kept == sum(int((a & b).sum()) for a, b in live.values()) > 0
    assert report.total_erased == sum(int((a & ~b).sum()) for a, b in live.values())
    assert 0 < report.share_kept < 1
    assert all(torch.equal(parts.logits(model, t, x), want[t]) for t in want)
    report = hatcl.forget_task(model, 0)
    assert torch.equal(parts.logits(model, 2, x), want[2])
    last = hatcl.forget_task(model, 2)
    assert last.kept == 0 and last.share_kept == 0 and hatcl.tasks(model) == []


@pytest.mark.parametrize("active", [0, 1, 2, None])
def test_the_active_task(active):
    model = parts.pretend(parts.converted("mlp"))
    hatcl.set_task(model, active)
    hatcl.forget_task(model, 1)
    assert gates_of(model)[0].task == (None if active == 1 else active)


def test_a_report_in_words_and_numbers():
    model = parts.pretend(parts.converted("mlp"))
    plan = hatcl.forget_task(model, 1, dry_run=True)
    assert str(plan).startswith("task 1: would erase ") and "units are free again" in str(plan)
    report = hatcl.forget_task(model, 1)
    assert str(report).startswith("task 1: erased ")
    assert report.to_dict()["total_erased"] == report.total_erased == sum(report.erased.values())


def test_layers_by_hand_forget_too():
    first = hatcl.HATLinear(12, 16, num_tasks=3)
    norm = hatcl.TaskIndexedBatchNorm1d(16, units=first)
    model = torch.nn.Sequential(first, norm, torch.nn.ReLU(), hatcl.TaskIndexedLinear(16, parts.CLASSES, reads=first))
    for t in range(3):
        parts.train(model, t, torch.optim.AdamW(model.parameters(), 1e-2), parts.problem((12,), t), 6)
    x = parts.problem((12,), 0)[0]
    want = {t: parts.logits(model, t, x) for t in (0, 2)}
    assert hatcl.forget_task(model, 1).units_freed >= 0
    assert all(torch.equal(parts.logits(model, t, x), want[t]) for t in want)
    assert torch.equal(norm.hat_tasks[1].running_mean, torch.zeros(16))


@pytest.mark.parametrize("run", [lambda m: hatcl.forget_task(m, 1), lambda m: hatcl.forget_task(m, 9)])
def test_tasks_that_cannot_be_forgotten(run):
    model = parts.pretend(parts.converted("mlp"), tasks=[0])
    before = parts.snapshot(model)
    with pytest.raises(hatcl.TaskError):
        run(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with hatcl.learn(model, 1, optimizer, steps=1):
        with pytest.raises(hatcl.TaskError, match="task 1 is being learned; .* before forgetting task 0"):
            hatcl.forget_task(model, 0)
        assert parts.same(before, parts.snapshot(model))
        tf.cross_entropy(model(parts.images("mlp")), torch.zeros(8, dtype=torch.long)).backward()
        optimizer.step()


# ---- nothing is left ----------------------------------------------------------------------------------------------


def tensors_in(x, seen):
    """Every tensor that can be reached from an object."""
    if id(x) in seen:
        return
    seen.add(id(x))
    if isinstance(x, torch.Tensor):
        yield x
        if x.grad is not None:
            yield x.grad
    elif isinstance(x, dict):
        for v in x.values():
            yield from tensors_in(v, seen)
    elif isinstance(x, (list, tuple, set)):
        for v in x:
            yield from tensors_in(v, seen)
    elif hasattr(x, "__dict__") and not isinstance(x, type):
        yield from tensors_in(vars(x), seen)


def left_over(model, secrets):
    """Which of some values can still be found in the model, as a run of numbers in a tensor of any shape."""
    every = [t.detach().flatten() for t in tensors_in(model, set()) if t.numel() > 3]
    return [s for s in secrets if any(bool(torch.isin(s, t.to(s.dtype)).all()) for t in every)]


def learned_and_served(model):
    model = parts.pretend(model, tasks=[0, 1])
    x = parts.images("mlp")
    for t in (0, 1, 1):
        parts.logits(model, t, x)  # fills what layers keep
    for p in model.parameters():
        p.grad = p.detach().clone()
    live = {h.name: h.param.detach()[h.live(1) & ~h.live(0)] for h in held(model) if h.task is None and not h.plain}
    return model, [v for v in live.values() if v.numel() > 3]


def test_no_cache_and_no_gradient_keeps_what_was_erased():
    model, secrets = learned_and_served(parts.converted("mlp"))
    assert len(left_over(model, secrets)) == len(secrets) > 0
    gates = [model.hat_gates.masks[1].clone()]
    hatcl.forget_task(model, 1)
    assert left_over(model, secrets) == []
    units = {
        id(a.units): a.units
        for m in model.modules()
        if (h := m.__dict__.get("_hat"))
        for p in h.params.values()
        for a in p.axes
    }
    assert all(u._known[0] is None for u in units.values()) and not torch.equal(model.hat_gates.masks[1], gates[0])


def test_twin_with_caches_left_it_can_be_read(monkeypatch):
    from hatcl.hat.binding import Binding

    monkeypatch.setattr(Binding, "clear", lambda self: None)
    model, secrets = learned_and_served(parts.converted("mlp"))
    hatcl.forget_task(model, 1)
    assert left_over(model, secrets)


class Complex(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(8, 16)
        self.filter = torch.nn.Parameter(torch.randn(16, dtype=torch.complex64))
        self.b = torch.nn.Linear(16, 3)

    def forward(self, x):
        return self.b(torch.view_as_real(self.a(x) * self.filter).sum(-1))


def test_a_complex_parameter_is_forgotten_like_others():
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    model = parts.pretend(hatcl.convert(Complex(), 3, x), tasks=[0, 1])
    want, before = parts.logits(model, 0, x), model.a._parameters["weight"].detach().clone()
    hatcl.forget_task(model, 1)
    assert hatcl.tasks(model) == [0] and torch.equal(parts.logits(model, 0, x), want)
    assert not torch.equal(model.a._parameters["weight"], before) and hatcl.certify(model, x).exact


def test_a_draw_that_fails_leaves_everything_as_it_was(monkeypatch):
    model = parts.pretend(parts.converted("mlp"), tasks=[0, 1])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain, calls = HATLayer._hat_redrawn, []

    def second_fails(self, shapes=None):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("an initialiser of the user's")
        return plain(self, shapes)

    monkeypatch.setattr(HATLayer, "_hat_redrawn", second_fails)
    with pytest.raises(RuntimeError, match="an initialiser"):
        hatcl.forget_task(model, 1)
    assert hatcl.tasks(model) == [0, 1]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---- tasks that are not locked -------------------------------------------------------------------------------------


def test_tasks_that_are_not_locked_lose_what_they_share():
    model = parts.pretend(parts.converted("mlp", 3))
    x = parts.images("mlp")
    want = {t: parts.logits(model, t, x) for t in range(3)}
    whole, some = hatcl.forget_task(model, 1, dry_run=True), hatcl.forget_task(model, 1, locked=[2], dry_run=True)
    assert whole.changed == () and some.changed == (0,)
    assert some.total_erased > whole.total_erased and some.kept < whole.kept
    assert hatcl.forget_task(model, 1, locked=[], dry_run=True).kept == 0
    report = hatcl.forget_task(model, 1, locked=[2])
    assert dataclasses.replace(report, dry_run=True) == some and "takes elements away from task 0, not locked" in str(
        report
    )
    assert torch.equal(parts.logits(model, 2, x), want[2]) and not torch.equal(parts.logits(model, 0, x), want[0])
    assert hatcl.certify(model, x, strict=True).exact  # task 0 is sealed as what is left of it


@pytest.mark.parametrize(
    "locked, text",
    [
        ([1], "with task 1, which is to be forgotten"),
        ([5], "got 5, the model has tasks 0 to 2"),
        ([2], "task 2 is not sea"),
    ],
)
def test_locked_tasks_must_be_others_that_are_sealed(locked, text):
    model = parts.pretend(parts.converted("mlp", 3), [0, 1])
    before = parts.snapshot(model)
    with pytest.raises(hatcl.TaskError, match=text):
        hatcl.forget_task(model, 1, locked=locked)
    assert parts.same(before, parts.snapshot(model))
