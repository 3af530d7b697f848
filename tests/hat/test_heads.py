"""Heads: their width, and the values with which they begin."""

from __future__ import annotations

import layer_zoo as zoo
import parts
import pytest
import torch
from head_parts import Scored, TwoHeads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as tf

import hatcl
from hatcl.hat import heads


@pytest.mark.parametrize("name", parts.MODELS)
def test_every_task_may_have_its_own_number_of_classes(name):
    classes = [2, 4, 3]
    model = hatcl.convert(parts.plain(name), 3, parts.images(name), num_classes=classes)
    x, want = parts.images(name), {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
    for t, n in enumerate(classes):
        losses = parts.train(model, t, optimizer, parts.problem(parts.shape_of(name), t, classes=n), 6)
        assert min(losses[-2:]) < max(losses[:2])
        want[t] = parts.logits(model, t, x)
        assert want[t].shape == (8, n)
        assert all(torch.equal(parts.logits(model, e, x), want[e]) for e in want)
    assert hatcl.certify(model, x, strict=True).exact
    assert parts.logits(model, None, x).shape == (8, parts.CLASSES)
    hatcl.forget_task(model, 2)
    parts.train(model, 2, optimizer, parts.problem(parts.shape_of(name), 5, classes=3), 3)
    assert parts.logits(model, 2, x).shape == (8, 3)


def test_numbers_of_classes_that_do_not_fit():
    with pytest.raises(hatcl.ConfigError, match="num_classes: got 2 numbers for 3 tasks; pass one per task"):
        hatcl.convert(parts.plain("mlp"), 3, parts.images("mlp"), num_classes=[2, 4])
    body = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.AvgPool1d(8))
    with pytest.raises(hatcl.ConfigError, match="num_classes: Sequential has no head"):
        hatcl.convert(body, 2, parts.images("mlp"), num_classes=[2, 4])


def test_of_several_heads_the_one_that_is_meant_is_named():
    x = torch.randn(4, 8)
    model = hatcl.convert(TwoHeads(), 2, x, num_classes={"cls": [3, 7]})
    assert [[len(own.weight) for own in head.hat_tasks] for head in (model.cls, model.box)] == [[3, 7], [4, 4]]
    text = r"several heads of different widths, cls \(3\), box \(4\); name the one that is meant, such as num_classes="
    with pytest.raises(hatcl.ConfigError, match=text):
        hatcl.convert(TwoHeads(), 2, x, num_classes=[3, 7])
    with pytest.raises(hatcl.ConfigError, match="num_classes: got 'clss', which is no head; the model has cls, box"):
        hatcl.convert(TwoHeads(), 2, x, num_classes={"clss": [3, 7]})
    with pytest.raises(hatcl.ConfigError, match=r"num_classes\['cls'\]: got 3 numbers for 2 tasks"):
        hatcl.convert(TwoHeads(), 2, x, num_classes={"cls": [3, 7, 9]})
    both = hatcl.convert(TwoHeads(3), 2, x, num_classes=[3, 7])  # as distilled models have them
    assert [[len(own.weight) for own in head.hat_tasks] for head in (both.cls, both.box)] == [[3, 7], [3, 7]]


@pytest.mark.parametrize("named", ["cls", "more", ""])
@pytest.mark.parametrize("tied", [False, True])
def test_what_writes_the_same_classes_is_one_head(tmp_path, named, tied):
    """Whichever part of it is named, all of it gets the width: a task's forward works, and is what is saved."""
    x = torch.randn(16, 8)
    model = hatcl.convert(Scored(tied), 2, x, num_classes={named: [3, 7]})
    assert [len(own.factor) for own in model.hat_tasks] == [3, 7]
    assert not tied or torch.equal(model.cls.hat_tasks[1].weight, model.more.hat_tasks[1].weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for t, n in enumerate((3, 7)):
        with hatcl.learn(model, t, optimizer, 2):
            for _ in range(2):
                optimizer.zero_grad()
                tf.cross_entropy(model(x)[0], torch.arange(16) % n).backward()
                optimizer.step()
    assert hatcl.certify(model, x, strict=True).exact
    hatcl.save_pretrained(model.eval(), tmp_path)
    again = hatcl.from_pretrained(tmp_path, base=Scored(tied))
    for t, n in enumerate((3, 7)):
        with hatcl.task(model, t), hatcl.task(again, t), torch.no_grad():
            assert [y.shape[1] for y in model(x)] == [n, 4]
            assert all(map(torch.equal, model(x), again(x)))
    text = "num_classes: Scored has several heads of different widths, cls \\(3\\), box \\(4\\)"
    with pytest.raises(hatcl.ConfigError, match=text):
        hatcl.convert(Scored(tied), 2, x, num_classes=[3, 7])
    with pytest.raises(hatcl.ConfigError, match="num_classes: 'cls', 'more' write the same classes; name one of them"):
        hatcl.convert(Scored(tied), 2, x, num_classes={"cls": [3, 7], "more": [3, 7]})


def test_one_number_of_classes_is_that_of_every_task():
    model = hatcl.convert(parts.plain("mlp"), 2, parts.images("mlp"), num_classes=5)
    assert [len(own.weight) for own in model[7].hat_tasks] == [5, 5]


def test_a_head_that_is_tied_to_what_all_tasks_share():
    source, x = zoo.make("tied"), zoo.data("tied")[0]
    text = "num_classes: embedding: embedding.weight belongs to all tasks, .* or pass None"
    with pytest.raises(hatcl.ConfigError, match=text):
        hatcl.convert(source, 2, x, num_classes=[3, 7])


@pytest.mark.parametrize("given", [0, -1, 2.0, True, "37", [2, None], {"7": ["a", 2]}, torch.tensor([2, 3])])
def test_what_is_no_number_of_classes(given):
    text = r"num_classes(\['7'\])?: got .*; expected a whole number of 1 or more, or a list of one per task"
    with pytest.raises(hatcl.ConfigError, match=text):
        hatcl.convert(parts.plain("mlp"), 2, parts.images("mlp"), num_classes=given)


# ---- how heads begin ---------------------------------------------------------------------------------------------


def head_of(model):
    (head,) = [
        m for m in model.modules() if hasattr(m, "hat_tasks") and {id(p) for p in m.parameters(False)} & ids(model)
    ]
    return head


def ids(model):
    return heads.head_ids(model)


def begins(model):
    """Per task, does its head begin with the plain model's values?"""
    head = head_of(model)
    return [torch.equal(own.weight, head._parameters["weight"]) for own in head.hat_tasks]


def trained(net, x):
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        tf.cross_entropy(net(x), torch.arange(len(x)) % parts.CLASSES).backward()
        optimizer.step()
    return net.eval()


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_an_untrained_head_is_drawn_for_each_task_and_a_trained_one_is_kept(name):
    x, net = parts.images(name), parts.plain(name).eval()
    torch.manual_seed(0)
    hatcl.convert(net, 4, x[:2], config={"heads": "plain"})
    after = torch.get_rng_state()
    torch.manual_seed(0)
    model = hatcl.convert(net, 4, x[:2])
    assert torch.equal(torch.get_rng_state(), after)  # what the caller draws next stays
    assert begins(model) == [True, False, False, False]
    rows = [own.weight for own in head_of(model).hat_tasks]
    assert not any(torch.equal(a, b) for i, a in enumerate(rows) for b in rows[:i])
    again = hatcl.convert(net, 4, x[:2])  # all processes draw the same
    assert all(torch.equal(a, b.weight) for a, b in zip(rows, head_of(again).hat_tasks, strict=True))
    assert all(heads.is_untrained(head) for head in (head_of(model), head_of(again)))
    assert begins(hatcl.convert(trained(net, x), 4, x[:2])) == [True] * 4


def test_the_option_says_it_otherwise():
    x, net = parts.images("mlp"), parts.plain("mlp").eval()
    assert begins(hatcl.convert(net, 3, x, config={"heads": "plain"})) == [True] * 3
    assert begins(hatcl.convert(trained(net, x), 3, x, config={"heads": "drawn"})) == [True, False, False]
    net[-1].requires_grad_(False)
    assert begins(hatcl.convert(net, 3, x, config={"heads": "drawn"})) == [True] * 3
    with pytest.raises(hatcl.ConfigError, match="heads: got 'fresh', expected one of auto, plain, drawn"):
        hatcl.HATConfig(heads="fresh")


def test_tasks_that_are_added_or_learned_again_have_heads_of_their_own():
    model = parts.converted("mlp", 3)
    hatcl.add_tasks(model, 2)
    assert begins(model) == [True, False, False, False, False]
    parts.train(model, 0, torch.optim.SGD(model.parameters(), 0.1), parts.problem(parts.shape_of("mlp")))
    want = parts.logits(model, 0, parts.images("mlp"))
    hatcl.forget_task(model, 0)
    assert begins(model) == [False] * 5
    parts.train(model, 0, torch.optim.SGD(model.parameters(), 0.1), parts.problem(parts.shape_of("mlp")))
    assert not torch.equal(parts.logits(model, 0, parts.images("mlp")), want)


def test_what_one_parameter_is_in_two_modules_begins_as_one():
    model = hatcl.convert(Scored(tied=True), 3, torch.randn(4, 8))
    own = {}
    for module in model.modules():
        for name, p in module._parameters.items() if hasattr(module, "hat_tasks") else ():
            if id(p) in ids(model):
                own.setdefault(id(p), []).append([c._parameters[name] for c in module.hat_tasks])
    assert all(
        len({str(c.tolist()) for c in column}) == 1 for each in own.values() for column in zip(*each, strict=True)
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 96), st.integers(1, 40), st.booleans(), st.sampled_from(["linear", "conv"]), st.integers(0, 999))
def test_what_torch_drew_is_untrained(read, write, bias, kind, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(read, write, bias) if kind == "linear" else nn.Conv2d(read, write, 3, bias=bias)
    assert heads.is_untrained(layer) and heads.is_untrained(layer.bfloat16())


@pytest.mark.parametrize("start", [nn.init.zeros_, nn.init.trunc_normal_, nn.init.xavier_uniform_, nn.init.ones_])
def test_what_another_initialiser_drew_is_taken_for_trained(start):
    layer = nn.Linear(64, 10)
    start(layer.weight)
    assert not heads.is_untrained(layer)
    others = (nn.Embedding(4, 4), nn.ReLU(), nn.Linear(4, 3, dtype=torch.complex64), nn.Linear(0, 3), nn.Linear(4, 0))
    assert not any(map(heads.is_untrained, others))


@pytest.mark.parametrize(("size", "classes"), [(32, 10), (64, 10), (512, 100)])
def test_a_few_steps_of_training_are_seen(size, classes):
    """Of 60 layers that took ten steps of Adam at 1e-3 none is taken for an untrained one."""
    for seed in range(20):
        torch.manual_seed(seed)
        layer, x = nn.Linear(size, classes), torch.randn(64, size)
        optimizer = torch.optim.Adam(layer.parameters(), 1e-3)
        for _ in range(10):
            optimizer.zero_grad()
            tf.cross_entropy(layer(x), torch.arange(64) % classes).backward()
            optimizer.step()
        assert not heads.is_untrained(layer)
