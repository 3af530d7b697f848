"""The block in which a task is learned: what it changes, when it seals, and that leaving it early changes nothing."""

from __future__ import annotations

import contextlib
import copy
import pickle

import parts
import pytest
import torch
from torch import nn
from torch.nn import functional as tf
from torch.utils._python_dispatch import TorchDispatchMode

import hatcl
from hatcl.hat.digests import task_digests
from hatcl.hat.gates import Gates, gates_of
from hatcl.hat.held import held, own_buffers


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)


@pytest.fixture(params=parts.MODELS)
def name(request):
    return request.param


@pytest.fixture
def after_one(name):
    model = parts.converted(name)
    optimizer = adamw(model)
    parts.train(model, 0, optimizer, parts.problem(parts.shape_of(name), 0), 5)
    return model, optimizer


def steps_of(model, learning, optimizer, data, count):
    x, y = data
    for _ in range(count):
        loss = tf.cross_entropy(model(x), y) + learning.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# ---- sealing --------------------------------------------------------------------------------------


def test_leaving_the_block_seals(name):
    model = parts.converted(name)
    assert hatcl.tasks(model) == []
    parts.train(model, 1, adamw(model), parts.problem(parts.shape_of(name), 1), 4)
    g = gates_of(model)[0]
    assert hatcl.tasks(model) == [1] and g.learning is None and g.task == 1
    assert torch.equal(g.masks[1], g.embeddings[1] > 0)
    assert set(g.digests) == {1}


def test_tasks_may_come_in_any_order(name):
    model = parts.converted(name)
    optimizer = adamw(model)
    x, want = parts.images(name), {}
    for t in (2, 0, 1):
        parts.train(model, t, optimizer, parts.problem(parts.shape_of(name), t), 4)
        want[t] = parts.logits(model, t, x)
        assert all(torch.equal(parts.logits(model, e, x), want[e]) for e in want)
    assert hatcl.tasks(model) == [0, 1, 2]


def test_hardened_logits_are_those_of_evaluation_before_sealing(name):
    model = parts.converted(name)
    x = parts.images(name)
    optimizer = adamw(model)
    with hatcl.learn(model, 0, optimizer, steps=4) as learning:
        steps_of(model, learning, optimizer, parts.problem(parts.shape_of(name), 0), 4)
        model.eval()
        with torch.no_grad():
            before = model(x)
        model.train()
    assert torch.equal(parts.logits(model, 0, x), before)


def test_the_settled_steps_leave_the_gates_alone(name):
    model = parts.converted(name, settle=0.5)
    optimizer = adamw(model)
    data = parts.problem(parts.shape_of(name), 0)
    with hatcl.learn(model, 0, optimizer, steps=10) as learning:
        steps_of(model, learning, optimizer, data, 5)
        held = gates_of(model)[0].embeddings[0].detach().clone()
        x, _ = data
        model.train()
        steps_of(model, learning, optimizer, data, 5)
        assert torch.equal(gates_of(model)[0].embeddings[0], held)
        gate = next(u for m in model.modules() if (u := getattr(m, "_hat", None)) and u.params).gates
        assert set(gate.select(0, slice(None)).unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(gates_of(model)[0].masks[0], held > 0)


# ---- the scale ------------------------------------------------------------------------------------


def scales_of(model, steps, count=None, **options):
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    seen = []
    with hatcl.learn(model, options.pop("task", 0), optimizer, steps, **options) as learning:
        for _ in range(count or steps):
            seen.append(learning.scale)
            optimizer.step()
    return seen


def test_the_scale_follows_the_steps():
    seen = scales_of(parts.converted("mlp", settle=0.0), 11)
    assert seen == pytest.approx([hatcl.functional.scale_at(b, 11, 400.0) for b in range(11)])
    assert seen[0] == pytest.approx(1 / 400) and seen[-1] == 400


@pytest.mark.parametrize("options, epochs", [({"cycles": None}, 3), ({"cycles": 3}, 1)])
def test_the_scale_is_annealed_once_per_cycle(options, epochs):
    seen = scales_of(parts.converted("mlp", settle=0.0, **options), 12, epochs=epochs)
    assert seen == pytest.approx([hatcl.functional.scale_at(b % 4, 4, 400.0) for b in range(12)])


def test_an_interrupted_task_goes_on_where_it_was():
    """Half a task, its state saved, the other half with `start=`: the same weights as in one go."""
    data = parts.problem(parts.shape_of("resnet"), 0)
    whole = parts.converted("resnet")
    optimizer = adamw(whole)
    with hatcl.learn(whole, 0, optimizer, steps=8) as learning:
        steps_of(whole, learning, optimizer, data, 8)
    halves = parts.converted("resnet")
    optimizer = adamw(halves)
    with pytest.raises(InterruptedError), hatcl.learn(halves, 0, optimizer, steps=8) as learning:
        steps_of(halves, learning, optimizer, data, 3)
        state = copy.deepcopy((halves.state_dict(), optimizer.state_dict()))
        raise InterruptedError
    again = parts.converted("resnet")
    again.load_state_dict(state[0])
    optimizer = adamw(again)
    optimizer.load_state_dict(state[1])
    with hatcl.learn(again, 0, optimizer, steps=8, start=3) as learning:
        steps_of(again, learning, optimizer, data, 5)
    assert parts.same(parts.snapshot(whole), parts.snapshot(again))


def test_more_steps_than_said_stay_at_the_last_scale():
    assert scales_of(parts.converted("mlp"), 4, 7)[-3:] == [400, 400, 400]


# ---- leaving early --------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_seals_nothing_and_leaves_earlier_tasks(after_one, name, error):
    model, optimizer = after_one
    x = parts.images(name)
    want = parts.logits(model, 0, x)
    frozen = task_digests(model, 0)
    hatcl.set_task(model, 0)
    step = optimizer.step
    with pytest.raises(error), hatcl.learn(model, 1, optimizer, steps=6) as learning:
        steps_of(model, learning, optimizer, parts.problem(parts.shape_of(name), 1), 3)
        raise error("in the middle")
    g = gates_of(model)[0]
    assert hatcl.tasks(model) == [0] and g.learning is None and g.task == 0 and not bool(g.masks[1].any())
    assert optimizer.step == step and all(not p._post_accumulate_grad_hooks for p in model.parameters())
    assert torch.equal(parts.logits(model, 0, x), want) and task_digests(model, 0) == frozen
    assert hatcl.certify(model, x).exact
    parts.train(model, 1, optimizer, parts.problem(parts.shape_of(name), 1), 5)  # and again
    assert hatcl.tasks(model) == [0, 1] and torch.equal(parts.logits(model, 0, x), want)


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(after_one, name, what):
    model, optimizer = after_one
    x = parts.images(name)
    want = parts.logits(model, 0, x)
    images, y = parts.problem(parts.shape_of(name), 1)
    with pytest.raises(
        hatcl.NonFiniteLossError,
        match="task 1: .* no longer finite.* earlier tasks are as they were; lower the learning rate, clip gradients",
    ):
        with hatcl.learn(model, 1, optimizer, steps=6) as learning:
            for step in range(6):
                loss = tf.cross_entropy(model(images), y) * (what if step == 2 else 1) + learning.penalty()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    assert hatcl.tasks(model) == [0]
    assert torch.equal(parts.logits(model, 0, x), want)
    assert all(bool(torch.isfinite(v).all()) for v in model.state_dict().values() if v.is_floating_point())
    assert hatcl.certify(model, x).exact
    parts.train(model, 2, adamw(model), parts.problem(parts.shape_of(name), 2), 5)
    assert torch.equal(parts.logits(model, 0, x), want) and hatcl.tasks(model) == [0, 2]


def test_a_task_that_was_stopped_by_nan_can_be_learned_afterwards(after_one, name):
    model, optimizer = after_one
    images, y = parts.problem(parts.shape_of(name), 1)
    before = {h.name: h.param.detach().clone() for h in held(model)}
    with pytest.raises(hatcl.NonFiniteLossError):
        with hatcl.learn(model, 1, optimizer, steps=6):
            (tf.cross_entropy(model(images), y) * float("nan")).backward()
            optimizer.step()
    assert all(torch.equal(h.param, before[h.name]) for h in held(model))  # the step was not taken
    optimizer.zero_grad()
    losses = parts.train(model, 1, optimizer, (images, y), 6)  # nor did the optimizer see it
    assert min(losses[-2:]) < max(losses[:2])


def test_a_batch_that_is_not_finite(after_one, name):
    """It reaches the running statistics before the loss is known; they start anew."""
    model, optimizer = after_one
    want = parts.logits(model, 0, parts.images(name))
    images, y = parts.problem(parts.shape_of(name), 1)
    with pytest.raises(hatcl.NonFiniteLossError):
        with hatcl.learn(model, 1, optimizer, steps=6):
            tf.cross_entropy(model(images * float("inf")), y).backward()
            optimizer.step()
    assert all(bool(torch.isfinite(v).all()) for v in model.state_dict().values() if v.is_floating_point())
    assert all(bool((b > 0).all()) for n, b in own_buffers(model, 1) if n.endswith("running_var"))
    assert torch.equal(parts.logits(model, 0, parts.images(name)), want)
    optimizer.zero_grad()
    losses = parts.train(model, 1, optimizer, (images, y), 6)
    assert min(losses[-2:]) < max(losses[:2])


def test_weights_that_are_not_finite_are_not_sealed(after_one, name):
    """Not through the loss: something wrote them."""
    model, optimizer = after_one
    want = parts.logits(model, 0, parts.images(name))
    with pytest.raises(
        hatcl.NonFiniteLossError, match="task 1: shared weights are no longer finite; nothing was sealed"
    ):
        with hatcl.learn(model, 1, optimizer, steps=2):
            optimizer.step()
            h = next(h for h in held(model) if h.task is None and not h.plain and not bool(h.live(0).all()))
            with torch.no_grad():
                h.param.masked_fill_(~h.live(0), float("nan"))
    assert torch.equal(parts.logits(model, 0, parts.images(name)), want)


def test_what_was_sealed_and_changed_outside_is_noticed(after_one, name):
    model, optimizer = after_one
    h = next(h for h in held(model) if h.task is None and not h.plain)
    with torch.no_grad():
        h.param[h.live(0)] += 1
    with pytest.raises(hatcl.IntegrityError, match=f"task 0 was sealed, but 1 of what it uses changed since: {h.name}"):
        parts.train(model, 1, optimizer, parts.problem(parts.shape_of(name), 1), 2)
    with pytest.raises(hatcl.IntegrityError, match=h.name):
        hatcl.certify(model, parts.images(name))
    with pytest.raises(hatcl.IntegrityError, match=h.name):
        hatcl.forget_task(model, 0)


# ---- around the block -----------------------------------------------------------------------------


def test_one_task_at_a_time():
    model = parts.converted("mlp")
    optimizer = adamw(model)
    with hatcl.learn(model, 0, optimizer, steps=2):
        with pytest.raises(hatcl.TaskError, match="task 0 is being learned; leave its hatcl.learn block first"):
            with hatcl.learn(model, 1, optimizer, steps=2):
                pass
        with pytest.raises(hatcl.TaskError, match="task 1 is not sealed"):
            hatcl.set_task(model, 1)
        optimizer.step()


def test_task_parameters_are_what_only_the_task_has(name):
    model = parts.converted(name)
    own = [{id(p) for p in hatcl.task_parameters(model, t)} for t in range(3)]
    assert all(own) and not own[0] & own[1] and not own[1] & own[2]
    rest = {id(p) for p in model.parameters()} - set.union(*own)
    assert {id(h.param) for h in held(model) if h.task is None} == rest
    assert id(gates_of(model)[0].embeddings[1]) in own[1]


def test_an_optimizer_over_the_tasks_own_parameters_alone(after_one, name):
    model, _ = after_one
    shared = {h.name: h.param.detach().clone() for h in held(model) if h.task is None}
    optimizer = torch.optim.Adam(hatcl.task_parameters(model, 1), lr=1e-2)
    losses = parts.train(model, 1, optimizer, parts.problem(parts.shape_of(name), 1), 8)
    assert min(losses[-2:]) < max(losses[:2])
    assert all(torch.equal(h.param, shared[h.name]) for h in held(model) if h.task is None)


def test_frozen_backbones_stay_frozen():
    source = parts.plain("resnet")
    for n, p in source.named_parameters():
        p.requires_grad_(n.startswith("fc"))
    model = hatcl.convert(source, 2, parts.images("resnet"))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "hat_" not in n}
    parts.train(model, 0, adamw(model), parts.problem(parts.shape_of("resnet"), 0), 4)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_a_heavier_penalty_uses_fewer_units():
    used = []
    for weight in (0.0, 20.0):
        model = parts.converted("mlp", penalty_weight=weight, settle=0.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        parts.train(model, 0, optimizer, parts.problem(parts.shape_of("mlp"), 0), 40)
        used.append(int(gates_of(model)[0].masks[0].sum()))
    assert used[1] < used[0] / 2


def test_evaluation_inside_the_block_is_hard_unless_soft_is_asked_for():
    model = parts.converted("mlp")
    x = parts.images("mlp")
    with hatcl.learn(model, 0, torch.optim.SGD(model.parameters(), 0.1), steps=3) as learning:
        model.train()
        soft = model(x).detach()
        model.eval()
        with torch.no_grad():
            hard = model(x)
            with learning.soft():
                assert torch.allclose(model(x), soft, atol=1e-6)  # gates on the weight or on the output: rounding
            assert torch.equal(model(x), hard)
    assert not torch.allclose(soft, hard, atol=1e-3)


def test_learning_twice_gives_the_same_bits(name):
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = parts.converted(name)
        optimizer = adamw(model)
        for t in range(2):
            parts.train(model, t, optimizer, parts.problem(parts.shape_of(name), t), 4)
        runs.append(parts.snapshot(model))
    assert parts.same(*runs)


def test_statistics_average_anew_over_hard_gates():
    """When a task settles, its batch norms start with an average: those of soft gates lag behind (twin: the plain
    momentum, under which what the last batches gave is not what evaluation sees)."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 8) * 3 + 5, torch.randint(0, 2, (64,))
    plain = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
    model = hatcl.convert(plain, 1, x[:2], config={"settle": 0.5})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with hatcl.learn(model, 0, optimizer, steps=4) as learning:
        model.train()
        for _ in range(4):
            (tf.cross_entropy(model(x), y) + learning.penalty()).backward()
            optimizer.step()
    norm = model[1]
    batch = tf.linear(x, model[0]._parameters["weight"], model[0]._parameters["bias"]).mean(0)
    got = norm.hat_tasks[0].running_mean
    # float32 sums in another order: measured 2e-6
    assert torch.allclose(got, batch, atol=2e-5) and norm.hat_tasks[0].num_batches_tracked == 4
    assert not torch.allclose(batch * (1 - 0.9**4), batch, atol=2e-5)  # what momentum 0.1 reaches from zero in 4 steps


def test_a_layer_without_units_is_named():
    torch.manual_seed(0)
    model = hatcl.convert(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), 1, torch.randn(2, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.warns(
        UserWarning, match="task 0 uses no unit of 0, so nothing passes there; lower HATConfig.penalty_weight"
    ):
        with hatcl.learn(model, 0, optimizer, steps=1), torch.no_grad():
            model.hat_gates.embeddings[0].fill_(-1)


# ---- models inside other modules, copies made inside the block --------------------------------------


class Wrapped(torch.nn.Module):
    """The way DistributedDataParallel, torch.compile and others wrap a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def test_a_model_may_be_wrapped_for_learning(name, tmp_path):
    model, x = parts.converted(name), parts.images(name)
    wrapped = Wrapped(Wrapped(model))
    optimizer = adamw(wrapped)
    parts.train(wrapped, 0, optimizer, parts.problem(parts.shape_of(name), 0), 3)
    want = parts.logits(model, 0, x)
    assert hatcl.certify(model, x).exact and hatcl.certify(wrapped, x).exact
    parts.train(model, 1, optimizer, parts.problem(parts.shape_of(name), 1), 3)
    assert hatcl.certify(Wrapped(model), x).exact
    again = hatcl.from_pretrained(hatcl.save_pretrained(wrapped, tmp_path / "m"), base=parts.plain(name))
    assert torch.equal(parts.logits(again, 0, x), want)


def test_layers_by_hand_may_be_wrapped_too():
    layer = hatcl.HATLinear(12, 16, num_tasks=2)
    model = torch.nn.Sequential(layer, torch.nn.ReLU(), hatcl.TaskIndexedLinear(16, parts.CLASSES, reads=layer))
    parts.train(Wrapped(model), 0, adamw(model), parts.problem((12,), 0), 3)
    assert hatcl.certify(model, parts.problem((12,), 0)[0]).exact


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_made_inside_the_block_is_not_being_learned(name, how):
    model = parts.converted(name)
    optimizer = adamw(model)
    data = parts.problem(parts.shape_of(name), 0)
    with hatcl.learn(model, 0, optimizer, steps=6) as learning:
        steps_of(model, learning, optimizer, data, 3)
        copied = how(model)
        steps_of(model, learning, optimizer, data, 3)
    assert gates_of(copied)[0].learning is None and hatcl.tasks(copied) == []
    again = adamw(copied)
    with hatcl.learn(copied, 0, again, steps=6, start=3) as learning:
        steps_of(copied, learning, again, data, 3)
    assert hatcl.tasks(copied) == [0]


def test_a_plain_layer_among_layers_by_hand_is_held_once_a_task_is_sealed():
    layer = hatcl.HATLinear(12, 16, num_tasks=2)
    head = hatcl.TaskIndexedLinear(16, parts.CLASSES, num_tasks=2)
    model = torch.nn.Sequential(layer, torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.ReLU(), head)
    x, optimizer = parts.problem((12,), 0)[0], adamw(model)
    parts.train(model, 0, optimizer, parts.problem((12,), 0), 4)
    want, held = parts.logits(model, 0, x), model[2].weight.detach().clone()
    parts.train(model, 1, optimizer, parts.problem((12,), 1), 4)
    assert torch.equal(parts.logits(model, 0, x), want) and torch.equal(model[2].weight, held)


# ---- HAT-CL's recipe -----------------------------------------------------------------------------------------------


RECIPE = {"init": "dense", "penalty": "layer", "forgiven": 0.1, "max_scale": 100.0}


def test_hat_cls_recipe_leaves_room_if_embeddings_can_move():
    """Adam moves an embedding by about its rate in a step, so one that starts at 1 stays on in 40 steps of 1e-3: the
    first task takes everything, which is said. With steps of forty times that size, later tasks have units too."""
    x = parts.problem(parts.shape_of("mlp"), 0)
    for scale, full in ((1.0, True), (40.0, False)):
        model = parts.converted("mlp", 3, **RECIPE, embedding_lr_scale=scale)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        text = r"task 0 uses every unit .*embedding_lr_scale \(now 1\)"
        with pytest.warns(UserWarning, match=text) if full else contextlib.nullcontext():
            parts.train(model, 0, optimizer, x, 40)
        used = gates_of(model)[0].masks[0]
        assert bool(used.all()) == full and bool(used.any())
    for t in (1, 2):
        parts.train(model, t, torch.optim.Adam(model.parameters(), 1e-3), parts.problem(parts.shape_of("mlp"), t), 40)
    assert hatcl.certify(model, x[0], strict=True).exact


class Waits(TorchDispatchMode):
    """Operations after which Python knows a number of a tensor, for which it waits for the device."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        indices = [i for a in args if isinstance(a, (list, tuple)) for i in a if isinstance(i, torch.Tensor)]
        by_mask = name.startswith("index") and any(i.dtype == torch.bool for i in indices)
        if name in self.NAMES or by_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def waits(name, reuse):
    """What the third step of a second task waits for, in forward with penalty, backward, and the optimizer's step."""
    model = parts.converted(name, reuse=reuse)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    x, y = parts.problem(parts.shape_of(name))
    parts.train(model, 0, optimizer, (x, y), 3)
    with hatcl.learn(model, 1, optimizer, steps=30) as learning:
        for _ in range(3):
            found = []
            optimizer.zero_grad()
            with Waits() as seen:
                loss = tf.cross_entropy(model(x), y) + learning.penalty()
            found.append(seen.seen)
            with Waits() as seen:
                loss.backward()
            found.append(seen.seen)
            with Waits() as seen:
                optimizer.step()
            found.append(seen.seen)
    return found


@pytest.mark.filterwarnings("ignore:task")
@pytest.mark.parametrize("name", ["resnet", "vit"])
@pytest.mark.parametrize("reuse", ["all", "none"])
def test_a_step_waits_for_the_device_once(name, reuse):
    assert waits(name, reuse) == [[], [], ["_local_scalar_dense"]]


@pytest.mark.filterwarnings("ignore:task")
def test_twin_of_waiting_once(monkeypatch):
    monkeypatch.setattr(Gates, "given_share", lambda self, task: float(self.given_until[task]))
    assert waits("mlp", "all") != [[], [], ["_local_scalar_dense"]]
