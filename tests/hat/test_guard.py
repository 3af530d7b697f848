"""M4 and M6: what is frozen stays bit for bit, whatever optimizer trains on. Every guarantee has a twin that fails
when its protection is taken out."""

from __future__ import annotations

import copy
import itertools

import parts
import pytest
import timm.optim
import torch
from torch import nn
from torch.nn import functional as tf
from torch.utils.checkpoint import checkpoint

import hatcl
from hatcl import keeper
from hatcl.errors import IntegrityError
from hatcl.hat import digests, guard
from hatcl.hat.held import held

TORCH = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd_momentum_wd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=3e-3, momentum=0.5, weight_decay=1e-2),
}
TIMM = {"lamb": 0.1, "lion": 3e-3, "adopt": 1e-2, "muon": 2e-2}
OPTIMIZERS = [*TORCH, *(n for n in TIMM if n in timm.optim.list_optimizers())]


def make(name, model):
    if name in TORCH:
        return TORCH[name](model.parameters())
    return timm.optim.create_optimizer_v2(model, opt=name, lr=TIMM[name], weight_decay=0.05)


def sequence(model, name, optimizer, kept=True, autocast=False, tasks=3, steps=5, **options):
    """Learn tasks one after another. Returns the losses per task, and whether each earlier task's outputs stayed
    bit-equal after each later one."""
    x = parts.images(name, 6, seed=9)
    losses, at_sealing, equal = [], {}, []
    opt = make(optimizer, model)
    for t in range(tasks):
        opt = opt if kept else make(optimizer, model)
        data = parts.problem(parts.shape_of(name), t)
        losses.append(parts.train(model, t, opt, data, steps, autocast=autocast, **options))
        for earlier, want in at_sealing.items():
            equal.append(torch.equal(parts.logits(model, earlier, x, autocast), want))
        at_sealing[t] = parts.logits(model, t, x, autocast)
    return losses, equal


def learned(losses):
    return all(min(per_step[-2:]) < max(per_step[:2]) for per_step in losses)


# ---- the grid of exactness -----------------------------------------------------------------------


def ways():
    """Whether the optimizer is kept, in bf16, with accumulation and clipping. Any two of the three meet in all four
    combinations in every run of the tests; the other half of the grid is slow."""
    for kept, autocast, accumulate in itertools.product([True, False], repeat=3):
        names = ("kept" if kept else "fresh", "bf16" if autocast else "fp32", "accumulate_clip" if accumulate else "")
        marks = () if kept == (autocast == accumulate) else pytest.mark.slow
        yield pytest.param(kept, autocast, accumulate, id="-".join(names), marks=marks)


@pytest.mark.parametrize(("kept", "autocast", "accumulate"), list(ways()))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", parts.MODELS)
def test_earlier_tasks_stay_bit_for_bit(name, optimizer, kept, autocast, accumulate):
    model = parts.converted(name)
    micro, clip = (2, 1.0) if accumulate else (1, None)
    losses, equal = sequence(model, name, optimizer, kept, autocast, micro=micro, clip=clip)
    assert equal == [True] * 3
    assert learned(losses)
    assert hatcl.certify(model, parts.images(name)).exact


def without_restoring(monkeypatch):
    """Take out the putting back after every step and on leaving: the gradient hooks are all that is left."""
    monkeypatch.setattr(keeper, "put_back", lambda p, k: None)
    monkeypatch.setattr(keeper.Kept, "put", lambda k: None)


def without_hooks(monkeypatch):
    """Take out the hooks on the gradients."""
    monkeypatch.setattr(keeper, "_zero", lambda mask: lambda p: None)


def without_digests(monkeypatch):
    """Take out the check that would raise."""
    monkeypatch.setattr(digests, "check_sealed", lambda model, only=None: None)


@pytest.mark.parametrize("optimizer", [o for o in OPTIMIZERS if o not in ("sgd",)])
@pytest.mark.parametrize("name", parts.MODELS)
def test_twin_without_the_guard_momentum_and_weight_decay_move_earlier_tasks(name, optimizer, monkeypatch):
    without_restoring(monkeypatch)
    without_digests(monkeypatch)
    _, equal = sequence(parts.converted(name), name, optimizer)
    assert False in equal


@pytest.mark.parametrize("name", parts.MODELS)
def test_twin_without_hooks_and_guard_plain_gradients_move_earlier_tasks(name, monkeypatch):
    without_restoring(monkeypatch)
    without_digests(monkeypatch)
    _, hooked = sequence(parts.converted(name), name, "sgd")
    assert hooked == [True] * 3  # SGD without momentum moves nothing whose gradient is zero
    without_hooks(monkeypatch)
    _, free = sequence(parts.converted(name), name, "sgd")
    assert False in free


@pytest.mark.parametrize("name", parts.MODELS)
def test_without_the_guard_the_digest_raises_and_names_parameters(name, monkeypatch):
    without_restoring(monkeypatch)
    model = parts.converted(name)
    with pytest.raises(IntegrityError, match="task 0 was sealed, but .* of what it uses changed since: .*weight"):
        sequence(model, name, "adamw")
    assert hatcl.tasks(model) == [0]


# ---- M4: exactly what is frozen ------------------------------------------------------------------


class Shake(torch.optim.Optimizer):
    """The worst optimizer: moves every element, with or without a gradient."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(0.1 * torch.rand(p.shape).to(p) + 0.05)


def frozen_by_hand(model, locked):
    """Name -> bool mask, from M4's sentence: both ends on in some sealed task. Own copies of other tasks: all of it."""
    out = {}
    entries = model.hat_gates.unit_map.entries
    for h in held(model):
        if h.plain or h.task in locked:
            out[h.name] = torch.ones(h.param.shape, dtype=torch.bool)
        elif h.task is None:
            mask = torch.zeros(h.param.shape, dtype=torch.bool)
            for t in locked:
                on = torch.cat([torch.ones(1, dtype=torch.bool), model.hat_gates.masks[t]])
                both = torch.ones(entries[h.name].view, dtype=torch.bool)
                for f in entries[h.name].factors:
                    both &= on[torch.as_tensor(f.units)].view(f.shape)
                mask |= both.reshape(h.param.shape)
            out[h.name] = mask
    return out


@pytest.mark.parametrize("name", parts.MODELS)
def test_whatever_moves_every_element_moves_exactly_what_is_not_frozen(name):
    model = parts.pretend(parts.converted(name, 4), tasks=[0, 1])
    before = {h.name: h.param.detach().clone() for h in held(model)}
    want = frozen_by_hand(model, [0, 1])
    optimizer = Shake(model.parameters())
    with hatcl.learn(model, 2, optimizer, steps=1):
        optimizer.step()
    for h in held(model):
        moved = h.param.detach() != before[h.name]
        frozen = want.get(h.name)
        if h.task == 3:  # neither sealed nor learned
            frozen = torch.ones_like(moved)
        elif h.task == 2:
            frozen = torch.zeros_like(moved)
        if h.name.endswith("embeddings.2"):
            moved |= h.param.detach().abs() == model.hat_gates.config.clamp
        assert torch.equal(moved, ~frozen), h.name


def test_frozen_is_the_or_over_tasks_and_less_than_the_cumulative_mask_freezes():
    model = parts.pretend(parts.converted("mlp"), tasks=[0, 1], share=0.5)
    first, second = (slice(a, b) for _, a, b in model.hat_gates.layers)
    masks = model.hat_gates.masks[:2]
    weight = model[4].weight
    frozen = next(
        keeper._mask(weight, k)
        for k in guard.Guard(model, 2, [Shake(model.parameters())], [0, 1], lambda taken: None).kept
        if k.param is weight
    )
    naive = torch.zeros(weight.shape, dtype=torch.bool)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            naive[i, j] = any(masks[t, second][i] and masks[t, first][j] for t in (0, 1))
    assert torch.equal(frozen, naive)
    union = masks.any(0)
    cumulative = union[second][:, None] & union[first][None, :]
    assert bool((frozen & ~cumulative).sum() == 0) and int(frozen.sum()) < int(cumulative.sum())


@pytest.mark.parametrize("locked", [(), (0,), (1,), (0, 1), None])
def test_only_locked_tasks_are_held(locked):
    model = parts.pretend(parts.converted("mlp", locked=locked), tasks=[0, 1])
    x = parts.images("mlp")
    before = [parts.logits(model, t, x) for t in (0, 1)]
    optimizer = Shake(model.parameters())
    with hatcl.learn(model, 2, optimizer, steps=1):
        optimizer.step()
    for t in (0, 1):
        held = locked is None or t in locked
        assert torch.equal(parts.logits(model, t, x), before[t]) == held
    assert hatcl.certify(model, x).exact  # and what moved is sealed as it is now


@pytest.mark.parametrize("name", parts.MODELS)
def test_clipping_sees_the_norm_of_what_can_move(name, monkeypatch):
    def norms(model):
        x, y = parts.problem(parts.shape_of(name), 2)
        frozen = frozen_by_hand(model, [0, 1])
        with hatcl.learn(model, 2, torch.optim.SGD(model.parameters(), 0.1), steps=1) as learning:
            (tf.cross_entropy(model(x), y) + learning.penalty()).backward()
            seen = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            free = 0.0
            for h in held(model):
                if h.param.grad is not None:
                    free += float((h.param.grad * ~frozen.get(h.name, torch.tensor(False))).double().square().sum())
        return float(seen), free**0.5

    model = parts.pretend(parts.converted(name), tasks=[0, 1])
    seen, free = norms(copy.deepcopy(model))
    assert seen == pytest.approx(free, rel=1e-5)  # float32 sums of the same numbers in another order
    without_hooks(monkeypatch)
    seen, free = norms(model)
    assert seen > free * 1.001


# ---- what is frozen follows the task being learned, nothing else ---------------------------------


@pytest.fixture(params=parts.MODELS)
def after_one(request):
    """Name, a model with task 0 learned, the optimizer that is kept, inputs and task 0's outputs on them."""
    name = request.param
    model = parts.converted(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
    parts.train(model, 0, optimizer, parts.problem(parts.shape_of(name), 0), 5)
    x = parts.images(name, 6, seed=9)
    return name, model, optimizer, x, parts.logits(model, 0, x)


def still_exact_and_learning(after_one, losses):
    _, model, _, x, want = after_one
    assert torch.equal(parts.logits(model, 0, x), want)
    assert learned([losses])
    assert hatcl.tasks(model) == [0, 1]
    assert hatcl.certify(model, x).exact


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_forward_of_another_task_between_forward_and_backward(after_one, grad):
    name, model, optimizer, x, _ = after_one

    def other(step):
        with torch.set_grad_enabled(grad), hatcl.task(model, 0 if step % 2 else None):
            model(x)

    data = parts.problem(parts.shape_of(name), 1)
    still_exact_and_learning(after_one, parts.train(model, 1, optimizer, data, inside=other))


def test_what_another_forward_does_not_change_is_what_is_learned():
    """The same weights with and without forwards of another task in between (which must only cost time)."""
    runs = []
    for other in (False, True):
        model = parts.pretend(parts.converted("resnet"), tasks=[0])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        x = parts.images("resnet")

        def inside(step, model=model, other=other, x=x):
            if other:
                with hatcl.task(model, 0):
                    model(x)

        parts.train(model, 1, optimizer, parts.problem(parts.shape_of("resnet"), 1), inside=inside)
        runs.append(parts.snapshot(model))
    assert parts.same(*runs)


def test_training_in_eval_mode(after_one):
    name, model, optimizer, *_ = after_one
    model.eval()
    data = parts.problem(parts.shape_of(name), 1)
    still_exact_and_learning(after_one, parts.train(model, 1, optimizer, data, steps=8))


def test_zero_filled_gradients(after_one, monkeypatch):
    name, model, optimizer, *_ = after_one
    plain = type(optimizer).zero_grad
    monkeypatch.setattr(type(optimizer), "zero_grad", lambda self, set_to_none=True: plain(self, set_to_none=False))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    data = parts.problem(parts.shape_of(name), 1)
    still_exact_and_learning(after_one, parts.train(model, 1, optimizer, data))


def test_twin_zero_filled_gradients_without_the_guard(after_one, monkeypatch):
    name, model, optimizer, x, want = after_one
    without_restoring(monkeypatch)
    without_digests(monkeypatch)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with hatcl.learn(model, 1, optimizer, steps=1):
        optimizer.step()  # nothing but weight decay and momentum
    assert not torch.equal(parts.logits(model, 0, x), want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(after_one, reentrant):
    name, model, optimizer, x, want = after_one
    images, y = parts.problem(parts.shape_of(name), 1)
    images.requires_grad_(reentrant)

    def forward(images):
        if name == "mlp":
            return checkpoint(model, images, use_reentrant=reentrant)
        return model(images)

    if name != "mlp":
        model.set_grad_checkpointing(True)
    losses = []
    with hatcl.learn(model, 1, optimizer, steps=6) as learning:
        for _ in range(6):
            loss = tf.cross_entropy(forward(images), y)
            optimizer.zero_grad()
            (loss + learning.penalty()).backward()
            assert model.hat_gates.embeddings[1].grad.abs().sum() > 0
            optimizer.step()
            losses.append(loss.item())
    still_exact_and_learning(after_one, losses)


def test_gradient_checkpointing_computes_the_same_gradients():
    model = parts.pretend(parts.converted("vit"), tasks=[0])
    x, y = parts.problem(parts.shape_of("vit"), 1)
    grads = []
    for on in (False, True):
        trial = copy.deepcopy(model)
        trial.set_grad_checkpointing(on)
        with hatcl.learn(trial, 1, torch.optim.SGD(trial.parameters(), 0.1), steps=4):
            tf.cross_entropy(trial(x), y).backward()
            grads.append({n: p.grad.clone() for n, p in trial.named_parameters() if p.grad is not None})
    assert parts.same(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_cast_to_another_type(after_one, dtype):
    name, model, _, x, _ = after_one
    model.to(dtype)
    x = x.to(dtype)
    want = parts.logits(model, 0, x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
    images, y = parts.problem(parts.shape_of(name), 1)
    losses = parts.train(model, 1, optimizer, (images.to(dtype), y))
    still_exact_and_learning((name, model, optimizer, x, want), losses)


CONVS = {
    "grouped": lambda: nn.Conv2d(12, 24, 3, padding=1, groups=3),
    "depthwise": lambda: nn.Conv2d(12, 12, 3, padding=1, groups=12),
    "depthwise_multiplied": lambda: nn.Conv2d(12, 24, 3, padding=1, groups=12),
}


@pytest.mark.parametrize("norm", [True, False], ids=["bn", "no_norm"])
@pytest.mark.parametrize("conv", CONVS)
def test_grouped_convolutions_are_exact_and_learn(conv, norm):
    middle = CONVS[conv]()
    width = middle.out_channels
    source = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12) if norm else nn.Identity(), nn.ReLU(),
        middle, nn.BatchNorm2d(width) if norm else nn.Identity(), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, parts.CLASSES),
    )  # fmt: skip
    data = [parts.problem((3, 8, 8), t) for t in range(3)]
    model = hatcl.convert(source, 3, data[0][0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
    before = model[3].weight.detach().clone()
    want = {}
    for t in range(3):
        assert learned([parts.train(model, t, optimizer, data[t], 10)])
        for earlier, out in want.items():
            assert torch.equal(parts.logits(model, earlier, data[0][0]), out)
        want[t] = parts.logits(model, t, data[0][0])
        if t == 0:
            live = next(h for h in held(model) if h.param is model[3]._parameters["weight"]).live(0)
            assert bool((model[3]._parameters["weight"] != before)[live].all())
    assert hatcl.certify(model, data[0][0]).exact


# ---- optimizers in the wild ----------------------------------------------------------------------


def test_several_optimizers(after_one):
    name, model, _, x, want = after_one
    params = list(model.parameters())
    optimizers = [torch.optim.AdamW(params[::2], lr=1e-2), torch.optim.SGD(params[1::2], lr=0.05, momentum=0.9)]
    images, y = parts.problem(parts.shape_of(name), 1)
    losses = []
    with hatcl.learn(model, 1, optimizers, steps=6) as learning:
        for _ in range(6):
            loss = tf.cross_entropy(model(images), y) + learning.penalty()
            for o in optimizers:
                o.zero_grad()
            loss.backward()
            for o in optimizers:
                o.step()
            losses.append(loss.item())
        assert learning.step == 6  # the first optimizer's steps are counted
    still_exact_and_learning(after_one, losses)


@pytest.mark.parametrize("where", ["before", "inside"])
def test_schedulers_wrap_step_too(after_one, where):
    name, model, optimizer, x, want = after_one
    data = parts.problem(parts.shape_of(name), 1)

    def schedule():
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    scheduler = schedule() if where == "before" else None
    images, y = data
    losses, rates = [], []
    with hatcl.learn(model, 1, optimizer, steps=6) as learning:
        scheduler = scheduler or schedule()
        for _ in range(6):
            loss = tf.cross_entropy(model(images), y) + learning.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            rates.append(optimizer.param_groups[0]["lr"])
        assert learning.step == 6
    assert rates == pytest.approx([1e-2 / (1 + s) for s in range(1, 7)])
    still_exact_and_learning(after_one, losses)
    # and the same optimizer and scheduler go on with the next task, and outside any task
    parts.train(model, 2, optimizer, parts.problem(parts.shape_of(name), 2))
    assert torch.equal(parts.logits(model, 0, x), want)
    optimizer.zero_grad()
    optimizer.step()


@pytest.mark.parametrize("had", [False, True], ids=["plain", "scheduled"])
def test_the_optimizer_is_its_own_again_afterwards(had):
    model = parts.converted("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if had:
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = optimizer.step
    with hatcl.learn(model, 0, optimizer, steps=1):
        assert optimizer.step is not before
    assert optimizer.step == before
    assert ("step" in vars(optimizer)) == had


def test_lookahead(after_one):
    name, model, _, x, want = after_one
    optimizer = timm.optim.Lookahead(torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05), k=2)
    losses = parts.train(model, 1, optimizer, parts.problem(parts.shape_of(name), 1), 8)
    still_exact_and_learning(after_one, losses)
    parts.train(model, 2, optimizer, parts.problem(parts.shape_of(name), 2), 3)  # slow weights of task 1 come due
    assert torch.equal(parts.logits(model, 0, x), want)


class Wrapper:
    """The way accelerate and others wrap an optimizer: not an `Optimizer`, but with its face."""

    def __init__(self, inner):
        self.inner = inner

    @property
    def param_groups(self):
        return self.inner.param_groups

    @property
    def state(self):
        return self.inner.state

    def zero_grad(self):
        self.inner.zero_grad()

    def step(self, closure=None):
        return self.inner.step(closure)


def test_a_wrapped_optimizer(after_one):
    name, model, optimizer, *_ = after_one
    losses = parts.train(model, 1, Wrapper(optimizer), parts.problem(parts.shape_of(name), 1))
    still_exact_and_learning(after_one, losses)


def test_gradient_scaler(after_one):
    name, model, optimizer, x, want = after_one
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    images, y = parts.problem(parts.shape_of(name), 1)
    losses = []
    with hatcl.learn(model, 1, optimizer, steps=6) as learning:
        for step in range(6):
            loss = tf.cross_entropy(model(images), y) + learning.penalty()
            optimizer.zero_grad()
            scaler.scale(loss * (torch.inf if step == 2 else 1)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        assert learning.step == 5  # the step that the scaler skipped is none
    still_exact_and_learning(after_one, losses)


def test_a_closure(after_one):
    name, model, *_ = after_one
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    images, y = parts.problem(parts.shape_of(name), 1)
    losses = []
    with hatcl.learn(model, 1, optimizer, steps=4) as learning:

        def closure():
            optimizer.zero_grad()
            loss = tf.cross_entropy(model(images), y) + learning.penalty()
            loss.backward()
            return loss

        for _ in range(4):
            losses.append(optimizer.step(closure).item())
    _, model, _, x, want = after_one
    assert torch.equal(parts.logits(model, 0, x), want)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "options", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"amsgrad": True}], ids=str
)
def test_every_implementation_of_an_optimizer(options):
    model = parts.converted("mlp")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **options)
    x = parts.images("mlp")
    want = {}
    for t in range(3):
        parts.train(model, t, optimizer, parts.problem(parts.shape_of("mlp"), t))
        want[t] = parts.logits(model, t, x)
        assert all(torch.equal(parts.logits(model, e, x), want[e]) for e in want)


def test_parameters_that_join_the_optimizer_inside_the_block():
    model = parts.pretend(parts.converted("mlp"), tasks=[0])
    x = parts.images("mlp")
    want = parts.logits(model, 0, x)
    own = hatcl.task_parameters(model, 1)
    optimizer = Shake(own)
    with hatcl.learn(model, 1, optimizer, steps=1):
        optimizer.add_param_group({"params": [p for p in model.parameters() if all(p is not q for q in own)]})
        optimizer.step()
    assert torch.equal(parts.logits(model, 0, x), want)


def test_embeddings_stay_within_their_clamp_and_follow_their_own_rate():
    steps = {}
    for scale in (1.0, 0.5):
        model = parts.converted("mlp", embedding_lr_scale=scale)
        before = model.hat_gates.embeddings[0].detach().clone()
        optimizer = Shake(model.parameters())
        torch.manual_seed(3)
        with hatcl.learn(model, 0, optimizer, steps=60) as learning:
            optimizer.step()
            steps[scale] = model.hat_gates.embeddings[0].detach() - before
            for _ in range(59):
                optimizer.step()
                assert model.hat_gates.embeddings[0].abs().max() <= learning.config.clamp
    # the same draws, half the step; 1e-6 is what float32 loses adding 0.1 to a number of size 3
    assert torch.allclose(steps[0.5], 0.5 * steps[1.0], atol=1e-6)
