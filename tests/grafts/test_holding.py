"""Held elements stay bit for bit under every optimizer, and what is around them learns."""

from __future__ import annotations

import graft_parts as parts
import pytest
import torch
from torch import nn
from torch.nn import functional as tf

import hatcl
from hatcl import keeper
from hatcl.errors import GraftError, GuardError
from hatcl.grafts import Graft, hold, holding
from hatcl.hat import guard

OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "sgd with momentum and decay": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.5),
    "foreach": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.5, foreach=True),
    "fused": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.5, fused=True),
    "maximize": lambda ps: torch.optim.SGD(ps, lr=1e-3, momentum=0.9, weight_decay=0.1, maximize=True, foreach=True),
    "rprop": lambda ps: torch.optim.Rprop(ps, lr=0.01),
    "lion-like": lambda ps: Sign(ps),
}


class Sign(torch.optim.Optimizer):
    """Moves every element, with or without a gradient."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.where(torch.rand_like(p, dtype=torch.float32) < 0.5, 0.01, -0.01).to(p.dtype))


def network(kind="linear"):
    torch.manual_seed(0)
    if kind == "channels last":
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).to(memory_format=torch.channels_last)
    if kind == "tied":
        model = nn.Sequential(nn.Embedding(9, 4, sparse=False), nn.Linear(4, 4), nn.Linear(4, 9, bias=False))
        model[2].weight = model[0].weight
        return model
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    return model.to({"half": torch.bfloat16, "double": torch.float64}.get(kind, torch.float32))


def batch(model, kind="linear", seed=0):
    torch.manual_seed(seed)
    if kind == "tied":
        return torch.randint(9, (16,)), torch.randint(9, (16,))
    shape = (16, 3, 4, 4) if kind == "channels last" else (16, 3)
    return torch.randn(shape).to(next(model.parameters()).dtype), torch.randint(2, (16,))


def some(model, share=0.3, seed=0):
    return Graft.from_masks(parts.masks(model, share, seed))


def loss_of(model, data):
    return tf.cross_entropy(model(data[0]).float(), data[1])


def train(model, optimizer, data, steps=5):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, data)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def inside(model, graft):
    """The bits that are held."""
    params = dict(model.named_parameters())
    return {n: parts.as_ints(params[n]).reshape(-1)[at.long()] for n, at in graft.indices.items()}


def moved(model, graft, before):
    """Did elements outside the graft move?"""
    on, now = graft.masks(), dict(model.named_parameters())
    return any(bool((parts.as_ints(now[n]) != before[n])[~m].any()) for n, m in on.items())


@pytest.mark.parametrize("kind", ["linear", "half", "double", "channels last", "tied"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_held_bit_for_bit_while_the_rest_learns(name, kind):
    model = network(kind)
    optimizer = OPTIMIZERS[name](model.parameters())
    data, graft = batch(model, kind), some(model)
    before, all_before = inside(model, graft), parts.bits(dict(model.named_parameters()))
    step = optimizer.step
    with hatcl.hold(model, graft, optimizer):
        train(model, optimizer, data)
    assert parts.same(inside(model, graft), before)
    assert moved(model, graft, all_before)
    assert optimizer.step == step
    train(model, optimizer, data, 1)  # afterwards they are free
    assert not parts.same(inside(model, graft), before)


@pytest.mark.parametrize("name", ["sgd with momentum and decay", "adamw", "foreach", "fused"])
def test_twin_without_putting_back_they_move(monkeypatch, name):
    monkeypatch.setattr(keeper, "put_back", lambda *args: None)
    monkeypatch.setattr(keeper.Kept, "put", lambda k: None)
    model = network()
    optimizer, graft = OPTIMIZERS[name](model.parameters()), some(model)
    before = inside(model, graft)
    with pytest.warns(UserWarning, match=r"0.weight: something other .* \(4 such tensors\); they are restored"):
        with hold(model, graft, optimizer):
            train(model, optimizer, batch(model))
    assert not parts.same(inside(model, graft), before)


def test_momentum_from_before_does_not_move_them():
    for name in ("sgd with momentum and decay", "adamw"):
        model = network()
        optimizer, graft, data = OPTIMIZERS[name](model.parameters()), some(model), batch(model)
        train(model, optimizer, data)
        before = inside(model, graft)
        with hold(model, graft, optimizer):
            train(model, optimizer, data)
            assert parts.same(inside(model, graft), before)
        for n, at in graft.indices.items() if name == "adamw" else ():
            assert not bool(optimizer.state[model.get_parameter(n)]["exp_avg"].view(-1)[at.long()].any())


def test_gradient_accumulation_and_clipping_see_what_is_trained():
    model = network()
    optimizer, graft = OPTIMIZERS["adamw"](model.parameters()), some(model, 0.5)
    data, before, on = batch(model), inside(model, some(network(), 0.5)), some(network(), 0.5).masks()
    with hold(model, graft, optimizer):
        for _ in range(3):
            for i in range(4):
                (loss_of(model, batch(model, seed=i)) / 4).backward()
            grads = {n: p.grad for n, p in model.named_parameters()}
            assert all(not bool(g[on[n]].any()) for n, g in grads.items())
            assert any(bool(g[~on[n]].any()) for n, g in grads.items())
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            free = torch.cat([g[~on[n]] for n, g in grads.items()])
            # torch divides by the norm + 1e-6, and the norm is above 0.2: measured 4.5e-6
            assert float(norm) > 1e-3 and float(free.norm()) == pytest.approx(1e-3, rel=1e-5)
            optimizer.step()
            optimizer.zero_grad()
    assert parts.same(inside(model, graft), before)
    loss_of(model, data).backward()
    assert any(bool(p.grad[on[n]].any()) for n, p in model.named_parameters())  # the hooks are gone


def test_twin_without_hooks_the_norm_is_that_of_everything(monkeypatch):
    norms = []
    for _ in range(2):
        model = network()
        with hold(model, some(model, 0.9), OPTIMIZERS["sgd"](model.parameters())):
            loss_of(model, batch(model)).backward()
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1e9)))
        monkeypatch.setattr(keeper, "_zero", lambda which: lambda p: None)
    assert norms[0] < 0.9 * norms[1]


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips(fused):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    data, graft = batch(model), some(model)
    before, all_before = inside(model, graft), parts.bits(dict(model.named_parameters()))
    with hold(model, graft, optimizer):
        for step in range(5):
            optimizer.zero_grad()
            loss = loss_of(model, data) * (float("inf") if step in (0, 3) else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            assert parts.same(inside(model, graft), before)
            assert moved(model, graft, all_before) == (step > 0)
    assert scaler.get_scale() < 2.0**10


def test_a_closure_and_a_scheduler():
    model = network()
    optimizer, graft, data = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3), some(model), batch(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    before, start = inside(model, graft), float(loss_of(model, data))

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, data)
        loss.backward()
        return loss

    with hold(model, graft, optimizer):
        for _ in range(3):
            optimizer.step(closure)
            scheduler.step()
    assert parts.same(inside(model, graft), before)
    assert float(loss_of(model, data)) < start and optimizer.param_groups[0]["lr"] == 0.0125


def test_several_optimizers_and_parameters_that_join():
    model = network()
    graft, data = some(model), batch(model)
    first, last = OPTIMIZERS["adamw"](model[0].parameters()), OPTIMIZERS["lion-like"](model[3].parameters())
    before = inside(model, graft)
    with hold(model, graft, [first, last]):
        last.add_param_group({"params": model[1].parameters()})
        for _ in range(3):
            loss_of(model, data).backward()
            first.step()
            last.step()
    assert parts.same(inside(model, graft), before)


def test_several_grafts_are_held_at_what_the_model_has_now():
    pre = network()
    ft = network()
    train(ft, OPTIMIZERS["sgd"](ft.parameters()), batch(ft))
    a, b = (Graft.from_masks(parts.masks(pre, 0.3, s), ft, pre) for s in (1, 2))
    a.apply_(pre)
    both = a | b
    before = inside(pre, both)
    optimizer = OPTIMIZERS["adamw"](pre.parameters())
    with hold(pre, [a, b.bits()], optimizer):
        train(pre, optimizer, batch(pre))
    assert parts.same(inside(pre, both), before)
    a.remove_(pre)  # its elements were not moved, so it comes out


def test_none_and_everything():
    model = network()
    optimizer, data = OPTIMIZERS["sgd with momentum and decay"](model.parameters()), batch(model)
    before = parts.bits(dict(model.named_parameters()))
    with hold(model, some(model, 2), optimizer):
        train(model, optimizer, data)
        loss_of(model, data).backward()
        assert all(p.grad is None for p in model.parameters())
    assert parts.same(parts.bits(dict(model.named_parameters())), before)
    with hold(model, [], optimizer):
        train(model, optimizer, data)
    assert not parts.same(parts.bits(dict(model.named_parameters())), before)


def test_sparse_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2))
    graft = Graft.from_masks({"0.weight": torch.rand(9, 4) < 0.4})
    optimizer = torch.optim.SparseAdam(model[0].parameters(), lr=0.1)
    before = inside(model, graft)
    with hold(model, graft, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            tf.cross_entropy(model(torch.arange(9)), torch.arange(9) % 2).backward()
            assert model[0].weight.grad.is_sparse
            assert not bool(model[0].weight.grad.to_dense()[graft.masks()["0.weight"]].any())
            optimizer.step()
    assert parts.same(inside(model, graft), before)


def test_one_memory_under_two_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight.data = model[0].weight.data
    graft = Graft.from_masks({"0.weight": torch.rand(4, 4) < 0.5})
    before = inside(model, graft)
    optimizer = OPTIMIZERS["adamw"](model[1].parameters())
    with hold(model, graft, optimizer):
        train(model, optimizer, (torch.randn(8, 4), torch.randint(4, (8,))))
    assert parts.same(inside(model, graft), before)


def test_an_exception_leaves_them_as_they_were():
    model = network()
    optimizer, graft = OPTIMIZERS["adamw"](model.parameters()), some(model)
    before, step = inside(model, graft), optimizer.step
    with pytest.raises(KeyError), hold(model, graft, optimizer):
        train(model, optimizer, batch(model))
        raise KeyError
    assert parts.same(inside(model, graft), before) and optimizer.step == step


def test_a_write_that_is_no_step_is_seen_and_undone():
    model = network()
    optimizer, graft = OPTIMIZERS["sgd"](model.parameters()), some(model, 2)
    before = inside(model, graft)
    with pytest.warns(UserWarning, match=r"3.bias: something other than an optimizer's step wrote .* restored"):
        with hold(model, graft, optimizer), torch.no_grad():
            model[3].bias.add_(1)
    assert parts.same(inside(model, graft), before)


def test_memory_goes_with_the_graft(monkeypatch):
    kept = []
    plain = keeper.taken
    monkeypatch.setattr(keeper, "taken", lambda k: kept.append(plain(k)) or kept[-1])
    model = network()
    graft = some(model, 0.2)
    with hold(model, graft, OPTIMIZERS["sgd"](model.parameters())):
        assert sum(k.numel() for k in kept) == graft.size


def test_refused():
    model = network()
    optimizer, graft = OPTIMIZERS["sgd"](model.parameters()), some(model)
    step = optimizer.step

    def held(*args):
        with hold(*args):
            pass

    cases = [
        (GraftError, (nn.Linear(3, 3), graft, optimizer), "6 of the 6 tensors do not fit: 0.weight is [8, 3]"),
        (GraftError, (model.state_dict(), graft, optimizer), "hold: got OrderedDict, expected a module"),
        (GuardError, (model, graft, OPTIMIZERS["sgd"](network().parameters())),
         "SGD holds none of this model's parameters; build it over the parameters of the model to hold"),
        (GuardError, (model, graft, [optimizer, None]), "got NoneType, which has no step() and param_groups to guard"),
        (GraftError, (model, Graft.from_masks({"1.running_var": torch.ones(8, dtype=torch.bool)}), optimizer),
         "1.running_var is a buffer, which forward passes write to, not optimizers"),
    ]  # fmt: skip
    for error, args, text in cases:
        with pytest.raises(error) as caught:
            held(*args)
        assert text in str(caught.value), str(caught.value)
    assert optimizer.step == step


def test_both_guards_are_one():
    assert issubclass(guard.Guard, keeper.Keeper)
    assert holding.Keeper is keeper.Keeper
