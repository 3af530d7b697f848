"""Gates that are given are held: nothing is annealed, nothing is penalised, and they are what is sealed."""

from __future__ import annotations

import copy
import functools
import pickle

import parts
import pytest
import torch
from torch.nn import functional as tf

import hatcl
from hatcl.hat.gates import Gates, gates_of, groups_of
from hatcl.hat.held import held


def masks_for(model, task=0, share=0.5):
    """Random gates with a unit on in every layer."""
    generator = torch.Generator().manual_seed(task)
    made = {}
    for name, _, start, stop in groups_of(model):
        made[name] = torch.rand(stop - start, generator=generator) < share
        made[name][task % (stop - start)] = True
    return made


def given(name="mlp", task=0, until=1.0, **options):
    model = parts.converted(name, **options)
    masks = masks_for(model, task)
    hatcl.hold_gates(model, task, masks, until)
    return model, masks


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def same_masks(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", parts.MODELS)
def test_a_task_learns_with_the_gates_that_it_is_given(name):
    model, masks = given(name)
    embedding = gates_of(model)[0].embeddings[0]
    before, data, seen = embedding.detach().clone(), parts.problem(parts.shape_of(name)), []

    def look(step):
        g = gates_of(model)[0]
        assert not g.is_soft(0) and torch.equal(g.select(0, slice(None)).bool(), g.given[0])
        seen.append(embedding.grad)

    losses = parts.train(model, 0, adamw(model), data, 12, inside=look)
    assert min(losses[-2:]) < max(losses[:2])
    assert seen == [None] * 12 and torch.equal(embedding, before)
    assert same_masks(hatcl.masks_of(model, 0), masks)
    assert hatcl.certify(model, data[0], strict=True).exact


def test_without_the_hold_they_are_learned(monkeypatch):
    """Twin: what the test above finds is there because the gates are held."""
    real = Gates.harden
    monkeypatch.setattr(Gates, "harden", lambda self, settled, holding=False: real(self, settled))
    with pytest.raises(AssertionError):
        test_a_task_learns_with_the_gates_that_it_is_given("mlp")


def test_what_trains_is_the_network_that_is_sealed():
    """In training mode too, with gradients: the same numbers as after sealing, and nothing to add for its size."""
    model, _ = given("vit")
    x = parts.images("vit")
    with hatcl.learn(model, 0, adamw(model), steps=1) as learning:
        assert learning.penalty().item() == 0
        trained = model(x).detach()
        tf.mse_loss(model(x), torch.ones(8, parts.CLASSES)).backward()
        live = {h.name: h.live(0) for h in held(model) if h.task is None and not h.plain and h.param.grad is not None}
        grads = {h.name: h.param.grad for h in held(model) if h.name in live}
        assert grads and all(not bool(grads[n][~live[n]].any()) for n in live)
    assert torch.equal(parts.logits(model, 0, x), trained)


def test_one_task_is_given_gates_and_others_learn_theirs():
    model, masks = given("resnet", task=1)
    optimizer, x, want = adamw(model), parts.images("resnet"), {}
    for t in range(3):
        moved = gates_of(model)[0].embeddings[t].detach().clone()
        parts.train(model, t, optimizer, parts.problem(parts.shape_of("resnet"), t), 8)
        assert torch.equal(gates_of(model)[0].embeddings[t], moved) == (t == 1)
        want[t] = parts.logits(model, t, x)
        assert all(torch.equal(parts.logits(model, e, x), want[e]) for e in want)
    assert same_masks(hatcl.masks_of(model, 1), masks)
    assert not same_masks(hatcl.masks_of(model, 0), hatcl.masks_of(model, 2))
    assert hatcl.certify(model, x, strict=True).exact


def test_gates_that_are_held_for_a_while_and_learned_then():
    model, masks = given(until=0.5, settle=0.1)
    x, y = parts.problem(parts.shape_of("mlp"))
    g, embedding = gates_of(model)[0], gates_of(model)[0].embeddings[0]
    start, optimizer, seen = embedding.detach().clone(), adamw(model), []
    with hatcl.learn(model, 0, optimizer, steps=20) as learning:
        for step in range(20):
            penalty = learning.penalty()
            assert g.holding == (step < 10) == (penalty.item() == 0)
            assert torch.equal(embedding, start) == (step <= 10)
            seen.append(learning.scale)
            optimizer.zero_grad()
            (tf.cross_entropy(model(x), y) + penalty).backward()
            assert (embedding.grad is None) == (step < 10)
            optimizer.step()
    assert seen[10] == pytest.approx(1 / 400) and seen[19] == 400 and seen[10:] == sorted(seen[10:])
    assert not torch.equal(embedding, start)
    assert torch.equal(g.masks[0], embedding > 0)


@pytest.mark.parametrize("settle", [0.1, 0.0])
def test_running_statistics_start_anew_as_they_do_for_gates_that_are_learned(settle):
    """The one step that settles takes its batch's. Twin: without settling it moves by the momentum."""
    model, _ = given("resnet", settle=settle)
    norm, means = model.get_submodule("conv1.1"), []
    norm.register_forward_pre_hook(lambda m, args: means.append(args[0].detach().mean((0, 2, 3))))
    parts.train(model, 0, adamw(model), parts.problem(parts.shape_of("resnet")), 10)
    running = norm.hat_tasks[0].running_mean
    assert len(means) == 10 and torch.allclose(running, means[-1], atol=1e-6) == (settle > 0)


def test_left_while_they_are_held_they_are_what_is_sealed():
    model, masks = given(until=0.5)
    with hatcl.learn(model, 0, adamw(model), steps=20):
        pass
    assert same_masks(hatcl.masks_of(model, 0), masks)


def test_an_optimizer_need_not_know_embeddings_that_it_does_not_learn():
    model, masks = given()
    own = {id(e) for e in gates_of(model)[0].embeddings}
    optimizer = torch.optim.SGD([p for p in model.parameters() if id(p) not in own], 0.1)
    parts.train(model, 0, optimizer, parts.problem(parts.shape_of("mlp")), 3)
    assert same_masks(hatcl.masks_of(model, 0), masks)
    with pytest.raises(hatcl.GuardError, match="no optimizer holds task 1's gate embeddings"):
        parts.train(model, 1, optimizer, parts.problem(parts.shape_of("mlp"), 1), 3)


def by_state(model, folder):
    other = parts.converted("mlp")
    other.load_state_dict(model.state_dict())
    return other


def by_file(model, folder):
    hatcl.save_pretrained(model, folder)
    return hatcl.from_pretrained(folder, base=parts.plain("mlp"))


@pytest.mark.parametrize(
    "carry", [by_state, by_file, lambda m, _: copy.deepcopy(m), lambda m, _: pickle.loads(pickle.dumps(m))]
)
def test_they_are_carried_along(carry, tmp_path):
    model, masks = given(until=0.75)
    other = carry(model, tmp_path)
    g = gates_of(other)[0]
    assert torch.equal(g.given, gates_of(model)[0].given) and g.given_until[0] == 0.75
    hatcl.hold_gates(other, 0, masks)
    parts.train(other, 0, adamw(other), parts.problem(parts.shape_of("mlp")), 3)
    assert same_masks(hatcl.masks_of(other, 0), masks)


def test_tasks_that_are_added_are_given_none():
    model, masks = given()
    hatcl.add_tasks(model, 2)
    g = gates_of(model)[0]
    assert g.given.shape[0] == len(g.given_until) == 5 and g.is_given(0) and not g.given[1:].any()
    hatcl.hold_gates(model, 4, masks)


def test_a_task_that_is_forgotten_learns_its_gates_again():
    model, _ = given()
    parts.train(model, 0, adamw(model), parts.problem(parts.shape_of("mlp")), 3)
    hatcl.forget_task(model, 0)
    assert not gates_of(model)[0].given.any() and not gates_of(model)[0].is_given(0)
    moved = gates_of(model)[0].embeddings[0].detach().clone()
    parts.train(model, 0, adamw(model), parts.problem(parts.shape_of("mlp")), 3)
    assert not torch.equal(gates_of(model)[0].embeddings[0], moved)


def test_they_can_be_taken_back():
    model, _ = given()
    hatcl.hold_gates(model, 0, None)
    moved = gates_of(model)[0].embeddings[0].detach().clone()
    parts.train(model, 0, adamw(model), parts.problem(parts.shape_of("mlp")), 3)
    assert not torch.equal(gates_of(model)[0].embeddings[0], moved)


def test_layers_put_together_by_hand():
    first = hatcl.HATLinear(12, 16, num_tasks=2)
    second = hatcl.HATLinear(16, 8, reads=first)
    model = torch.nn.Sequential(first, torch.nn.ReLU(), second, hatcl.TaskIndexedLinear(8, 4, reads=second))
    masks = {"0": torch.arange(16) < 5, "2": torch.arange(8) < 3}
    hatcl.hold_gates(model, 1, masks)
    parts.train(model, 1, torch.optim.Adam(model.parameters(), 1e-2), parts.problem((12,)), 4)
    assert same_masks(hatcl.masks_of(model, 1), masks)


def refused(model, call, error, *texts):
    before = parts.snapshot(model)
    with pytest.raises(error) as caught:
        call()
    for text in texts:
        assert text in str(caught.value)
    assert parts.same(before, model.state_dict())


def changed(name, value):
    return lambda masks: {**{n: m for n, m in masks.items() if n != name}, **({} if value is None else {name: value})}


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda m: 3, "masks: got int, expected a mapping of layers' names to bool tensors, or None"),
        (changed("44", torch.ones(32).bool()), "masks: got '44', which is no layer with units; did you mean '4'?"),
        (changed("4", None), "masks: 4 missing; give a task gates of all layers"),
        (
            changed("4", torch.ones(31).bool()),
            "masks['4']: got bool of shape [31], expected a bool tensor of shape [32]",
        ),
        (changed("4", torch.ones(32)), "masks['4']: got float32 of shape [32], expected a bool tensor"),
        (changed("4", [True] * 32), "masks['4']: got list, expected a bool tensor of shape [32], one per unit"),
        (
            changed("4", torch.zeros(32).bool()),
            "masks['4']: no unit is on, so nothing would pass there; switch at least",
        ),
    ],
)
def test_masks_that_do_not_fit(change, text):
    model = parts.converted("mlp")
    refused(model, lambda: hatcl.hold_gates(model, 0, change(masks_for(model))), hatcl.TaskError, text)


def test_tasks_that_cannot_be_given_gates():
    model = parts.pretend(parts.converted("mlp"), tasks=[0])
    masks = masks_for(model)
    refused(model, lambda: hatcl.hold_gates(model, 0, masks), hatcl.TaskError, "task 0 is sealed and cannot be learned")
    refused(
        model, lambda: hatcl.hold_gates(model, 3, masks), hatcl.TaskError, "task: got 3, the model has tasks 0 to 2"
    )
    refused(model, lambda: hatcl.masks_of(model, 1), hatcl.TaskError, "task 1 is not sealed")
    for until in (0, 1.5, True):
        refused(
            model, functools.partial(hatcl.hold_gates, model, 1, masks, until), hatcl.ConfigError,
            f"until: got {until!r}, expected a share above 0 and at most 1",
        )  # fmt: skip
    with hatcl.learn(model, 1, adamw(model), steps=1) as learning:
        refused(
            model, lambda: hatcl.hold_gates(model, 2, masks), hatcl.TaskError,
            "hold_gates: task 1 is being learned; leave its hatcl.learn block before task 2 is given gates",
        )  # fmt: skip
        learning._advance(1)


def test_under_reuse_none_given_gates_share_no_unit():
    model = parts.converted("mlp", reuse="none")
    optimizer = adamw(model)
    for t in (0, 1):
        hatcl.hold_gates(model, t, {name: torch.arange(32) < 4 + t for name in ("1", "4")})
    parts.train(model, 0, optimizer, parts.problem(parts.shape_of("mlp")), 2)
    refused(
        model, lambda: parts.train(model, 1, optimizer, parts.problem(parts.shape_of("mlp"), 1), 2), hatcl.TaskError,
        "task 1: the gates that it is given have 4 units of 1 on that sealed tasks [0] use, and under reuse='none'",
        "give it other gates (hatcl.hold_gates), or convert the model with reuse='all'",
    )  # fmt: skip
    hatcl.hold_gates(model, 1, {name: torch.arange(32) >= 4 for name in ("1", "4")})
    parts.train(model, 1, optimizer, parts.problem(parts.shape_of("mlp"), 1), 2)
    assert int(gates_of(model)[0].masks.sum(0).max()) == 1


def bad_loss(model):
    """Shared weights before and after a step with a loss that is not finite."""
    shared = [h.param for h in held(model) if h.task is None and not h.plain]
    x, y = parts.problem(parts.shape_of("mlp"))
    optimizer = adamw(model)
    before = [p.detach().clone() for p in shared]
    with pytest.raises(hatcl.NonFiniteLossError) as caught:
        with hatcl.learn(model, 0, optimizer, steps=2):
            (tf.cross_entropy(model(x), y) * float("nan")).backward()
            optimizer.step()
    return str(caught.value), all(map(torch.equal, before, shared))


def test_a_loss_that_is_not_finite_takes_no_step():
    text, still = bad_loss(given()[0])
    assert "task 0: its own weights or their gradients are no longer finite" in text and still


def test_without_the_look_at_the_task_s_own_weights_it_takes_one(monkeypatch):
    """Twin: embeddings that are held have no gradient that would tell."""
    from hatcl.hat.guard import Guard

    monkeypatch.setattr(Guard, "check_finite", lambda self, gradients=False: None)
    assert not bad_loss(given()[0])[1]


def test_under_masks_that_are_given_they_are_held_to_the_end():
    model = parts.converted("mlp", 4, masks="array:2")
    masks = masks_for(model)
    before = parts.snapshot(model)
    with pytest.raises(hatcl.ConfigError, match="until: got 0.5, in a model of masks='array:2'"):
        hatcl.hold_gates(model, 0, masks, until=0.5)
    assert parts.same(parts.snapshot(model), before)


# ---- masks="all" -------------------------------------------------------------------------------------------------

ALL = {"masks": "all", "own_share": 0.5, "start_from": "previous"}


def learned_with_all(name, count=2, **options):
    model = parts.converted(name, 4, **{**ALL, **options})
    torch.manual_seed(0)
    for t in range(count):
        parts.train(model, t, adamw(model), parts.problem(parts.shape_of(name), t))
    return model


@pytest.mark.parametrize("name", parts.MODELS)
def test_every_task_uses_every_unit_and_learns_its_copies(name, recwarn):
    model, x = learned_with_all(name), parts.images(name, 2)
    want = [parts.logits(model, t, x) for t in range(2)]
    shared = {h.name: h.param.detach().clone() for h in held(model) if h.task is None and not h.plain}
    own = {n: p.detach().clone() for n, p in model.named_parameters() if ".hat_tasks.2." in n}
    parts.train(model, 2, adamw(model), parts.problem(parts.shape_of(name), 2))
    assert all(torch.equal(parts.logits(model, t, x), want[t]) for t in range(2))
    now = dict(model.named_parameters())
    assert all(
        torch.equal(now[n], p) for n, p in shared.items() if n in now and gates_of(model)[0].unit_map.entries[n].factors
    )
    assert own and not any(torch.equal(now[n], p) for n, p in own.items() if p.dim() > 1)
    assert all(bool(mask.all()) for t in range(3) for mask in hatcl.masks_of(model, t).values())
    assert hatcl.certify(model, x, strict=True).exact and hatcl.describe(model).room.tasks_left == 1
    assert not [w for w in recwarn if "every unit" in str(w.message) or "no room" in str(w.message)]


def test_with_all_units_a_network_grows_is_saved_and_forgets(tmp_path):
    model, x = learned_with_all("mlp"), parts.images("mlp", 2)
    want = [parts.logits(model, t, x) for t in range(2)]
    hatcl.grow(model, 1.5)
    parts.train(model, 2, adamw(model), parts.problem(parts.shape_of("mlp"), 2))
    assert all(bool(mask.all()) for mask in hatcl.masks_of(model, 2).values())  # those that came as well
    assert not all(bool(mask.all()) for mask in hatcl.masks_of(model, 1).values())
    hatcl.save_pretrained(model, tmp_path)
    again = hatcl.from_pretrained(tmp_path, base=parts.plain("mlp"))
    hatcl.add_tasks(again, 1)
    parts.train(again, 4, adamw(again), parts.problem(parts.shape_of("mlp"), 4))
    hatcl.forget_task(again, 2, descendants="keep")
    parts.train(again, 2, adamw(again), parts.problem(parts.shape_of("mlp"), 5))
    assert all(bool(mask.all()) for t in (2, 4) for mask in hatcl.masks_of(again, t).values())
    for m in (model, again):
        assert all(torch.equal(parts.logits(m, t, x), want[t]) for t in range(2))
        assert hatcl.certify(m, x, strict=True).exact


def test_without_copies_a_later_task_is_told_that_it_learns_its_norms_and_head_alone():
    model = learned_with_all("resnet", 1, own_share=0.0)
    with pytest.warns(UserWarning, match="it learns with its own norms and its head alone"):
        parts.train(model, 1, adamw(model), parts.problem(parts.shape_of("resnet"), 1))


@pytest.mark.parametrize("masks", ["all", "array:2"])
def test_tasks_that_share_units_by_plan_are_refused_where_they_may_share_none(masks):
    text = f"reuse: got 'none' with masks='{masks}', whose tasks share units; take reuse='all'"
    with pytest.raises(hatcl.ConfigError, match=text):
        hatcl.HATConfig(masks=masks, reuse="none", num_tasks=2)
