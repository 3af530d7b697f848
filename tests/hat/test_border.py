"""What `hatcl.learn` notices of what is done to the model around and inside its block."""

from __future__ import annotations

import copy
import warnings

import border_parts as border
import parts
import pytest
import timm
import torch
from border_parts import X, adamw, learned, loss_of, out, train
from torch import nn
from torch.nn import functional as tf

import hatcl
from hatcl.functional import same_bits
from hatcl.hat import digests, guard
from hatcl.hat.gates import gates_of

# ---- a state that is loaded ---------------------------------------------------------------------------------------


def load_inside(new, state, strict=True):
    optimizer = adamw(new)
    with hatcl.learn(new, 1, optimizer, steps=10) as learning:
        new.load_state_dict(state, strict=strict)
        for _ in range(10):
            optimizer.zero_grad()
            loss_of(new, 1, learning).backward()
            optimizer.step()


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "inside another module"])
def test_a_state_loaded_inside_is_held(wrapped):
    model, want = learned()
    new = hatcl.convert(border.net(), 3, X)
    whole = nn.Sequential(new) if wrapped else new
    load_inside(whole, {("0." if wrapped else "") + k: v.clone() for k, v in model.state_dict().items()})
    assert hatcl.tasks(new) == [0, 1] and same_bits(out(new, 0), want) and hatcl.certify(new, X).exact


def test_twin_without_noticing_it_is_destroyed(monkeypatch):
    monkeypatch.setattr(guard.Guard, "relock", lambda self, locked: None)
    monkeypatch.setattr(guard.Guard, "put_back", lambda self: [])
    monkeypatch.setattr(digests, "check_sealed", lambda *args: None)
    model, want = learned()
    new = hatcl.convert(border.net(), 3, X)
    load_inside(new, copy.deepcopy(model.state_dict()))
    assert not same_bits(out(new, 0), want)


def test_states_that_do_not_fit_are_refused_before_anything_is_loaded():
    model, want = learned()
    two = copy.deepcopy(model)
    train(two, 1)
    for new, state, text in (
        (hatcl.convert(border.net(), 3, X), two.state_dict(), "in this state task 1 is sealed, and task 1 is being"),
        (copy.deepcopy(model), hatcl.convert(border.net(), 3, X).state_dict(), "in this state task 0 is not sealed"),
    ):
        before = {k: v.clone() for k, v in new.state_dict().items()}
        with pytest.raises(hatcl.TaskError, match=f"load_state_dict: {text}"):
            with hatcl.learn(new, 1, adamw(new), steps=1):
                new.load_state_dict(state)
        assert all(same_bits(v, before[k]) for k, v in new.state_dict().items())


def test_a_plain_state_loaded_inside_does_not_reach_what_is_sealed():
    model, want = learned()
    load_inside(model, {k: v + 1 for k, v in border.net().state_dict().items()}, strict=False)
    assert same_bits(out(model, 0), want) and hatcl.certify(model, X).exact


# ---- structure ----------------------------------------------------------------------------------------------------


def test_heads_that_no_gate_knows_are_warned_about():
    body = hatcl.convert(nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24)), 2, X)
    model = nn.ModuleDict({"body": body, "heads": nn.ModuleList(nn.Linear(24, 3) for _ in range(2))})
    text = "heads.0.weight: the optimizer holds 4 parameters that no gate knows, so they are frozen whole"
    for t in range(2):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with hatcl.learn(model, t, optimizer, steps=1) as learning:
                (model["heads"][t](model["body"](X)).sum() + learning.penalty()).backward()
                optimizer.step()
        assert any(text in str(w.message) for w in warned) == (t == 1)


# ---- one program --------------------------------------------------------------------------------------------------


def test_the_gates_stay_in_the_graph_to_the_last_step():
    """With `find_unused_parameters` and with compiled graphs the last tenth is the same program as the rest."""
    model = hatcl.convert(border.net(), 1, X)
    optimizer = adamw(model)
    with hatcl.learn(model, 0, optimizer, steps=10) as learning:
        for _ in range(10):
            settled = learning.settled
            e = gates_of(model)[0].embeddings[0]
            (grad,) = torch.autograd.grad(model(X).sum(), e, retain_graph=False)
            assert bool((grad == 0).all()) == settled
            optimizer.zero_grad()
            loss_of(model, 0, learning).backward()
            assert e.grad is not None
            optimizer.step()
    assert settled


def statistics(settle, steps, momentum=0.1):
    """A batch norm's running mean when every batch has another mean, and the means of the batches."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4, momentum=momentum), nn.ReLU(), nn.Linear(4, 2))
    model = hatcl.convert(plain, 1, X, config={"settle": settle, "init": "dense"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    means = []
    with hatcl.learn(model, 0, optimizer, steps=steps) as learning:
        model.train()
        for step in range(steps):
            x = X + step
            means.append(tf.linear(x, model[0]._parameters["weight"], model[0]._parameters["bias"]).mean(0))
            (model(x).sum() + learning.penalty()).backward()
            optimizer.step()
    return model[1].hat_tasks[0].running_mean, torch.stack(means).detach()


@pytest.mark.parametrize(("settle", "steps"), [(0.5, 8), (1.0, 5), (0.25, 8)])
def test_statistics_start_as_an_average_of_what_hard_gates_give(settle, steps):
    got, means = statistics(settle, steps)
    assert torch.allclose(got, means[-round(settle * steps) :].mean(0), atol=1e-5)  # measured 2e-6


def test_then_they_move_by_the_momentum_as_ever():
    """Or they would average a whole task's past, where all of it is settled."""
    got, means = statistics(1.0, 30)
    want = means[:10].mean(0)
    for mean in means[10:]:
        want = 0.9 * want + 0.1 * mean
    assert torch.allclose(got, want, atol=1e-4)  # measured 2e-5
    assert not torch.allclose(got, means.mean(0), atol=1.0)


def test_a_momentum_of_none_averages_from_then_on():
    got, means = statistics(0.5, 8, momentum=None)
    assert torch.allclose(got, means[4:].mean(0), atol=1e-5)


def test_a_learning_model_by_a_timm_name_past_settling():
    torch.manual_seed(0)
    model = timm.create_model("hat_test_resnet", num_tasks=2, num_classes=4, verify=False)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    want = None
    for t in range(2):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with hatcl.learn(model, t, optimizer, steps=12) as learning:
            model.train()
            for _ in range(12):
                optimizer.zero_grad()
                (tf.cross_entropy(model(x), y) + learning.penalty()).backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                inside = model(x)
        if t == 0:
            want = parts.logits(model, 0, x)
            assert same_bits(inside, want)  # what is measured inside is what sealing gives
    assert same_bits(parts.logits(model, 0, x), want) and hatcl.certify(model, x).exact


class Gradients(nn.Module):
    """Computes with derivatives of a part of itself, as physics-informed and energy-based models do."""

    def __init__(self, norm):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 24), nn.Linear(24, 1), nn.Linear(8, 3)
        self.norm = norm

    def forward(self, x):
        energy = torch.func.grad(lambda v: self.b(self.norm(self.a(v)).tanh()).sum())
        return self.c(torch.func.vmap(energy)(x))


@pytest.mark.parametrize("norm", [nn.Identity(), nn.LayerNorm(24), nn.RMSNorm(24)], ids=["", "layer", "rms"])
def test_a_forward_with_functional_transforms(norm):
    torch.manual_seed(0)
    model = hatcl.convert(Gradients(norm), 2, X)
    train(model, 0)
    want = out(model, 0)
    train(model, 1)
    assert same_bits(out(model, 0), want) and hatcl.certify(model, X).exact
