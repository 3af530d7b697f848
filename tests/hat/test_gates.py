"""Gates: how they start, what they are while learned and once sealed, how tasks are chosen and added."""

from __future__ import annotations

import parts
import pytest
import torch

import hatcl
from hatcl.hat.gates import Gates, gates_of


def gates(units=50, **options):
    return Gates(units, hatcl.HATConfig(**{"num_tasks": 3, **options}))


@pytest.mark.parametrize(
    "options, check",
    [
        ({"init": "normal"}, lambda e: abs(float(e.mean())) < 0.1 and abs(float(e.std()) - 1) < 0.1),
        ({"init": "dense"}, lambda e: bool((e == 1).all())),
        ({"init": "dense", "init_value": -2.0}, lambda e: bool((e == 2).all())),
        ({"init": "constant", "init_value": -2.0}, lambda e: bool((e == -2).all())),
        (
            {"init": "sparse"},  # HAT-CL: N(Phi^-1(1/T), 1), of which 1/T is above 0
            lambda e: abs(float((e > 0).float().mean()) - 1 / 3) < 0.05 and abs(float(e.mean()) + 0.431) < 0.1,
        ),
        (
            {"init": "sparse", "init_density": 0.2, "init_value": 2.0},
            lambda e: abs(float((e > 0).float().mean()) - 0.2) < 0.05 and abs(float(e.std()) - 2) < 0.2,
        ),
        ({"init": "sparse", "init_density": 0.0}, lambda e: bool((e == -6).all())),
        ({"init": "sparse", "init_density": 1.0}, lambda e: bool((e == 6).all())),
        (
            {"init": "uniform"},  # HAT: U(0, 2)
            lambda e: 0 <= float(e.min()) < 0.1 and 1.9 < float(e.max()) <= 2 and abs(float(e.mean()) - 1) < 0.1,
        ),
        ({"init": "constant", "init_value": 9.0}, lambda e: bool((e == 6).all())),  # within the clamp
    ],
)
def test_embeddings_start_as_asked(options, check):
    g = gates(2000, **options)
    assert all(check(e.detach()) for e in g.embeddings)
    assert len({id(e) for e in g.embeddings}) == 3


def test_the_active_task_and_the_learned_task_are_two_things():
    g = gates()
    g.learning = 1
    g.task = 1
    assert g.is_soft(g.task)
    with torch.no_grad():
        assert g.is_soft(g.task)
        g.eval()
        assert not g.is_soft(g.task)
        g.soft = True
        assert g.is_soft(g.task)
    g.task = 0
    assert not g.is_soft(g.task)


def test_hard_in_evaluation_is_what_sealing_gives():
    g = gates().eval()
    g.task = g.learning = 0
    with torch.no_grad():
        before = g.select(g.task, slice(None)).clone()
    assert torch.equal(before, (g.embeddings[0] > 0).float())
    g.seal(0)
    g.learning = None
    assert torch.equal(g.select(g.task, slice(None)), before) and torch.equal(g.hard(0), before.bool())


def test_a_sealed_tasks_gates_do_not_follow_its_embedding():
    g = gates()
    g.seal(0)
    before = g.hard(0).clone()
    with torch.no_grad():
        g.embeddings[0].neg_()
    assert torch.equal(g.hard(0), before)


def test_units_that_other_tasks_use_are_out_of_reach_without_reuse():
    g = gates(reuse="none", init="dense")
    g.embeddings[0].data[:20] = -1
    g.seal(0)
    g.seal(1)
    assert torch.equal(g.masks[1], ~g.masks[0])
    g.task = g.learning = 2
    assert g.select(g.task, slice(None)).sum().item() == 0 and not bool(g.hard(2).any())
    model = parts.converted("mlp", reuse="none", init="sparse", init_density=0.5)
    x = parts.images("mlp")
    for t in range(3):
        parts.train(model, t, torch.optim.AdamW(model.parameters(), 1e-2), parts.problem(parts.shape_of("mlp"), t), 4)
    masks = gates_of(model)[0].masks
    assert bool((masks.sum(0) <= 1).all()) and bool(masks.any(1)[0])
    assert hatcl.certify(model, x).exact


@pytest.mark.parametrize("name", parts.MODELS)
def test_tasks_can_be_added(name):
    model = parts.converted(name, 2)
    x = parts.images(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
    for t in range(2):
        parts.train(model, t, optimizer, parts.problem(parts.shape_of(name), t), 4)
    want = {t: parts.logits(model, t, x) for t in range(2)}
    plain = parts.logits(model, None, x)
    hatcl.add_tasks(model, 2)
    assert gates_of(model)[0].config.num_tasks == 4 and hatcl.tasks(model) == [0, 1]
    assert all(torch.equal(parts.logits(model, t, x), want[t]) for t in want)
    assert torch.equal(parts.logits(model, None, x), plain)
    with pytest.raises(hatcl.GuardError, match="no optimizer holds task 2's gate embeddings; .*add_param_group"):
        parts.train(model, 2, optimizer, parts.problem(parts.shape_of(name), 2), 4)
    for t in (2, 3):
        optimizer.add_param_group({"params": hatcl.task_parameters(model, t)})
        losses = parts.train(model, t, optimizer, parts.problem(parts.shape_of(name), t), 6)
        assert min(losses[-2:]) < max(losses[:2])
        want[t] = parts.logits(model, t, x)
        assert all(torch.equal(parts.logits(model, e, x), want[e]) for e in want)
    assert hatcl.certify(model, x, strict=True).exact
    assert hatcl.tasks(model) == [0, 1, 2, 3]


def test_tasks_can_be_added_to_layers_by_hand():
    layer = hatcl.HATLinear(12, 16, num_tasks=1)
    model = torch.nn.Sequential(layer, torch.nn.ReLU(), hatcl.TaskIndexedLinear(16, parts.CLASSES, reads=layer))
    parts.train(model, 0, torch.optim.Adam(model.parameters(), 1e-2), parts.problem((12,), 0), 4)
    x = parts.problem((12,), 0)[0]
    want = parts.logits(model, 0, x)
    hatcl.add_tasks(model, 1)
    parts.train(model, 1, torch.optim.Adam(model.parameters(), 1e-2), parts.problem((12,), 1), 4)
    assert torch.equal(parts.logits(model, 0, x), want)


def test_the_scale_keeps_its_precision_in_a_cast_model():
    model = parts.converted("mlp").to(torch.bfloat16)
    assert gates_of(model)[0].scale.dtype == torch.float32
    assert gates_of(model)[0].embeddings[0].dtype == torch.bfloat16


def test_the_penalty_falls_where_units_go_off():
    model = parts.converted("mlp", penalty_weight=2.0, settle=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    seen = []
    with hatcl.learn(model, 0, optimizer, steps=30) as learning:
        for _ in range(30):
            loss = learning.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
    assert seen[0] == pytest.approx(2.0 * 0.5, abs=0.01)  # at s = 1/400 every gate is a half
    assert not bool(gates_of(model)[0].masks[0].any())


@pytest.mark.parametrize("penalty", ["global", "layer"])
def test_forgiven_units_cost_nothing(penalty):
    model = parts.converted("mlp", penalty=penalty, forgiven=0.6)
    with hatcl.learn(model, 0, torch.optim.SGD(model.parameters(), 0.1), steps=10) as learning:
        assert learning.penalty().item() == 0  # every gate is a half: under the quota
