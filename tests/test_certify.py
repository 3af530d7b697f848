"""The certificate: what it proves, and that it notices what it is for."""

from __future__ import annotations

import json

import parts
import pytest
import torch

import hatcl
from hatcl import guard
from hatcl.certify import attack, difference
from hatcl.gates import gates_of
from hatcl.layers.gated import ParameterPlan


@pytest.fixture(params=parts.MODELS)
def sealed(request):
    return parts.pretend(parts.converted(request.param)), parts.images(request.param)


def test_it_is_exact_and_says_what_it_overwrote(sealed):
    model, x = sealed
    certificate = hatcl.certify(model, x)
    assert certificate.exact and certificate.max_abs_diff == {0: 0.0, 1: 0.0, 2: 0.0}
    for t, count in certificate.overwritten.items():
        shared = sum(int((~h.live(t)).sum()) for h in guard.held(model) if h.task is None and not h.plain)
        assert count >= shared > 0
    assert str(certificate).startswith("exact: tasks 0, 1, 2 are bit-equal with everything else overwritten (at least")


def test_it_leaves_the_model_alone(sealed):
    model, x = sealed
    hatcl.set_task(model, 1)
    model.train()
    before = parts.snapshot(model)
    hatcl.certify(model, x)
    assert parts.same(before, parts.snapshot(model))
    assert model.training and gates_of(model)[0].task == 1


def test_the_attack_overwrites_what_is_not_live_and_nothing_else(sealed):
    model, _ = sealed
    before = {h.name: h.param.detach().clone() for h in guard.held(model)}
    with attack(model, 1):
        for h in guard.held(model):
            moved = h.param.detach() != before[h.name]
            if h.task is None and not h.plain:
                assert torch.equal(moved, ~h.live(1)), h.name
            else:
                assert bool(moved.all()) == (h.task != 1) and bool(moved.any()) == (h.task != 1), h.name
    assert all(torch.equal(h.param, before[h.name]) for h in guard.held(model))


def test_an_error_inside_the_attack_puts_everything_back(sealed):
    model, _ = sealed
    before = parts.snapshot(model)
    with pytest.raises(ZeroDivisionError), attack(model, 0):
        raise ZeroDivisionError
    assert parts.same(before, parts.snapshot(model))


def test_twin_if_less_were_live_the_certificate_would_fail(sealed, monkeypatch):
    """A plan that says an element is not live though the task computes with it."""
    model, x = sealed
    guard.record(model, 0)
    plain = ParameterPlan.live

    def less(self, task, device):
        mask = plain(self, task, device).clone()
        if mask.dim() > 1 and not self.copied:
            mask[..., ::2, :] = False
        return mask

    monkeypatch.setattr(ParameterPlan, "live", less)
    for t in hatcl.tasks(model):
        guard.record(model, t)
    certificate = hatcl.certify(model, x)
    assert not certificate.exact and str(certificate).startswith("NOT exact: of tasks 0, 1, 2, these moved: {0:")
    with pytest.raises(
        hatcl.IsolationError, match="certify: NOT exact: .*Other tasks reach output of task 0 in evaluation; please report the model"
    ):
        hatcl.certify(model, x, strict=True)


@pytest.mark.parametrize("what", ["element", "own copy", "statistic", "gate", "constant"])
def test_digests_name_whatever_changed(what):
    model, x = parts.pretend(parts.converted("resnet")), parts.images("resnet")
    model.register_buffer("constant", torch.ones(3))
    for t in hatcl.tasks(model):
        guard.record(model, t)
    g = gates_of(model)[0]
    with torch.no_grad():
        if what == "element":
            h = next(h for h in guard.held(model) if h.task is None and not h.plain)
            index = h.live(1).nonzero()[0]
            h.param[tuple(index)] = torch.nextafter(h.param[tuple(index)], torch.tensor(9.0))  # one bit
            name = h.name
        elif what == "own copy":
            h = next(h for h in guard.held(model) if h.task == 1 and "hat_tasks" in h.name)
            h.param[0] += 1
            name = h.name
        elif what == "statistic":
            name, b = next(guard.own_buffers(model, 1))
            b += 1
        elif what == "gate":
            g.masks[1, 0] = ~g.masks[1, 0]
            name = "gates 0"
        else:
            model.constant += 1
            name = "constant"
    with pytest.raises(
        hatcl.IntegrityError, match=f"task .* was sealed, .* changed since: .*{name}.*load the last saved"
    ):
        hatcl.certify(model, x)


def test_what_is_not_live_may_change():
    model, x = parts.pretend(parts.converted("resnet"), tasks=[0]), parts.images("resnet")
    with torch.no_grad():
        for h in guard.held(model):
            if h.task is None and not h.plain:
                h.param[~h.live(0)] += 1
    assert hatcl.certify(model, x).exact


def test_nothing_is_sealed_yet():
    with pytest.raises(hatcl.TaskError, match="no task is sealed yet, so there is nothing to prove; learn one"):
        hatcl.certify(parts.converted("mlp"), parts.images("mlp"))


def test_differences_of_what_is_not_a_number():
    nan = torch.tensor([float("nan"), 1.0])
    assert difference(nan, nan.clone()) == 0.0
    assert difference(nan, torch.tensor([float("nan"), 3.0])) == 2.0
    assert difference(nan, torch.tensor([0.0, 1.0])) == float("inf")
    assert difference(torch.tensor([True]), torch.tensor([False])) == float("inf")


def test_describe_counts_what_is_there():
    for name in parts.MODELS:
        model = parts.pretend(parts.converted(name), tasks=[0, 2])
        found = hatcl.describe(model)
        g = gates_of(model)[0]
        assert found.units == g.num_units == sum(layer["units"] for layer in found.layers)
        assert found.use == {t: int(g.masks[t].sum()) for t in (0, 2)}
        assert sum(found.elements.values()) == sum(p.numel() for p in parts.plain(name).parameters())
        for t in (0, 2):
            assert sum(layer["used"][t] for layer in found.layers) == found.use[t]
        assert json.loads(json.dumps(found.to_dict()))["units"] == found.units
        text = str(found)
        assert "task 0" in text and "task 2" in text and "owner and reader known" in text
        assert all(layer["name"] in text for layer in found.layers)
