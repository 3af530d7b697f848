"""`HATConfig(own_share=)`: the smallest parameters are each task's own."""

from __future__ import annotations

import copy
import math

import parts
import pytest
import torch
from torch import nn

import hatcl
from hatcl.hat import own_copies, transplant
from hatcl.hat.convert import map_of
from hatcl.hat.features import features_under
from hatcl.hat.gates import gates_of
from hatcl.hat.held import held, live_for
from hatcl.hat.own_copies import CHOSEN, with_own_share

SHARES = (0.0, 0.1, 0.5, 1.0)


@pytest.fixture(scope="module")
def maps():
    nets = {name: parts.plain(name).eval() for name in parts.MODELS}
    return {name: (map_of(net, parts.images(name, 2)), net) for name, net in nets.items()}


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=1e-2)


def learned(name, count=2, **options):
    model = parts.converted(name, 4, **{"own_share": 0.5, "start_from": "previous", **options})
    torch.manual_seed(0)
    for t in range(count):
        parts.train(model, t, adam(model), parts.problem(parts.shape_of(name), t))
    return model


def chosen_of(unit_map):
    return {n: math.prod(e.shape) for n, e in unit_map.entries.items() if e.why == CHOSEN}


@pytest.mark.parametrize("name", parts.MODELS)
def test_the_smallest_parameters_are_copied_up_to_the_share(maps, name):
    """None that is left is smaller than one that was taken, and the next one would be too much. More for more."""
    unit_map, net = maps[name]
    shared = {n: math.prod(e.shape) for n, e in unit_map.entries.items() if not e.copied}
    before: dict[str, int] = {}
    for share in SHARES:
        made = with_own_share(unit_map, net, share)
        taken, room = chosen_of(made), share * sum(shared.values())
        left = {n: size for n, size in shared.items() if n not in taken and unit_map.entries[n].factors}
        assert sum(taken.values()) <= room and before.items() <= taken.items()
        if left:
            assert max(taken.values(), default=0) <= min(left.values())
            assert sum(taken.values()) + min(left.values()) > room
        assert chosen_of(with_own_share(made, net, share)) == taken  # of a map that was found earlier
        assert made.entries.keys() == unit_map.entries.keys() and not chosen_of(unit_map)
        before = taken
    assert before and not left


def test_what_several_modules_hold_stays_one(maps):
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    net[2].weight = net[0].weight
    assert "0.weight" not in chosen_of(with_own_share(map_of(net, torch.randn(2, 6)), net, 1.0))


@pytest.mark.parametrize("name", parts.MODELS)
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_sealed_tasks_stay_bit_equal_and_are_exact(name, share):
    model, x = learned(name, own_share=share), parts.images(name, 2)
    before = [parts.logits(model, t, x) for t in range(2)]
    parts.train(model, 2, adam(model), parts.problem(parts.shape_of(name), 2))
    assert all(torch.equal(parts.logits(model, t, x), before[t]) for t in range(2))
    assert hatcl.certify(model, x, strict=True).exact


def frozen(model):
    """Elements that are frozen for the next task."""
    live = [live_for(h, hatcl.tasks(model)) for h in held(model) if h.task is None and not h.plain]
    return sum(int(x.sum()) for x in live if x is not None)


def test_nothing_of_a_copy_is_frozen_for_the_next_task():
    counts = [frozen(learned("mlp", own_share=share)) for share in (0.0, 0.5, 1.0)]
    assert counts[0] > counts[1] > counts[2] == 0


def test_a_task_starts_with_its_sources_copies():
    model, x = learned("resnet"), parts.images("resnet")
    assert _starts_like_its_source(model, x)


def test_twin_without_them_it_starts_elsewhere(monkeypatch):
    model, x = learned("resnet"), parts.images("resnet")
    monkeypatch.setattr(transplant, "_of_its_own", lambda *_: iter(()))
    assert not _starts_like_its_source(model, x)


def _starts_like_its_source(model, x):
    want = features_under(model, [x], 1)
    with pytest.raises(KeyboardInterrupt), hatcl.learn(model, 2, adam(model), 5):
        got = features_under(model, [x], 2)
        raise KeyboardInterrupt
    # units that stand in for others are at other places: compared as sets of columns, by their sums over the rows
    a, b = (torch.sort(f.sum(0)).values for f in (want, got))
    return torch.allclose(a, b, atol=1e-4 * float(a.abs().max()), rtol=0)


def test_it_is_saved_copied_extracted_and_forgotten(tmp_path):
    model, x = learned("resnet"), parts.images("resnet", 2)
    want = [parts.logits(model, t, x) for t in range(2)]
    hatcl.save_pretrained(model, tmp_path)
    for again in (hatcl.from_pretrained(tmp_path, base=parts.plain("resnet")), copy.deepcopy(model)):
        assert all(torch.equal(parts.logits(again, t, x), want[t]) for t in range(2))
    small = hatcl.extract_task(model, 1, x).model.eval()
    with torch.no_grad():
        assert torch.allclose(small(x), want[1], atol=1e-4)
    kept = hatcl.forget_task(learned("resnet", own_share=0.0), 1, dry_run=True, descendants="keep").share_kept
    report = hatcl.forget_task(model, 1, descendants="keep")
    assert report.share_kept < kept and torch.equal(parts.logits(model, 0, x), want[0])


def test_a_copy_starts_as_the_plain_models_parameter_and_describe_says_so():
    model = parts.converted("mlp", 2, own_share=1.0)
    weight = model[1].hat_tasks[0].weight
    assert torch.equal(weight, model[1].weight) and weight is not model[1].weight
    assert hatcl.describe(model).copies["1.weight"] == CHOSEN
    assert gates_of(model)[0].config.own_share == 1.0


def test_a_network_grows_with_its_copies():
    model, x = learned("mlp"), parts.images("mlp", 2)
    want = [parts.logits(model, t, x) for t in range(2)]
    hatcl.grow(model, 1.5)
    parts.train(model, 2, adam(model), parts.problem(parts.shape_of("mlp"), 2))
    assert all(torch.equal(parts.logits(model, t, x), want[t]) for t in range(2))
    assert hatcl.certify(model, x, strict=True).exact


def test_pairs_of_lora_are_refused(monkeypatch):
    monkeypatch.setattr(own_copies, "is_factor", lambda name: True)
    with pytest.raises(hatcl.ConfigError, match=r"own_share: got 0.5 in a model with LoRA, .* leave own_share out"):
        hatcl.convert(parts.plain("mlp"), 2, parts.images("mlp", 2), config={"own_share": 0.5})


@pytest.mark.parametrize("share", [-0.1, 1.5, "half", True])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(hatcl.ConfigError, match="own_share: got .* expected a share between 0 and 1"):
        hatcl.HATConfig(own_share=share)
