"""Reopening: a sealed task is learned on from where it was, and no other task moves by a bit."""

from __future__ import annotations

import copy
import functools

import parts
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import hatcl
from hatcl.hat import forget as forgetting
from hatcl.hat import learn as learning_
from hatcl.hat.digests import task_digests
from hatcl.hat.gates import gates_of


def sealed(name="mlp", tasks=2, **options):
    """A model that has learned tasks 0, 1, ... of three."""
    return copy.deepcopy(_sealed(name, tasks, tuple(options.items())))


@functools.cache
def _sealed(name, tasks, options):
    model = parts.converted(name, 3, **dict(options))
    torch.manual_seed(0)
    for t in range(tasks):
        learn(model, t, 3)
    return model


def learn(model, task, steps=3, lr=1e-2, seed=0, **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    data = parts.problem(_shape(model), task + 10 * seed)
    return parts.train(model, task, optimizer, data, steps, **options)


def _shape(model):
    first = next(m for m in model.modules() if m._parameters.get("weight") is not None)
    kind = {"HATLinear": "mlp", "HATConv2d": "resnet"}[type(first).__name__]
    return parts.shape_of("vit" if kind == "resnet" and hasattr(model, "patch_embed") else kind)


def order(model):
    return gates_of(model)[0].order.tolist()


@pytest.mark.parametrize("name", parts.MODELS)
def test_a_task_is_learned_on_and_the_others_stay(name):
    model = sealed(name, 3)
    x = parts.images(name)
    want = {t: parts.logits(model, t, x) for t in range(3)}
    bits = gates_of(model)[0].masks[1].clone()
    report = hatcl.reopen_task(model, 1)
    assert report.own > 0 and report.held > 0 and report.copies > 0 and report.units == int(bits.sum())
    assert hatcl.tasks(model) == [0, 2] and torch.equal(gates_of(model)[0].hard(1), bits)
    starts = []

    def inside(step):
        if step == 0:
            starts.append(parts.logits(model, 1, x))

    learn(model, 1, 4, seed=1, inside=inside)
    assert torch.equal(starts[0], want[1]) or name == "resnet"  # a training forward moves running statistics
    assert hatcl.tasks(model) == [0, 1, 2] and not torch.equal(parts.logits(model, 1, x), want[1])
    assert all(torch.equal(parts.logits(model, t, x), want[t]) for t in (0, 2))
    assert hatcl.certify(model, x, strict=True).exact


def test_twin_without_the_guard_the_others_move(monkeypatch):
    model = sealed(tasks=3)
    x = parts.images("mlp")
    want = parts.logits(model, 0, x)
    hatcl.reopen_task(model, 1)
    monkeypatch.setattr(learning_, "locked_tasks", lambda _: [])
    learn(model, 1, 4, seed=1)
    assert not torch.equal(parts.logits(model, 0, x), want)


def test_it_starts_as_what_was_sealed_and_from_bits_alone():
    """In training too: its gates are hard at first, where a rising scale would begin with all of them half open."""
    model = sealed()
    x = parts.images("mlp")
    want = parts.logits(model, 0, x)
    before = parts.snapshot(model)
    hatcl.reopen_task(model, 0)
    e = gates_of(model)[0].embeddings[0]
    assert set(e.tolist()) == {1.0, -1.0}
    with pytest.raises(KeyboardInterrupt), hatcl.learn(model, 0, torch.optim.SGD(model.parameters(), 0.1), 10) as block:
        assert block.reopened and block.scale == 400
        assert torch.allclose(model.train()(x), want, atol=1e-6)  # measured 0: sigmoid(400) is 1 in float32
        raise KeyboardInterrupt
    changed = {k for k, v in parts.snapshot(model).items() if not torch.equal(v, before[k])}
    assert changed == {f"hat_gates.{n}" for n in ("embeddings.0", "masks", "sealed", "order", "digest_table")}


@pytest.mark.parametrize("value, size", [(0.0, 1.0), (-2.5, 2.5), (9.0, 6.0)])
def test_the_size_of_the_embeddings_is_that_of_the_options(value, size):
    model = sealed(tasks=1)
    g = gates_of(model)[0]
    g.config = g.config.replace(init="constant", init_value=value)
    hatcl.reopen_task(model, 0)
    assert g.embeddings[0].abs().unique().tolist() == [size]


def test_sealed_as_it_is_it_is_what_it_was():
    model = sealed()
    x = parts.images("mlp")
    want, digests = parts.logits(model, 0, x), task_digests(model, 0)
    hatcl.reopen_task(model, 0)
    hatcl.seal(model, 0)
    now = task_digests(model, 0)
    assert torch.equal(parts.logits(model, 0, x), want)
    assert {k for k in now if now[k] != digests[k]} == {"hat_gates.embeddings.0"}  # +-e: nothing but its signs counts
    assert hatcl.certify(model, x, strict=True).exact


def test_the_order_of_sealing_is_known():
    model = sealed(tasks=3)
    assert order(model) == [1, 2, 3]
    hatcl.reopen_task(model, 1)
    assert order(model) == [1, -2, 3]
    learn(model, 1)
    assert order(model) == [1, 4, 3]
    hatcl.forget_task(model, 0)
    assert order(model) == [0, 4, 3]
    hatcl.add_tasks(model, 1)
    assert order(model) == [0, 4, 3, 0]


def test_it_goes_on_after_an_interruption():
    model = sealed()
    want = parts.logits(model, 1, parts.images("mlp"))
    hatcl.reopen_task(model, 0)

    def stop(step):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(model, 0, 8, inside=stop)
    assert hatcl.tasks(model) == [1] and order(model)[0] == -1
    again = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
    with hatcl.learn(again, 0, optimizer, 8, start=3) as block:
        assert block.reopened and block.step == 3 and block.scale < 400
        for _ in range(5):
            optimizer.step()
    assert hatcl.tasks(again) == [0, 1]
    assert torch.equal(parts.logits(again, 1, parts.images("mlp")), want)


@pytest.mark.parametrize("how", ["saved", "state", "copied"])
def test_a_reopened_model_stays_reopened(how, tmp_path):
    model = sealed()
    hatcl.reopen_task(model, 0)
    if how == "saved":
        again = hatcl.from_pretrained(hatcl.save_pretrained(model, tmp_path), base=parts.plain("mlp"))
    elif how == "copied":
        again = copy.deepcopy(model)
    else:
        again = parts.converted("mlp", 3)
        again.load_state_dict(model.state_dict())
    assert order(again) == [-1, 2, 0] and hatcl.tasks(again) == [1]
    with pytest.raises(hatcl.TaskError, match="task 0 uses, which is reopened"):
        learn(again, 2)
    learn(again, 0)
    learn(again, 2)
    assert order(again) == [3, 2, 4]


def test_a_state_from_before_the_order_was_kept_is_refused():
    model = sealed()
    state = {k: v for k, v in model.state_dict().items() if not k.endswith(".order")}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*"hat_gates.order"'):
        parts.converted("mlp", 3).load_state_dict(state)


# ---- nothing else may happen meanwhile -----------------------------------------------------------------------------


MEANWHILE = {
    "learn": (lambda m: learn(m, 2), "learn: task 2 would be free to overwrite what task 0 uses, which is reopened"),
    "forget": (lambda m: hatcl.forget_task(m, 1), "forget_task: forgetting task 1 would be free to overwrite what"),
    "reopen": (lambda m: hatcl.reopen_task(m, 1), "reopen_task: task 1 would be free to overwrite what task 0 uses"),
}


@pytest.mark.parametrize("what", MEANWHILE)
def test_meanwhile_no_other_task_is_touched(what):
    model = sealed()
    hatcl.reopen_task(model, 0)
    before = parts.snapshot(model)
    act, text = MEANWHILE[what]
    with pytest.raises(hatcl.TaskError, match=text + ".*seals it as it is"):
        act(model)
    assert parts.same(before, parts.snapshot(model)) and gates_of(model)[0].learning is None
    hatcl.seal(model, 0)
    act(model)


@pytest.mark.parametrize("what, module", [("learn", learning_), ("forget", forgetting)])
def test_twin_without_the_refusal_it_would_be_overwritten(what, module, monkeypatch):
    model = sealed()
    x = parts.images("mlp")
    want = parts.logits(model, 0, x)
    hatcl.reopen_task(model, 0)
    monkeypatch.setattr(module, "check_none_reopened", lambda *_: None)
    MEANWHILE[what][0](model)
    hatcl.seal(model, 0)
    assert not torch.equal(parts.logits(model, 0, x), want)


def test_weights_of_the_plain_model_do_not_take_its_place():
    model = sealed(tasks=1)
    hatcl.reopen_task(model, 0)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(parts.plain("mlp", seed=3).state_dict())


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_reopened():
    model = sealed()
    before = parts.snapshot(model)
    for task, text in [(2, "task 2 is not sealed"), (3, "the model has tasks 0 to 2"), (True, "got True")]:
        with pytest.raises(hatcl.TaskError, match=text):
            hatcl.reopen_task(model, task)
    with hatcl.task(model, 0), pytest.raises(hatcl.TaskError, match="task 0 is active .*before reopening the task"):
        hatcl.reopen_task(model, 0)
    assert parts.same(before, parts.snapshot(model))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(hatcl.TaskError, match="task 2 is being learned; .*before reopening task 0"):
        with hatcl.learn(model, 2, optimizer, 1):
            hatcl.reopen_task(model, 0)
    assert hatcl.tasks(model) == [0, 1]


def test_a_task_with_nothing_of_its_own_is_refused():
    model = sealed(tasks=1)
    g = gates_of(model)[0]
    with torch.no_grad():
        g.embeddings[1].copy_(torch.where(g.masks[0], 1.0, -1.0))
    learn(model, 1, 2, lr=1e-6)
    before = parts.snapshot(model)
    with pytest.raises(hatcl.CapacityError, match=r"all [\d,]+ shared elements .* other sealed tasks \(\[0\]\)"):
        hatcl.reopen_task(model, 1)
    assert parts.same(before, parts.snapshot(model)) and hatcl.tasks(model) == [0, 1]
    hatcl.forget_task(model, 0)
    assert hatcl.reopen_task(model, 1).held == 0


def test_tasks_that_are_not_locked_hold_nothing():
    model = sealed(locked=(1,))
    assert hatcl.reopen_task(copy.deepcopy(model), 1).held == 0 < hatcl.reopen_task(model, 0).held


def test_what_was_sealed_must_be_what_is_there():
    model = sealed()
    with torch.no_grad():
        gates_of(model)[0].masks[0].logical_not_()
    with pytest.raises(hatcl.IntegrityError, match="task 0 was sealed"):
        hatcl.reopen_task(model, 1)
    assert hatcl.tasks(model) == [0, 1]


def test_a_reopened_task_cannot_be_computed_with():
    model = sealed()
    hatcl.set_task(model, 1)
    hatcl.reopen_task(model, 1)
    assert gates_of(model)[0].default is None
    for use in (hatcl.set_task, hatcl.forget_task, hatcl.extract_task):
        with pytest.raises(hatcl.TaskError, match=r"task 1 is reopened and not sealed.*hatcl.seal\(model, 1\)"):
            use(model, 1)


def test_the_report_says_what_can_change():
    model = sealed()
    report = hatcl.reopen_task(model, 0)
    assert report.to_dict()["share_held"] == report.share_held == report.held / (report.held + report.own)
    assert str(report).startswith(f"task 0: reopened with {report.units} units; {report.own:,} shared elements")


def test_an_averaged_copy_is_reopened_too():
    """It follows the task that it had sealed already."""
    model = sealed(tasks=1)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    want = parts.logits(ema.module, 0, parts.images("mlp"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    learn_with = dict(inside=lambda _: ema.update_parameters(model))
    data = parts.problem(parts.shape_of("mlp"), 1)
    parts.train(model, 1, optimizer, data, 4, **learn_with)
    hatcl.seal(ema.module)
    for m in (model, ema.module):
        hatcl.reopen_task(m, 1)
    averaged = parts.snapshot(ema.module)
    parts.train(model, 1, optimizer, data, 4, **learn_with)
    hatcl.seal(ema.module)
    assert hatcl.tasks(ema.module) == [0, 1]
    assert not torch.equal(ema.module[1]._parameters["weight"], averaged["1.weight"])
    assert torch.equal(parts.logits(ema.module, 0, parts.images("mlp")), want)
    assert hatcl.certify(ema.module, parts.images("mlp"), strict=True).exact


@pytest.mark.parametrize("name", ["mlp", pytest.param("vit", marks=pytest.mark.slow)])
def test_after_a_growth_it_begins_as_what_was_sealed_with_the_sizes_of_then(name, tmp_path):
    """In a ViT, heads grow, and attention divides by their width."""
    model, x = sealed(name), parts.images(name)
    want = [parts.logits(model, t, x) for t in (0, 1)]
    hatcl.grow(model, 1.5, example_inputs=x[:2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    hatcl.reopen_task(model, 0)
    hatcl.grow(model, 1.5, example_inputs=x[:2], optimizer=optimizer)
    hatcl.save_pretrained(model, tmp_path)
    for each in (model, copy.deepcopy(model), hatcl.from_pretrained(tmp_path, base=parts.plain(name))):
        hatcl.seal(each, 0)
        assert all(torch.equal(parts.logits(each, t, x), want[t]) for t in (0, 1))
    hatcl.reopen_task(model, 0)
    losses = parts.train(model, 0, optimizer, parts.problem(parts.shape_of(name), 0), 6)
    assert losses[-1] < losses[0] and torch.equal(parts.logits(model, 1, x), want[1])
    g = gates_of(model)[0]
    assert g.stages == [0, 0, 2] and not bool((g.masks[0] & ~g.within(0)).any())
    assert hatcl.certify(model, x, strict=True).exact


def test_after_a_growth_a_batch_norm_learns_with_the_channels_of_then():
    """Its convolution is not gated itself, and so is the one that could hand out its channels of now."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    data = torch.randn(6, 3, 4, 4), torch.arange(6) % 3
    model = parts.pretend(hatcl.convert(plain, 2, data[0], verify=False), [0, 1], share=0.6)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    want = parts.logits(model, 0, data[0])
    hatcl.grow(model, 1.5, optimizer=optimizer, example_inputs=data[0])
    hatcl.reopen_task(model, 1)
    parts.train(model, 1, optimizer, data, 2)
    assert torch.equal(parts.logits(model, 0, data[0]), want) and hatcl.certify(model, data[0]).exact


def test_twin_with_the_sizes_of_now_it_is_another(monkeypatch):
    model, x = sealed("vit"), parts.images("vit")
    want = parts.logits(model, 0, x)
    hatcl.reopen_task(model, 0)
    monkeypatch.setattr(type(gates_of(model)[0]), "reopened", lambda self: [])
    hatcl.grow(model, 1.5, example_inputs=x[:2])
    hatcl.seal(model, 0)
    assert not torch.allclose(parts.logits(model, 0, x), want, atol=1e-5)  # of 1e-4 it was; rounding moves 1e-7


def test_older_than_a_growth_it_has_no_new_units_and_no_new_start():
    model = sealed()
    hatcl.grow(model, 1.5, example_inputs=parts.images("mlp", 2))
    hatcl.reopen_task(model, 0)
    every = {name: torch.ones_like(on) for name, on in hatcl.masks_of(model, 1).items()}
    before = parts.snapshot(model)
    with pytest.raises(hatcl.TaskError, match="masks: task 0 is reopened and was sealed before the network grew"):
        hatcl.hold_gates(model, 0, every)
    with pytest.raises(hatcl.TaskError, match="start_from: task 0 is reopened and was sealed before the network grew"):
        learn(model, 0, start_from=1)
    assert parts.same(parts.snapshot(model), before)


def test_gates_that_were_held_at_first_are_then_those_that_were_sealed():
    """Held for half of its steps, learned, sealed: it begins with what was sealed, not with what it was first given."""
    model, x = sealed(tasks=1), parts.images("mlp")
    first = {name: torch.arange(len(on)) < 20 for name, on in hatcl.masks_of(model, 0).items()}
    hatcl.hold_gates(model, 1, first, until=0.5)
    learn(model, 1, 40, lr=0.3)
    on, want = hatcl.masks_of(model, 1), parts.logits(model, 1, x)
    assert any(not torch.equal(on[name], first[name]) for name in on), "nothing was learned, so nothing is shown"
    hatcl.reopen_task(model, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with hatcl.learn(model, 1, optimizer, 4), torch.no_grad():
        assert torch.equal(model.eval()(x), want)
    assert parts.same(hatcl.masks_of(model, 1), on)
