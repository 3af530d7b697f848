"""What is sealed stays at every moment: when a step fails, when something else steps or writes, and when an optimizer
keeps weights of its own. Each kind with its twin."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
import warnings

import accelerate
import border_parts as border
import parts
import pytest
import torch
from border_parts import X, adamw, learned, loss_of, out, train
from timm.optim import Lookahead
from torch import nn

import hatcl
from hatcl import keeper
from hatcl.functional import bits_of, same_bits


class Interrupted(torch.optim.AdamW):
    """Moves everything, and then its step fails."""

    error: type[BaseException] = KeyboardInterrupt

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(0.05)
        raise self.error


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation in the usual form: two steps, neither of which is called `step`."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old_p"] = p.data.clone()
                    p.add_(p.grad * self.defaults["rho"])

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old_p"]
        self.base_optimizer.step()


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (Defazio et al. 2024): z beside the parameters, which are y while training and x otherwise."""

    def __init__(self, params, lr=0.1, beta=0.9, decay=0.1):
        super().__init__(params, {"lr": lr, "beta": beta, "decay": decay, "steps": 0, "training": True})

    @torch.no_grad()
    def switch(self, training):
        for group in self.param_groups:
            weight = 1 - group["beta"] if training else 1 - 1 / group["beta"]
            if group["training"] != training:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight)
            group["training"] = training

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["steps"] += 1
            share = 1 / group["steps"]
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.clone())
                    grad = p.grad + group["decay"] * p
                    p.lerp_(z, share).add_(grad, alpha=group["lr"] * (group["beta"] * (1 - share) - 1))
                    z.sub_(grad, alpha=group["lr"])


class Anchored(torch.optim.SGD):
    """Pulls the parameters to a list of weights of its own, which decay."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.anchors = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for p, a in zip((p for g in self.param_groups for p in g["params"]), self.anchors, strict=True):
            a.mul_(0.99).add_(p, alpha=0.01)
            p.lerp_(a, 0.5)

    @torch.no_grad()
    def finish(self):
        for p, a in zip((p for g in self.param_groups for p in g["params"]), self.anchors, strict=True):
            p.copy_(a)


# ---- a step that fails --------------------------------------------------------------------------------------------


def test_interrupted_inside_a_step():
    model, want = learned()
    with pytest.raises(KeyboardInterrupt):
        train(model, 1, Interrupted(model.parameters(), lr=0.05))
    assert same_bits(out(model, 0), want) and hatcl.tasks(model) == [0]
    train(model, 1)
    assert same_bits(out(model, 0), want) and hatcl.certify(model, X).exact


def test_a_step_that_fails_and_is_caught():
    model, want = learned()
    optimizer = Interrupted(model.parameters(), lr=0.05)
    optimizer.error = OverflowError
    with hatcl.learn(model, 1, optimizer, steps=2) as learning:
        loss_of(model, 1, learning).backward()
        with contextlib.suppress(OverflowError):
            optimizer.step()
        inside = out(model, 0)
        type(optimizer).__mro__[1].step(optimizer)
        type(optimizer).__mro__[1].step(optimizer)
        assert learning.step == 2
    assert same_bits(inside, want) and same_bits(out(model, 0), want)


def test_a_failing_hook_after_the_step():
    model, want = learned()
    optimizer = adamw(model)

    def fail(*_):
        raise RuntimeError("a hook of the user's")

    optimizer.register_step_post_hook(fail)
    with pytest.raises(RuntimeError, match="a hook of the user"):
        train(model, 1, optimizer)
    assert same_bits(out(model, 0), want) and hatcl.tasks(model) == [0]


@pytest.mark.parametrize("where", ["step", "leaving"])
def test_twin_without_putting_back_a_failing_step_moves_it(monkeypatch, where):
    """Either place alone suffices here; without both, task 0 has moved."""
    model, want = learned()
    plain = keeper.Keeper.put_back
    monkeypatch.setattr(keeper.Keeper, "put_back", lambda self: [])
    if where == "leaving":
        monkeypatch.setattr(keeper.Keeper, "_end", lambda *args, **kwargs: None)
        monkeypatch.setattr(keeper.Keeper, "put_back", plain)
        assert plain is keeper.Keeper.put_back
    with pytest.raises(KeyboardInterrupt):
        train(model, 1, Interrupted(model.parameters(), lr=0.05))
    assert same_bits(out(model, 0), want)
    monkeypatch.setattr(keeper.Keeper, "_end", lambda *args, **kwargs: None)
    monkeypatch.setattr(keeper.Keeper, "put_back", lambda self: [])
    with pytest.raises(KeyboardInterrupt):
        train(model, 1, Interrupted(model.parameters(), lr=0.05))
    assert not same_bits(out(model, 0), want)


@pytest.fixture
def interruptible():
    """A shell's background jobs ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_signal_at_any_moment(interruptible):
    model, want = learned()
    draw = random.Random(0)
    optimizer = adamw(model)
    hits = 0
    for _ in range(25):
        delay = draw.uniform(0.0, 0.03)
        main = threading.Thread(target=lambda d=delay: (time.sleep(d), os.kill(os.getpid(), signal.SIGINT)))
        try:
            main.start()
            with hatcl.learn(model, 1, optimizer, steps=1000) as learning:
                for _ in range(1000):
                    optimizer.zero_grad()
                    loss_of(model, 1, learning).backward()
                    optimizer.step()
        except KeyboardInterrupt:
            hits += 1
        main.join()
        assert same_bits(out(model, 0), want) and hatcl.tasks(model) == [0]
    assert hits == 25 and model.hat_gates.learning is None


# ---- other steps and writes ---------------------------------------------------------------------------------------


def test_a_two_step_optimizer_simply_works():
    model, want = learned()
    optimizer = SAM(model.parameters(), torch.optim.AdamW, lr=0.05, weight_decay=0.1)
    with warnings.catch_warnings(), hatcl.learn(model, 1, optimizer, steps=6) as learning:
        warnings.simplefilter("error")
        for _ in range(6):
            for step in (optimizer.first_step, optimizer.second_step):
                optimizer.zero_grad()
                loss_of(model, 1, learning).backward()
                step()
        assert learning.step == 6
    assert same_bits(out(model, 0), want) and hatcl.tasks(model) == [0, 1] and hatcl.certify(model, X).exact


def test_a_bound_step_from_before_the_block():
    model, want = learned()
    optimizer = adamw(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, 1, optimizer, step=optimizer.step)
    assert same_bits(out(model, 0), want) and hatcl.certify(model, X).exact


def test_another_optimizer_than_the_one_given_is_guarded_and_counted():
    model, want = learned()
    other = adamw(model)
    with warnings.catch_warnings(), hatcl.learn(model, 1, adamw(model), steps=4) as learning:
        warnings.simplefilter("error")
        for _ in range(4):
            other.zero_grad()
            loss_of(model, 1, learning).backward()
            other.step()
        assert learning.step == 4
    assert same_bits(out(model, 0), want)


def by_hand(model, optimizer):
    optimizer.step()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad + 0.1 * p


def by_data(model, optimizer):
    for p in model.parameters():
        p.data = torch.randn_like(p)
    optimizer.step()  # puts back what it holds


def by_another_parameter(model, optimizer):
    optimizer.step()
    model[0].weight = nn.Parameter(torch.randn(24, 8))


def by_swapped_groups(model, optimizer):
    """Steps on tensors that are no parameters of the model, which are copied into it afterwards."""
    ours = list(model.parameters())
    own = [nn.Parameter(p.detach().clone()) for p in ours]
    for p, q in zip(ours, own, strict=True):
        q.grad = p.grad
    optimizer.param_groups[0]["params"] = own
    optimizer.step()
    with torch.no_grad():
        for p, q in zip(ours, own, strict=True):
            p.copy_(q)
    optimizer.param_groups[0]["params"] = ours


WRITES = [by_hand, by_data, by_another_parameter, by_swapped_groups]


@pytest.mark.parametrize("write", WRITES)
def test_writes_outside_a_step_are_undone_and_said(write):
    model, want = learned()
    optimizer = adamw(model)
    with warnings.catch_warnings(record=True) as warned, hatcl.learn(model, 1, optimizer, steps=1) as learning:
        warnings.simplefilter("always")
        loss_of(model, 1, learning).backward()
        write(model, optimizer)
    assert same_bits(out(model, 0), want) and hatcl.tasks(model) == [0, 1] and hatcl.certify(model, X).exact
    said = [str(w.message) for w in warned]
    if write is not by_data:
        assert any("something else than a step of an optimizer wrote to frozen elements of 0.weight" in s for s in said)


@pytest.mark.parametrize("write", [by_hand, by_another_parameter, by_swapped_groups])
def test_twin_without_putting_back_on_leaving_it_is_a_ruin(write, monkeypatch):
    model, want = learned()
    optimizer = adamw(model)
    monkeypatch.setattr("hatcl.hat.guard.Guard.put_back", lambda self: [])
    monkeypatch.setattr("hatcl.hat.digests.check_sealed", lambda *args: None)
    with warnings.catch_warnings(), hatcl.learn(model, 1, optimizer, steps=1) as learning:
        warnings.simplefilter("ignore")
        loss_of(model, 1, learning).backward()
        write(model, optimizer)
    assert not same_bits(out(model, 0), want)


def test_buffers_that_tasks_share_or_own_are_put_back():
    model = parts.converted("resnet")
    parts.pretend(model, tasks=[0])
    x, y = parts.problem(parts.shape_of("resnet"), 1)
    want = parts.logits(model, 0, x)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="something else than a step .*running_mean"):
        with hatcl.learn(model, 1, optimizer, steps=1) as learning:
            (nn.functional.cross_entropy(model(x), y) + learning.penalty()).backward()
            optimizer.step()
            for module in model.modules():
                if "hat_tasks" in module._modules:
                    for b in module.hat_tasks[0].buffers():
                        b.zero_()
            model.hat_gates.masks[0] = True
    assert same_bits(parts.logits(model, 0, x), want)


def test_a_cast_and_back_inside_the_block():
    model = parts.converted("resnet")
    parts.pretend(model, tasks=[0])
    x, y = parts.problem(parts.shape_of("resnet"), 1)
    want = parts.logits(model, 0, x)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="something else than a step"):
        with hatcl.learn(model, 1, optimizer, steps=1) as learning:
            (nn.functional.cross_entropy(model(x), y) + learning.penalty()).backward()
            optimizer.step()
            model.bfloat16().float()
    assert same_bits(parts.logits(model, 0, x), want) and hatcl.tasks(model) == [0, 1]


class Turned(nn.Module):
    """A buffer that is not saved, as rotary embeddings have."""

    def __init__(self):
        super().__init__()
        self.body = border.net()
        self.register_buffer("turn", torch.linspace(0.5, 1.5, 8), persistent=False)

    def forward(self, x):
        return self.body(x * self.turn)


def test_buffers_that_are_not_saved_are_put_back_too():
    model = hatcl.convert(Turned(), 2, X)
    train(model, 0)
    want = out(model, 0)
    optimizer = adamw(model)
    with pytest.warns(UserWarning, match="something else than a step .*turn"):
        with hatcl.learn(model, 1, optimizer, steps=1) as learning:
            loss_of(model, 1, learning).backward()
            optimizer.step()
            model.turn.zero_()
    assert same_bits(out(model, 0), want)


# ---- what optimizers store ----------------------------------------------------------------------------------------


def test_lookahead_and_its_slow_weights():
    model = hatcl.convert(border.net(), 3, X)
    optimizer = Lookahead(adamw(model), k=3)
    want = []
    for t in range(3):
        train(model, t, optimizer, steps=7)
        want.append(out(model, t))
        optimizer.sync_lookahead()  # also after the block
        assert all(same_bits(out(model, i), w) for i, w in enumerate(want))
    assert hatcl.certify(model, X).exact


def free_of_schedules():
    model = hatcl.convert(border.net(), 3, X)
    optimizer = ScheduleFree(model.parameters())
    want, same = [], []
    for t in range(3):
        optimizer.switch(True)
        train(model, t, optimizer, steps=7)
        want.append(out(model, t))
        optimizer.switch(False)
        same += [same_bits(out(model, i), w) for i, w in enumerate(want)]
    return model, same


def test_a_schedule_free_optimizer_writes_nothing_back_later():
    model, same = free_of_schedules()
    assert all(same) and hatcl.certify(model, X).exact


def test_twin_without_putting_back_what_is_stored(monkeypatch):
    monkeypatch.setattr(keeper.StoredWeights, "put_back", lambda self: None)
    monkeypatch.setattr("hatcl.hat.digests.check_sealed", lambda *args: None)
    assert False in free_of_schedules()[1]


def test_a_list_of_weights():
    model = hatcl.convert(border.net(), 2, X)
    optimizer = Anchored(model.parameters(), 0.1)
    want = []
    for t in range(2):
        train(model, t, optimizer)
        want.append(out(model, t))
        optimizer.finish()
        assert all(same_bits(out(model, i), w) for i, w in enumerate(want))


def test_moments_are_no_weights():
    model, _ = learned()
    optimizer = adamw(model)
    train(model, 1, optimizer)
    assert not any(keeper._WEIGHTS[optimizer].values()) and keeper._WEIGHTS[optimizer]


# ---- the count of steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("taken", "text"),
    [
        (3, r"task 1 is sealed after 3 of 10 steps, at scale 133 of 400: its gates were still soft"),
        (0, r"task 1 is sealed after 0 of 10 steps, at scale 0.0025 of 400"),
        (12, "task 1: 12 steps were taken and 10 expected, so the last 2 had gates that were hard already"),
    ],
)
def test_another_count_of_steps_is_said(taken, text):
    model, _ = learned()
    optimizer = adamw(model)
    with pytest.warns(UserWarning, match=text):
        with hatcl.learn(model, 1, optimizer, steps=10) as learning:
            for _ in range(taken):
                optimizer.zero_grad()
                loss_of(model, 1, learning).backward()
                optimizer.step()


def test_accumulation_by_accelerate_counts_real_steps():
    model = hatcl.convert(border.net(), 1, X)
    accelerate.state.AcceleratorState._reset_state()  # it is one for the process, and keeps its first options
    accelerate.state.GradientState._reset_state()
    helper = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    prepared, optimizer = helper.prepare(model, adamw(model))
    with warnings.catch_warnings(), hatcl.learn(prepared, 0, optimizer, steps=10) as learning:
        warnings.simplefilter("error", UserWarning)
        for _ in range(40):
            with helper.accumulate(prepared):
                helper.backward(loss_of(prepared, 0, learning))
                optimizer.step()
                optimizer.zero_grad()
        assert learning.step == 10


def test_a_scaler_that_skips_is_not_counted():
    model = hatcl.convert(border.net(), 1, X)
    optimizer = adamw(model, fused=True)  # it is called, and skips by itself
    optimizer.grad_scale = torch.tensor(1.0)
    with hatcl.learn(model, 0, optimizer, steps=1) as learning:
        for infinite in (1.0, 0.0):
            optimizer.found_inf = torch.tensor(infinite)
            loss_of(model, 0, learning).backward()
            optimizer.step()
        assert learning.step == 1


def test_of_several_optimizers_the_one_that_steps_most_counts():
    model = hatcl.convert(border.net(), 1, X)
    inner = [p for n, p in model.named_parameters() if "hat_gates" not in n]
    first, second = torch.optim.SGD(inner, 0.1), torch.optim.SGD(model.hat_gates.parameters(), 0.1)
    with hatcl.learn(model, 0, [first, second], steps=8) as learning:
        for step in range(8):
            loss_of(model, 0, learning).backward()
            first.step()
            if step % 2:
                second.step()
        assert learning.step == 8


# ---- bits ---------------------------------------------------------------------------------------------------------


def test_bits_tell_signs_of_zero_and_know_nan():
    nan = torch.tensor([float("nan"), 0.0])
    assert same_bits(nan, nan.clone()) and not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(nan, nan.double()) and not same_bits(nan, nan[:1])
    for dtype in (
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.complex64,
        torch.complex128,
        torch.int64,
        torch.bool,
    ):
        x = torch.ones(3).to(dtype)
        assert same_bits(x, x.clone()) and not same_bits(x, torch.zeros(3).to(x))
        assert not bits_of(x).is_floating_point()


SHAPES = {
    "matrix": ((6, 5), (6, 5)),
    "broadcast over rows": ((6, 5), (6, 1)),
    "kernel": ((4, 3, 3, 3), (4, 3, 1, 1)),
    "filters": ((4, 3, 3, 3), (4, 1, 1, 1)),
    "small kernel": ((4, 3, 2, 1), (4, 3, 1, 1)),
    "vector": ((7,), (7,)),
    "table": ((6, 5), (1, 5)),
    "read alone": ((4, 3, 3, 3), (1, 3, 1, 1)),
    "last": ((4, 3, 2, 5), (1, 1, 1, 5)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128])
@pytest.mark.parametrize("order", ["contiguous", "channels last", "transposed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_form_of_a_mask_keeps_the_same_elements(shape, order, dtype):
    full, masked = SHAPES[shape]
    torch.manual_seed(0)
    x = torch.randn(full).to(dtype)
    if order == "channels last" and len(full) == 4:
        x = x.to(memory_format=torch.channels_last)
    if order == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    mask = (torch.rand(masked) < 0.5).expand(full)
    p = nn.Parameter(x.clone(memory_format=torch.preserve_format))
    k = keeper.Kept(p, mask)
    k.old = keeper.taken(k)
    assert torch.equal(keeper._mask(x, k), mask)
    for other in (-x, (-x).contiguous(), torch.full_like(x, float("nan")), torch.full_like(x, float("inf"))):
        want = torch.where(mask, x, other)
        put = other.clone(memory_format=torch.preserve_format)
        keeper.put_back(put, k)
        assert same_bits(put, want)
        keeper._clear(put := other.clone(memory_format=torch.preserve_format), k)
        assert same_bits(put, torch.where(mask, torch.zeros((), dtype=dtype), other))


def test_a_mask_of_a_table_is_one_row():
    table = nn.Embedding(50, 6)
    k = keeper.Kept(table.weight, (torch.rand(6) < 0.5).expand(50, 6))
    assert k.masked and k.which.shape == (1, 6) and k.which.dtype == torch.int32


def test_a_mask_of_a_convolution_costs_what_it_keeps():
    conv = nn.Conv2d(16, 16, 3)
    k = keeper.Kept(conv.weight, (torch.rand(16, 16, 1, 1) < 0.25).expand(16, 16, 3, 3))
    kept = int(keeper._mask(conv.weight, k).sum())
    assert k.run == 9 and k.which.numel() * 9 == kept == keeper.taken(k).numel()


def moments_after(steps, kind):
    """A weight of which a part is kept, and its second moment, after some steps of an optimizer that is new."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(8, 8))
    adam = kind == "adam"  # whose weight decay is no part of the gradient
    optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0.1) if adam else torch.optim.RMSprop([p], lr=0.1)
    mask = torch.rand(8, 8) < 0.5
    with keeper.Keeper([keeper.Kept(p, mask)], [optimizer]):
        for _ in range(steps):
            p.grad = None
            (p.square().sum() / 2).backward()
            optimizer.step()
    return p.detach(), optimizer.state[p]["exp_avg_sq" if adam else "square_avg"], mask


@pytest.mark.parametrize("kind", ["adam", "rmsprop"])
def test_second_moments_of_what_is_kept_are_no_zeros(kind, monkeypatch):
    """A CPU takes the root of zeros and of denormal floats several times slower than of other numbers."""
    monkeypatch.setattr(keeper, "RAISED_EVERY", 3)
    p, moment, mask = moments_after(5, kind)
    kept = moment[mask]
    assert bool(((kept > torch.finfo().tiny) & (kept <= keeper.SMALLEST_MOMENT)).all())
    monkeypatch.setattr(keeper, "_raise", lambda x, k: None)
    other, zero, _ = moments_after(5, kind)
    assert not zero[mask].any() and torch.equal(moment[~mask], zero[~mask]) and torch.equal(p, other)
