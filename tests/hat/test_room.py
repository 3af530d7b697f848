"""Room is counted in elements: a task can be learned while there are free ones that its mask could use."""

from __future__ import annotations

import warnings

import parts
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

import hatcl
from hatcl.hat import room
from hatcl.hat.gates import gates_of


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def learn(model, task, steps=2):
    return parts.train(model, task, adamw(model), parts.problem(parts.shape_of("mlp"), task), steps)


def layers(first, second):
    """Masks of the MLP's two layers of 32 units."""
    return {name: torch.isin(torch.arange(32), torch.tensor(list(on))) for name, on in (("1", first), ("4", second))}


def counted(model, masks):
    """Elements of the map that are live for none of the masks (`[U]` bool), and all of them, by brute force."""
    free = total = 0
    for e in gates_of(model)[0].unit_map.entries.values():
        if not e.copied:
            live = torch.zeros(e.shape, dtype=torch.bool)
            for on in masks:
                live |= e.live(torch.cat([torch.ones(1, dtype=torch.bool), on]))
            free, total = free + int((~live).sum()), total + live.numel()
    return free, total


@settings(max_examples=12, deadline=None)
@drawn(st.sampled_from(list(parts.MODELS)), st.integers(0, 3), st.floats(0.1, 0.9), st.integers(0, 99))
def test_what_is_free_is_what_no_sealed_task_holds(name, sealed, share, seed):
    model = parts.pretend(parts.converted(name), tasks=range(sealed), share=share, seed=seed)
    found = hatcl.describe(model)
    masks = [gates_of(model)[0].masks[t] for t in range(sealed)]
    assert (sum(found.room.free.values()), sum(found.room.elements.values())) == counted(model, masks)
    assert [(x["elements"], x["free"]) for x in found.layers] == [
        (found.room.elements[x["name"]], found.room.free[x["name"]]) for x in found.layers
    ]
    assert found.room.closed == [x["name"] for x in found.layers if not x["free"]]
    assert 0 <= found.room.task_free <= found.room.task_size <= sum(found.room.elements.values())
    text = f"{sum(found.room.free.values()):,} of {sum(found.room.elements.values()):,} shared elements are free"
    assert text in str(found) and found.to_dict()["room"]["closed"] == found.room.closed


def test_looking_draws_no_random_numbers():
    model = parts.converted("mlp")
    state = torch.get_rng_state()
    hatcl.describe(model)
    assert torch.equal(torch.get_rng_state(), state)


def halves():
    """Two tasks that use all units, and no more than half of the second layer's weights."""
    model = parts.converted("mlp", num_tasks=4)
    for t, half in enumerate((range(16), range(16, 32))):
        hatcl.hold_gates(model, t, layers(half, half))
        learn(model, t)
    assert bool(gates_of(model)[0].used().all())
    return model


def test_without_a_free_unit_a_task_learns_free_elements():
    model = halves()
    x = parts.images("mlp")
    want = [parts.logits(model, t, x) for t in (0, 1)]
    assert hatcl.describe(model).room.free == {"1": 0, "4": 2 * 16 * 16}
    hatcl.hold_gates(model, 2, layers(range(16), range(16, 32)))
    before = model[4]._parameters["weight"].detach().clone()
    losses = learn(model, 2, 12)
    assert min(losses[-2:]) < max(losses[:2])
    moved = model[4]._parameters["weight"] != before
    assert bool(moved[16:, :16].all()) and not bool(moved[:16, :16].any() or moved[16:, 16:].any())
    assert all(torch.equal(parts.logits(model, t, x), want[t]) for t in (0, 1))
    learn(model, 3)  # by learned gates, what is left


def test_counted_in_units_there_would_be_none(monkeypatch):
    """Twin: the rule of before."""

    def by_units(model, task):
        if bool(gates_of(model)[0].used().all()):
            raise hatcl.CapacityError("no units left")

    monkeypatch.setattr("hatcl.hat.learn.check_room", by_units)
    with pytest.raises(hatcl.CapacityError):
        test_without_a_free_unit_a_task_learns_free_elements()


def refused(model, task, text):
    before = parts.snapshot(model)
    with pytest.raises(hatcl.CapacityError) as caught:
        learn(model, task)
    assert text in str(caught.value) and "grow the network (hatcl.grow), raise HATConfig" in str(caught.value)
    assert parts.same(before, model.state_dict())


def test_gates_that_are_given_must_have_a_free_element():
    model = halves()
    hatcl.hold_gates(model, 2, layers(range(4), range(8)))
    refused(model, 2, "task 2: no room left, sealed tasks hold every element of 1, 4 that it could learn")
    hatcl.hold_gates(model, 2, layers(range(4), range(20)))
    learn(model, 2)


def test_a_task_that_uses_all_leaves_nothing_unless_it_is_not_held():
    model = parts.pretend(parts.converted("mlp"), tasks=[0], share=1.1)
    assert hatcl.describe(model).room.closed == ["1", "4"] and "closed: 1, 4" in str(hatcl.describe(model))
    refused(model, 1, "task 1: no room left, sealed tasks hold every element of 1, 4 that it could learn")
    learn(parts.pretend(parts.converted("mlp", locked=()), tasks=[0], share=1.1), 1)


def with_norms(num_tasks=3, **options):
    """The MLP with batch norms, which every task has of its own."""
    torch.manual_seed(0)
    return hatcl.convert(parts.mlp(norm=torch.nn.BatchNorm1d), num_tasks, parts.images("mlp", 4), config=options)


def test_with_norms_of_its_own_a_task_learns_where_all_is_held():
    """As HAT-CL does, whose dense start leaves later tasks no other room."""
    model = parts.pretend(with_norms(), tasks=[0], share=1.1)
    x = parts.images("mlp")
    want, weights = parts.logits(model, 0, x), model[4]._parameters["weight"].detach().clone()
    own = [p.detach().clone() for p in model[5].hat_tasks[1].parameters()]
    with pytest.warns(UserWarning) as said:
        losses = learn(model, 1, 30)
    text = str(said[0].message)
    assert (
        "task 1: sealed tasks hold every element of 1, 4 that it could share, so it learns with its own norms" in text
    )
    assert "raise HATConfig.penalty_weight (now 0.75) or HATConfig.embedding_lr_scale (now 1) for earlier tasks" in text
    assert losses[-1] < losses[0] / 2 and hatcl.tasks(model) == [0, 1]
    assert not any(torch.equal(a, b) for a, b in zip(own, model[5].hat_tasks[1].parameters(), strict=True))
    assert torch.equal(parts.logits(model, 0, x), want) and torch.equal(model[4]._parameters["weight"], weights)


def test_norms_that_are_frozen_and_norms_that_nothing_reaches_leave_no_room():
    model = parts.pretend(with_norms(), tasks=[0], share=1.1)
    for layer in (model[2], model[5]):
        for p in layer.hat_tasks[1].parameters():
            p.requires_grad_(False)
    refused(model, 1, "task 1: no room left")
    refused(parts.pretend(with_norms(reuse="none"), tasks=[0], share=1.1), 1, "task 1: no room left")


def test_under_reuse_none_room_is_between_units_that_nobody_uses():
    model = parts.converted("mlp", reuse="none", num_tasks=4)
    hatcl.hold_gates(model, 0, layers(range(8), range(16)))
    learn(model, 0)
    found = hatcl.describe(model).room
    assert found.free == {"1": 24 * 49, "4": 16 * 24 + 16}
    assert found.tasks_left == 1  # of 16 units of the second layer
    hatcl.hold_gates(model, 1, layers(range(8, 16), range(16, 32)))
    learn(model, 1)
    assert hatcl.describe(model).room.tasks_left == 0
    with pytest.warns(UserWarning) as said:
        learn(model, 2)
    assert "task 2: under reuse='none' 4 have no unit left, so nothing passes there" in str(said[0].message)


def test_how_many_more_tasks_fit():
    model = parts.converted("mlp", init="dense")
    assert hatcl.describe(model).room.tasks_left == 1  # before the first one, what init switches on
    model = parts.converted("mlp", init="constant", init_value=-1.0, num_tasks=9)
    assert hatcl.describe(model).room.task_size == 0
    hatcl.hold_gates(model, 0, layers(range(8), range(8)))
    learn(model, 0)
    found = hatcl.describe(model).room
    size = 8 * 49 + 8 * 8 + 8
    assert found.task_size == size and found.tasks_left == (32 * 49 + 32 * 33 - size) // size
    given = hatcl.convert(parts.mlp(), 3, parts.images("mlp", 2), masks=lambda t, n, k: torch.arange(k) < 4 + t)
    assert hatcl.describe(given).room.tasks_left == 3
    assert hatcl.describe(given).room.task_size == 4 * 49 + 4 * 4 + 4 == hatcl.describe(given).room.task_free


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_there_is_room_as_long_as_a_unit_is_free(name, monkeypatch):
    """Then the elements need not be counted."""
    monkeypatch.setattr(room, "_free", None)
    model = parts.pretend(parts.converted(name), tasks=[0], share=0.6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        room.check_room(model, 1)
