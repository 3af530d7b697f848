"""Copies that are averaged with a model while it learns: they evaluate its task, keep what is sealed, and can be
sealed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from border_parts import X, adamw, learned, loss_of, out, train
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import hatcl
from hatcl.functional import same_bits
from hatcl.hat import build
from hatcl.hat.digests import record
from hatcl.hat.held import held

KINDS = {
    "timm v3": (lambda m: ModelEmaV3(m, decay=0.5), "update"),
    "timm v2": (lambda m: ModelEmaV2(m, decay=0.7), "update"),
    "averaged": (lambda m: AveragedModel(m, avg_fn=lambda a, p, n: 0.3 * a + 0.7 * p), "update_parameters"),
    "averaged buffers": (
        lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True), "update_parameters",
    ),
}  # fmt: skip


def plain(model):
    with torch.no_grad():
        return model.eval()(X).clone()


def learn_beside(model, task, ema, update, steps=10, look=None):
    optimizer = adamw(model)
    with hatcl.learn(model, task, optimizer, steps=steps) as learning:
        ema = ema or look("make")
        for _ in range(steps):
            model.train()
            optimizer.zero_grad()
            loss_of(model, task, learning).backward()
            optimizer.step()
            getattr(ema, update)(model)
            look(ema.module)
    return ema


@pytest.mark.parametrize("inside", [False, True], ids=["before", "inside"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_averaged_copy(kind, inside):
    make, update = KINDS[kind]
    model, want = learned()
    with torch.no_grad():  # an average of two -0.0 is 0.0
        dead = (~model[0]._hat.params["weight"].live(0, torch.device("cpu"))).expand(24, 8)
        assert bool((~dead).any())
    seen = []

    def look(at):
        if at == "make":
            return make(model)
        said = plain(at)
        assert at.hat_gates.task == 1 and same_bits(out(at, 0), want)
        with hatcl.task(at, 1), torch.no_grad():
            assert same_bits(at(X), said)
        seen.append(said)

    ema = learn_beside(model, 1, None if inside else make(model), update, look=look)
    copied = ema.module
    assert not same_bits(seen[-1], seen[0])
    assert same_bits(plain(copied), seen[-1])  # the block is left, and it evaluates the same
    hatcl.seal(copied)
    own = out(copied, 1)
    assert same_bits(own, seen[-1]) and hatcl.certify(copied, X).exact and hatcl.tasks(copied) == [0, 1]
    assert not torch.equal(own, out(model, 1))

    learn_beside(model, 2, ema, update, look=lambda at: at.hat_gates.task == 2 or pytest.fail("it does not follow"))
    getattr(ema, update)(model)
    plain(copied)
    assert same_bits(out(copied, 0), want) and same_bits(out(copied, 1), own)
    hatcl.seal(copied)
    assert hatcl.tasks(copied) == [0, 1, 2] and hatcl.certify(copied, X).exact


@pytest.mark.parametrize("kind", ["timm v2", "averaged"])
def test_twin_without_putting_back_an_average_of_equal_numbers_rounds(kind, monkeypatch):
    monkeypatch.setattr(build, "refresh_copy", lambda model: None)
    make, update = KINDS[kind]
    model, want = learned()
    ema = learn_beside(model, 1, make(model), update, look=lambda at: None)
    assert not same_bits(out(ema.module, 0), want)


def test_a_copy_that_nobody_looked_at_inside_the_block():
    model, want = learned()
    ema = learn_beside(model, 1, ModelEmaV3(model, decay=0.5), "update", look=lambda at: None)
    assert same_bits(out(ema.module, 0), want)
    hatcl.seal(ema.module)
    assert ema.module.hat_gates.task == 1 and hatcl.certify(ema.module, X).exact


def test_a_copy_is_its_owners_to_write_to():
    model, want = learned()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied[3]._parameters["weight"].mul_(1.5)
    assert not same_bits(out(copied, 0), want)
    with pytest.raises(hatcl.IntegrityError, match="3.weight"):
        hatcl.certify(copied, X)


def test_a_state_that_is_loaded_into_a_copy_is_no_average():
    model, want = learned()
    copied = copy.deepcopy(model)
    copied.load_state_dict(model.state_dict())
    train(model, 1)
    assert copied.hat_gates.task == 0 and same_bits(plain(copied), want)


def test_minus_zero_survives_in_a_copy():
    model, _ = learned()
    live = model[0]._hat.params["weight"].live(0, torch.device("cpu")).expand(24, 8)
    with torch.no_grad():
        model[0]._parameters["weight"].copy_(torch.where(live, -0.0, model[0]._parameters["weight"]))
    record(model, 0)
    ema = learn_beside(model, 1, ModelEmaV3(model, decay=0.5), "update", look=plain)
    weight = ema.module[0]._parameters["weight"]
    assert bool(weight[live].signbit().all())


def test_a_teacher_keeps_its_task():
    """A copy that nothing writes to does not follow."""
    model, want = learned()
    teacher = copy.deepcopy(model)
    train(model, 1)
    assert teacher.hat_gates.task == 0 and same_bits(plain(teacher), want)
    assert pickle.loads(pickle.dumps(model)).hat_gates.origin is None


def test_a_copy_that_learns_by_itself_follows_nobody():
    model, want = learned()
    copied = copy.deepcopy(model)
    train(copied, 1)
    train(model, 1, torch.optim.SGD(model.parameters(), lr=0.1))
    assert same_bits(out(copied, 0), want) and hatcl.certify(copied, X).exact


def test_what_cannot_be_sealed():
    model, _ = learned()
    with pytest.raises(
        hatcl.TaskError, match="seal: HATSequential is no copy that was averaged with a model that learns"
    ):
        hatcl.seal(copy.deepcopy(model))
    with hatcl.learn(model, 1, adamw(model), steps=1), pytest.raises(hatcl.TaskError, match="task 1 is being learned"):
        hatcl.seal(model, 1)


def test_an_unsealed_copy_says_what_to_do():
    """After the block an update brings the model's gates, and its digests, which are not the average's."""
    model, _ = learned()
    ema = ModelEmaV3(model, decay=0.5)
    learn_beside(model, 1, ema, "update", look=plain)
    ema.update(model)
    with pytest.raises(hatcl.IntegrityError, match=r"task 1 was sealed, but .* hatcl.seal\(copy\) seals what"):
        hatcl.certify(ema.module, X)
    hatcl.seal(ema.module)
    assert hatcl.certify(ema.module, X).exact


# ---- statistics and values of a sealed task -----------------------------------------------------------------------


def with_batch_norm():
    torch.manual_seed(0)
    model = hatcl.convert(nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3)), 2, X)
    train(model, 0)
    return model, out(model, 0)


def test_statistics_of_a_sealed_task_are_not_written_from_outside():
    model, want = with_batch_norm()
    with hatcl.task(model, 0):
        with pytest.warns(UserWarning, match="1: the running statistics of sealed task 0 were not reset"):
            update_bn([X, X + 1], model)
        model.eval()
        assert same_bits(out(model, 0), want)
        model[1].running_mean.zero_()
    with pytest.warns(UserWarning, match="1.running_mean: something wrote to the value that sealed task 0"):
        assert same_bits(out(model, 0), want)
    assert hatcl.certify(model, X).exact
    hatcl.set_task(model, None)
    model[1].reset_running_stats()  # the plain model's are the user's
    assert bool((model[1]._buffers["running_mean"] == 0).all()) and same_bits(out(model, 0), want)


def test_twin_with_the_buffers_themselves_they_are_wiped(monkeypatch):
    model, want = with_batch_norm()
    monkeypatch.setattr(hatcl.HATLayer, "_hat_constant", lambda self, name, raw, task, make: raw)
    with hatcl.task(model, 0):
        model.eval()
        model[1].running_mean.zero_()
    assert not same_bits(out(model, 0), want)


def test_a_write_to_what_a_sealed_task_computes_with_is_undone():
    model, want = learned()
    with hatcl.task(model, 0), torch.no_grad():
        model(X)
        model[0].weight.zero_()
    with pytest.warns(UserWarning, match="0.weight: something wrote to the value that sealed task 0 computes with"):
        assert same_bits(out(model, 0), want)
    assert hatcl.certify(model, X).exact


def test_a_head_of_the_tasks_own_is_handed_out_as_a_copy():
    model, want = learned()
    with hatcl.task(model, 0), torch.no_grad():
        model(X)
        model[5].weight.zero_()
        model[5].bias.data.fill_(1.0)
    own = model[5].hat_tasks[0]
    assert bool((own.weight != 0).any()) and not bool((own.bias == 1).all())
    model[5]._hat.cache.clear()
    assert same_bits(out(model, 0), want) and hatcl.certify(model, X).exact


def test_a_write_that_leaves_no_trace_is_found_by_the_certificate():
    model, want = learned()
    with hatcl.task(model, 0), torch.no_grad():
        model(X)
        model[0].weight.data.zero_()
    assert not same_bits(out(model, 0), want)
    assert not hatcl.certify(model, X).exact
    assert same_bits(out(model, 0), want) and hatcl.certify(model, X).exact


# ---- hard gates cut -----------------------------------------------------------------------------------------------


class Angle(nn.Module):
    """Tells the signs of zeros apart."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 24, bias=False), nn.Linear(8, 24, bias=False), nn.Linear(24, 3)

    def forward(self, x):
        return self.c(torch.atan2(self.a(x), self.b(x)))


def test_signs_of_zero_are_the_same_with_gradients():
    torch.manual_seed(0)
    model = hatcl.convert(Angle(), 2, X)
    train(model, 0)
    with hatcl.task(model, 0):
        assert same_bits(model(X).detach(), out(model, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_foreign_weights_stay_outside(dtype):
    """Zero times infinity is no zero: what is not the task's never enters its arithmetic."""
    model, _ = with_batch_norm()
    model = model.to(dtype)
    x = X.to(dtype)
    want = out(model, 0, x)
    largest = torch.finfo(dtype).max

    def overwrite():
        with torch.no_grad():
            for h in held(model):
                if h.task is None and not h.plain:
                    h.param.copy_(torch.where(h.live(0), h.param, largest))

    overwrite()
    assert bool(want.isfinite().all()) and same_bits(out(model, 0, x), want)
    model.hat_gates.cut = False  # twin: by the folds alone, and nothing that was kept
    model.hat_gates.epoch += 1
    assert not same_bits(out(model, 0, x), want)


def test_a_diverged_task_leaves_half_precision_alone():
    model, _ = with_batch_norm()
    model = model.half()
    x = X.half()
    want = out(model, 0, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e3)
    with pytest.raises(hatcl.NonFiniteLossError), hatcl.learn(model, 1, optimizer, steps=50) as learning:
        for _ in range(50):
            model.train()
            (model(x).float().pow(2).mean() * 100 + learning.penalty()).backward()
            optimizer.step()
    assert same_bits(out(model, 0, x), want) and hatcl.tasks(model) == [0]
