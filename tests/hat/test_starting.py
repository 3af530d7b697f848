"""`hatcl.learn(start_from=)`: from which task, and what learning makes of it."""

from __future__ import annotations

import copy

import parts
import pytest
import torch

import hatcl
from hatcl.hat import learn as learning
from hatcl.hat.features import features_under
from hatcl.hat.gates import gates_of
from hatcl.hat.lineage import lineage
from hatcl.hat.starting import nearest_neighbours, source_for
from hatcl.hat.tasks import tasks

SHAPE = parts.shape_of("mlp")


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=1e-2)


def learned(name="mlp", count=2, num_tasks=4, **options):
    model = parts.converted(name, num_tasks, **options)
    torch.manual_seed(0)
    for t in range(count):
        parts.train(model, t, adam(model), parts.problem(parts.shape_of(name), t))
    return model


def start(model, task, **options):
    """The model just after the block has begun; it is left by an error."""
    found = {}
    with pytest.raises(KeyboardInterrupt), hatcl.learn(model, task, adam(model), 5, **options):
        found.update(masks=gates_of(model)[0].given[task].clone(), lineage=lineage(model), state=parts.snapshot(model))
        raise KeyboardInterrupt
    return found


@pytest.mark.parametrize("name", ["mlp", "resnet", "vit"])
def test_a_task_that_starts_from_another_is_learned_sealed_and_exact(name):
    model, x = learned(name), parts.images(name, 2)
    before = [parts.logits(model, t, x) for t in range(2)]
    parts.train(model, 2, adam(model), parts.problem(parts.shape_of(name), 2), start_from="previous")
    assert tasks(model) == [0, 1, 2] and lineage(model) == {2: [1]}
    assert all(torch.equal(parts.logits(model, t, x), before[t]) for t in range(2))
    assert hatcl.certify(model, x, strict=True).exact
    g = gates_of(model)[0]
    assert torch.equal(g.masks[2], g.given[2]) and bool((g.masks[2] & g.masks[1]).any())


def test_inside_the_block_the_features_are_the_sources():
    model, x = learned(), parts.images("mlp")
    want = features_under(model, [x], 1)
    with hatcl.learn(model, 2, adam(model), 1, start_from=1):
        got = features_under(model, [x], 2)
        g = gates_of(model)[0]
        shared = g.given[2] & g.masks[1]
        read = torch.as_tensor(model[7]._hat.params["weight"].axes[0].units.numbers) - 1
    # sums in another order
    assert torch.allclose(got[:, shared[read]], want[:, shared[read]], atol=1e-5) and bool(shared[read].any())
    # and every feature of the source is there, at its own place or at another
    assert torch.allclose(got.sum(1), want.sum(1), atol=1e-4) and float(want.abs().sum()) > 0


def test_the_config_says_it_and_the_argument_has_the_last_word():
    model = learned(start_from="previous")
    assert lineage(model) == {1: [0]}
    assert start(copy.deepcopy(model), 2)["lineage"] == {1: [0], 2: [0, 1]}
    assert start(copy.deepcopy(model), 2, start_from=0)["lineage"] == {1: [0], 2: [0]}
    assert start(copy.deepcopy(model), 2, start_from=None)["lineage"] == {1: [0]}


def test_the_task_that_all_start_from_starts_from_none():
    assert lineage(learned(count=3, start_from=0)) == {1: [0], 2: [0]}
    model = parts.converted("mlp", 3, start_from=1)
    with pytest.raises(hatcl.TaskError, match="start_from: task 1 is not sealed"):
        parts.train(model, 0, adam(model), parts.problem(SHAPE))
    with pytest.raises(hatcl.TaskError, match="start_from: got 1, which is the task that is to be learned"):
        parts.train(model, 1, adam(model), parts.problem(SHAPE), start_from=1)


def test_previous_is_the_one_that_was_sealed_last():
    model = parts.pretend(parts.converted("mlp", 5), [0, 4, 1], share=0.4)
    assert source_for(model, 2, "previous") == 1 and source_for(model, 3, "previous") == 1
    model = parts.pretend(parts.converted("mlp", 5), [3, 4], share=0.4)
    assert source_for(model, 0, "previous") == 4
    assert source_for(parts.converted("mlp"), 0, "previous") is None
    assert source_for(parts.converted("mlp"), 0, "best") is None


def test_best_is_where_examples_are_told_apart():
    model = learned(count=3, num_tasks=5)
    x, y = parts.problem(SHAPE, 3, count=64)
    scores = {t: nearest_neighbours(features_under(model, [x], t), y) for t in range(3)}
    best = max(scores, key=lambda t: (scores[t], t))
    assert source_for(model, 3, "best", (x, y)) == best
    batches = [(x[:40], y[:40]), (x[40:], y[40:])]
    assert source_for(model, 3, "best", batches) == best
    assert start(model, 3, start_from="best", examples=(x, y))["lineage"] == {3: [best]}


def test_nearest_neighbours_leave_the_example_itself_out():
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    assert nearest_neighbours(features, torch.tensor([0, 0, 1, 1])) == 1.0
    assert nearest_neighbours(features, torch.tensor([0, 1, 0, 1])) == 0.0  # with itself it would be 1


def test_going_on_does_not_transplant_again():
    model = learned()
    begun = start(model, 2, start_from=1)
    with torch.no_grad():
        model[1]._parameters["weight"].add_(~gates_of(model)[0].used()[:32, None] * 1.0)  # what training did
    before = parts.snapshot(model)
    again = start(model, 2, start_from=1, start=2)
    assert parts.same(before, again["state"]) and torch.equal(again["masks"], begun["masks"])
    assert again["lineage"] == {2: [1]}


def test_a_task_that_has_begun_goes_on_unless_it_is_told_to_start_anew():
    """One that is reopened, or was left by an exception, keeps what it has learned, whatever the config says."""
    model = learned(start_from="previous")
    start(model, 2)
    with torch.no_grad():
        model[1]._parameters["bias"].add_(~gates_of(model)[0].used()[:32] * 1.0)  # what training did
    before = parts.snapshot(model)
    assert parts.same(before, start(copy.deepcopy(model), 2)["state"])
    assert not parts.same(before, start(copy.deepcopy(model), 2, start_from="previous")["state"])
    hatcl.forget_task(model, 1, descendants="forget")
    assert lineage(model) == {}
    assert start(model, 2)["lineage"] == {2: [0]}


def test_gates_that_were_given_stay_and_those_of_an_earlier_start_do_not():
    model = learned()
    wish = {name: torch.ones_like(mask) for name, mask in hatcl.masks_of(model, 0).items()}
    hatcl.hold_gates(model, 2, wish)
    assert bool(start(model, 2, start_from=0)["masks"].all())
    assert bool(start(model, 2, start_from=1)["masks"].all())
    first, again = (start(model, 3, start_from=source)["masks"] for source in (0, 1))
    expected = gates_of(model)[0].masks[1]
    assert not torch.equal(first, again) and int((again & expected).sum()) > int((first & expected).sum())


def test_an_optimizer_that_is_refused_leaves_nothing_begun():
    model = learned()
    before = parts.snapshot(model)
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    with pytest.raises(hatcl.GuardError), hatcl.learn(model, 2, other, 5, start_from=1):
        pass
    after = parts.snapshot(model)
    # the embedding is a new one
    assert all(torch.equal(v, after[k]) for k, v in before.items() if "embeddings.2" not in k)


def test_gates_may_be_learned_after_a_while():
    model = learned(start_hold=0.5, start_from="previous", init_value=0.1)
    g = gates_of(model)[0]
    assert g.given_until[1] == 0.5 and lineage(model) == {1: [0]}
    assert hatcl.certify(model, parts.images("mlp", 2), strict=True).exact


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"start_from": 2}, hatcl.TaskError, r"got 2, which is the task that is to be learned; name a sealed one"),
        ({"start_from": 3}, hatcl.TaskError, r"task 3 is not sealed .* sealed are \[0, 1\]. Name one of these"),
        ({"start_from": 9}, hatcl.TaskError, r"task: got 9, the model has tasks 0 to 3"),
        ({"start_from": -1}, hatcl.ConfigError, r"start_from: got -1, expected the number of a sealed task"),
        ({"start_from": True}, hatcl.ConfigError, r"start_from: got True, expected the number of a sealed task"),
        ({"start_from": "last"}, hatcl.ConfigError, r"start_from: got 'last', .* did you mean 'best'"),
        ({"start_from": "best"}, hatcl.ConfigError, r"got 'best' without examples .* examples=\(inputs, labels\)"),
        (
            {"start_from": "best", "examples": (torch.zeros(3, *SHAPE), torch.zeros(3))},
            hatcl.ConfigError,
            r"got labels float32 of shape \[3\], expected \[B\] integers",
        ),
        (
            {"start_from": "best", "examples": (torch.zeros(3, *SHAPE), torch.zeros(2).long())},
            hatcl.ConfigError,
            "got 3 inputs and 2 labels; expected one label per input",
        ),
        ({"start_from": "best", "examples": 7}, hatcl.ConfigError, r"examples: got int, expected \(inputs, labels\)"),
        ({"start_from": "best", "examples": []}, hatcl.ConfigError, "examples: got 0, expected at least two"),
    ],
)
def test_what_cannot_be_started_from_is_refused_and_changes_nothing(options, kind, text):
    model = learned()
    before = parts.snapshot(model)
    with pytest.raises(kind, match=text), hatcl.learn(model, 2, adam(model), 5, **options):
        pass
    assert parts.same(before, parts.snapshot(model)) and gates_of(model)[0].learning is None


def test_a_task_that_was_forgotten_is_no_source():
    model = learned()
    hatcl.forget_task(model, 1)
    with pytest.raises(hatcl.TaskError, match=r"task 1 is not sealed \(it was never learned, or it was forgotten\)"):
        start(model, 2, start_from=1)


def test_a_task_without_units_is_no_source():
    model = parts.pretend(parts.converted("mlp"), [0], share=0.0)
    with pytest.raises(hatcl.TaskError, match="task 0 uses no unit, only its own head"):
        source_for(model, 1, 0)
    assert source_for(model, 1, "previous") is None


def test_tasks_that_share_nothing_start_from_none():
    with pytest.raises(hatcl.ConfigError, match=r"start_from: got 'previous' with reuse='none'"):
        hatcl.HATConfig(start_from="previous", reuse="none")
    model = learned(reuse="none", count=1)
    with pytest.raises(hatcl.ConfigError, match="in a model of reuse='none'"):
        start(model, 1, start_from=0)


def test_twin_without_the_start_a_task_has_no_lineage(monkeypatch):
    monkeypatch.setattr(learning, "source_for", lambda *_: None)
    model = learned()
    assert start(model, 2, start_from=1)["lineage"] == {}


def test_array_masks_say_which_units_and_start_from_says_which_values():
    model, x = parts.converted("resnet", 4, masks="array:2"), parts.images("resnet", 2)
    torch.manual_seed(0)
    g = gates_of(model)[0]
    want = g.given.clone()
    for t, source in enumerate((None, "previous", "previous")):
        before = parts.snapshot(model)
        parts.train(model, t, adam(model), parts.problem(parts.shape_of("resnet"), t), start_from=source)
        assert torch.equal(g.masks[t], want[t]) and not parts.same(before, parts.snapshot(model))
    assert lineage(model) == {1: [0], 2: [0, 1]}
    assert hatcl.certify(model, x, strict=True).exact
