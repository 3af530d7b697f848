"""Digests of what sealed tasks use: they name whatever changed, and nothing else."""

from __future__ import annotations

import copy

import border_parts as border
import parts
import pytest
import torch
from border_parts import X, learned

import hatcl
from hatcl.hat.digests import record
from hatcl.hat.gates import gates_of
from hatcl.hat.held import held, own_buffers


@pytest.mark.parametrize("what", ["element", "own copy", "statistic", "gate", "constant"])
def test_digests_name_whatever_changed(what):
    model, x = parts.pretend(parts.converted("resnet")), parts.images("resnet")
    model.register_buffer("constant", torch.ones(3))
    for t in hatcl.tasks(model):
        record(model, t)
    g = gates_of(model)[0]
    with torch.no_grad():
        if what == "element":
            h = next(h for h in held(model) if h.task is None and not h.plain)
            index = h.live(1).nonzero()[0]
            h.param[tuple(index)] = torch.nextafter(h.param[tuple(index)], torch.tensor(9.0))  # one bit
            name = h.name
        elif what == "own copy":
            h = next(h for h in held(model) if h.task == 1 and "hat_tasks" in h.name)
            h.param[0] += 1
            name = h.name
        elif what == "statistic":
            name, b = next(own_buffers(model, 1))
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
        for h in held(model):
            if h.task is None and not h.plain:
                h.param[~h.live(0)] += 1
    assert hatcl.certify(model, x).exact


def test_a_state_that_was_tampered_with_is_seen_and_its_parameters_named():
    model, _ = learned()
    state = copy.deepcopy(model.state_dict())
    live = model[3]._hat.params["weight"].live(0, torch.device("cpu"))
    state["3.weight"] += 1e-3 * live
    new = hatcl.convert(border.net(), 3, X)
    new.load_state_dict(state)
    with pytest.raises(hatcl.IntegrityError, match="task 0 was sealed, but 1 of what it uses changed since: 3.weight"):
        hatcl.certify(new, X)


def test_the_digests_of_a_state_have_one_size():
    model, _ = learned()
    fresh = hatcl.convert(border.net(), 3, X)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in fresh.state_dict().items()}
    assert not any("extra_state" in k for k in model.state_dict())
