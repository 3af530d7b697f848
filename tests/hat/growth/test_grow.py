"""A network that gets more units: what it computed before stays bit for bit."""

from __future__ import annotations

import copy

import layer_zoo as zoo
import parts
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import hatcl
from hatcl.hat.binding import Binding
from hatcl.hat.certify import Certificate
from hatcl.hat.gates import gates_of
from hatcl.hat.growth import grow as growing
from hatcl.hat.saving.pretrained import load_pretrained_

GROWS = ["batch_norm2d", "grouped2d", "depthwise1d", "group_norm", "mlp_layer_norm_no_affine", "timm_squeeze_excite"]
GROWS += [
    "timm_StdConv2d",
    "attention",
    "encoder",
    "embedding_max_norm",
    "LSTM",
    "tied_residual",
    "transposed_grouped2d",
]


def everything(model, x, tasks):
    """Each task's outputs in evaluation, without and with gradients."""
    out = {t: parts.logits(model, t, x) for t in tasks}
    for t in tasks:
        with hatcl.task(model.eval(), t):
            out[t, "with gradients"] = model(x).detach()
    return out


@pytest.mark.parametrize("name", ["mlp", "vit", pytest.param("resnet", marks=pytest.mark.slow)])
def test_everything_stays_while_the_network_grows_twice(tmp_path, name):
    model, x = parts.converted(name, 4), parts.images(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
    parts.train(model, 0, optimizer, parts.problem(parts.shape_of(name), 0), 4)
    for t in (1, 2):
        done = [None, *hatcl.tasks(model)]
        want, units = everything(model, x, done), gates_of(model)[0].num_units
        report = hatcl.grow(model, factor=1.5, optimizer=optimizer, example_inputs=x[:2])
        assert report.exact == done and report.units_before == units and not report.left
        assert report.units == gates_of(model)[0].num_units == hatcl.describe(model).units > 1.4 * units
        assert parts.same(everything(model, x, done), want)
        before = parts.logits(model, None, x)
        losses = parts.train(model, t, optimizer, parts.problem(parts.shape_of(name), t), 6)
        assert min(losses[-2:]) < max(losses[:2])
        assert not torch.equal(parts.logits(model, None, x), before), "the plain model has its part in what is learned"
        del want[None], want[None, "with gradients"]
        assert parts.same(everything(model, x, done[1:]), want)
        new = gates_of(model)[0].masks[t].clone()
        new[gates_of(model)[0].number_from(t - 1)[1:] - 1] = False
        assert new.any(), "the task learned after the growth uses new units"
    assert gates_of(model)[0].stages == [0, 1, 2, 2]
    assert hatcl.certify(model, x, strict=True).exact
    want = everything(model, x, [None, 0, 1, 2])
    assert parts.same(everything(copy.deepcopy(model), x, [None, 0, 1, 2]), want)
    hatcl.save_pretrained(model.eval(), tmp_path)
    again = hatcl.from_pretrained(tmp_path, base=parts.plain(name))
    assert parts.same(everything(again, x, [None, 0, 1, 2]), want)
    assert parts.same(parts.snapshot(again), parts.snapshot(model))
    for t in (0, 1, 2):
        small = hatcl.extract_task(again, t, x).model
        with torch.no_grad():
            assert torch.allclose(small(x), want[t], atol=1e-4)
    hatcl.forget_task(again, 0)
    parts.train(again, 0, torch.optim.AdamW(again.parameters(), 1e-2), parts.problem(parts.shape_of(name), 0), 3)
    assert gates_of(again)[0].stages == [2, 1, 2, 2]
    kept = {key: y for key, y in want.items() if key in (1, 2)}
    assert parts.same({t: parts.logits(again, t, x) for t in kept}, kept)
    assert hatcl.certify(again, x, strict=True).exact


@pytest.mark.parametrize("name", GROWS)
def test_every_kind_of_layer(name):
    """Proved by itself: the report says which tasks gave the same bits, and the certificate that none leaks."""
    x = zoo.data(name)[0]
    model = parts.pretend(hatcl.convert(zoo.make(name), 3, x).eval(), [0])
    report = hatcl.grow(model, 1.5, example_inputs=x)
    assert report.exact == [None, 0] and report.units == 1.5 * report.units_before
    parts.pretend(model, [1], own=False, seed=3)
    assert hatcl.certify(model, x, strict=True).exact
    hatcl.extract_task(model, 1, x)  # compares with the model, and raises where it is another network


def test_a_causal_language_model_gets_whole_heads(tmp_path):
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    words = {"input_ids": torch.arange(14).view(2, 7)}
    model = parts.pretend(hatcl.convert(LlamaForCausalLM(config).eval(), 3, words), [0])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def logits(model, task):
        with torch.no_grad(), hatcl.task(model.eval(), task):
            return model(**words).logits

    want = {t: logits(model, t) for t in (None, 0)}
    for t in (1, 2):
        report = hatcl.grow(model, 1.5, optimizer=optimizer)
        assert not report.left and report.units > 1.4 * report.units_before  # three heads become four
        assert all(torch.equal(logits(model, s), y) for s, y in want.items())
        with hatcl.learn(model, t, optimizer, 2):
            for _ in range(2):
                optimizer.zero_grad()
                model(**words, labels=words["input_ids"]).loss.backward()
                optimizer.step()
        want = {s: y for s, y in want.items() if s is not None} | {t: logits(model, t)}
        assert all(torch.equal(logits(model, s), y) for s, y in want.items())
        want[None] = logits(model, None)
    first = model.model.layers[0].self_attn
    assert first.k_proj._hat.shapes["weight"] == (32, 72) and first.q_proj._hat.shapes["weight"] == (64, 72)
    assert hatcl.certify(model, words, strict=True).exact
    hatcl.save_pretrained(model, tmp_path)
    again = hatcl.from_pretrained(tmp_path)
    assert all(torch.equal(logits(again, s), y) for s, y in want.items())


def test_named_layers_get_so_many_new_units():
    model, x = parts.converted("vit", 2), parts.images("vit")
    report = hatcl.grow(model, {"blocks.0.mlp.fc1": 7}, example_inputs=x)
    assert report.layers == {"blocks.0.mlp.fc1": (96, 103)} and report.left == {}
    assert str(report).splitlines()[1] == "blocks.0.mlp.fc1: 96 -> 103"
    heads = hatcl.grow(model, {"blocks.1.attn.qkv": 3}, example_inputs=x)
    assert heads.layers == {"blocks.1.attn.qkv": (64, 68)}, "whole rows: two heads, of queries with keys or of values"
    assert heads.to_dict()["units"] == gates_of(model)[0].num_units == report.units + 4


def test_a_layer_whose_sizes_are_in_the_code():
    class Code(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Linear(8, 12), nn.Linear(12, 16), nn.Linear(16, 3)

        def forward(self, x):
            h = self.one(x).relu()
            return self.head(self.two(h.view(-1, 3, 4).flatten(1).relu()).relu())

    x = torch.randn(4, 8)
    model = parts.pretend(hatcl.convert(Code(), 2, x), [0])
    text = "one: it cannot get 4 new units: .*its forward has sizes of its own .*; leave it out"
    refused(model, hatcl.ConversionError, text, {"one": 4}, example_inputs=x)
    report = hatcl.grow(model, 1.5, example_inputs=x)
    assert report.layers == {"two": (16, 24)} and list(report.left) == ["one"] and "not grown: one: " in str(report)


# ---- protection taken out ------------------------------------------------------------------------


def test_without_the_sizes_of_then_nothing_is_the_same(monkeypatch):
    """The twin: where a sealed task computes with the network of now, its own copies do not even fit."""
    model, x = parts.pretend(parts.converted("mlp", 2), [0]), parts.images("mlp")
    hatcl.grow(model, 1.5, example_inputs=x)
    monkeypatch.setattr(Binding, "under", lambda self, task: self)
    with pytest.raises(RuntimeError, match="size|shape"):
        parts.logits(model, 0, x)


def test_a_growth_that_changes_a_task_is_refused(monkeypatch):
    """The twin of the comparison on a copy: a place that is wrong is seen before the model is touched."""
    from hatcl.hat.growth import grown as growth

    right = growth.Spread.grown

    def wrong(self, x, new=None):
        made = right(self, x, new)
        return made.flip(0) if x.dim() == 2 else made

    model, x = parts.pretend(parts.converted("mlp", 2), [0]), parts.images("mlp")
    monkeypatch.setattr(growth.Spread, "grown", wrong)
    refused(model, hatcl.HATError, "computes another output|changed since", 1.5, example_inputs=x)


# ---- optimizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)]
)
def test_moments_are_carried_over_and_zero_for_what_is_new(make):
    model, x = parts.converted("resnet", 3), parts.images("resnet")
    optimizer = make(model.parameters())
    parts.train(model, 0, optimizer, parts.problem(parts.shape_of("resnet"), 0), 3)
    conv = model.layer1[0].conv1._parameters
    old, state = conv["weight"], dict(optimizer.state[conv["weight"]])
    hatcl.grow(model, 1.5, optimizer=optimizer, example_inputs=x)
    assert old not in optimizer.state
    rows = model.layer1[0].conv1._hat.at(0).spreads["weight"]
    for key, was in state.items():
        now = optimizer.state[conv["weight"]][key]
        if not isinstance(was, torch.Tensor) or was.dim() == 0:
            assert now == was
            continue
        assert now.shape == conv["weight"].shape
        assert torch.equal(rows.of_before(now), was) and was.any()
        assert torch.count_nonzero(now) == torch.count_nonzero(was)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters()} <= held
    parts.train(model, 1, optimizer, parts.problem(parts.shape_of("resnet"), 1), 3)


def test_what_an_optimizer_keeps_of_weights_gets_the_new_weights():
    model, x = parts.converted("mlp", 2), parts.images("mlp")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for p in model.parameters():
        optimizer.state[p]["z"] = p.detach().clone()
    hatcl.grow(model, 1.5, optimizer=[optimizer], example_inputs=x)
    weight = model[1]._parameters["weight"]
    assert torch.equal(optimizer.state[weight]["z"], weight)


def test_an_optimizer_of_before_is_refused_by_name():
    model, x = parts.converted("mlp", 2), parts.images("mlp")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    hatcl.grow(model, 1.5, example_inputs=x)
    text = r"optimizer: it holds 1\.weight as it was before the network grew, .*hatcl\.grow\(model, \.\.\., optimizer="
    with pytest.raises(hatcl.GuardError, match=text):
        parts.train(model, 0, optimizer, parts.problem(parts.shape_of("mlp"), 0), 2)
    parts.train(model, 0, torch.optim.AdamW(model.parameters()), parts.problem(parts.shape_of("mlp"), 0), 2)


def test_an_optimizer_whose_state_cannot_be_carried():
    model, x = parts.converted("mlp", 2), parts.images("mlp")
    factored = torch.optim.SGD(model.parameters(), 0.1)
    factored.state[model[1]._parameters["weight"]]["row"] = torch.ones(32)
    text = r"optimizer: SGD keeps 'row' of shape \[32\] for a parameter of shape \[32, 48\], .*build it again"
    refused(model, hatcl.GuardError, text, 1.5, optimizer=factored, example_inputs=x)
    beside = torch.optim.SGD(model.parameters(), 0.1)
    beside.slow = [p.detach().clone() for p in model.parameters()]
    refused(model, hatcl.GuardError, "SGD keeps tensors in 'slow', outside its state", 1.5, optimizer=beside)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    refused(model, hatcl.GuardError, "holds none of this model's parameters", 1.5, optimizer=other)


# ---- bad input -----------------------------------------------------------------------------------


def refused(model, kind, text, *args, **options):
    """The error says what it must, and every tensor is as it was."""
    before, params = parts.snapshot(model), list(model.parameters())
    with pytest.raises(kind, match=text):
        hatcl.grow(model, *args, **options)
    assert parts.same(before, parts.snapshot(model))
    assert all(p is q for p, q in zip(params, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "factor, text",
    [
        (0.5, "factor: got 0.5, expected a number of at least 1"),
        (True, "factor: got True"),
        (
            1.0,
            "factor: got 1.0, which is less than one new unit in every layer .the widest has 32.; pass at least 1.031",
        ),
        (1.03, "factor: got 1.03, which is less than one new unit"),
        ({}, "factor: got no layer; name those that are to grow"),
        ({"1": 0}, r"factor\['1'\]: got 0, expected an integer of at least 1"),
        ({"1": 0.5}, r"factor\['1'\]: got 0.5"),
        ({"11": 4}, "factor: got '11', which is no layer with units; did you mean '1'. The model has 1, 4"),
    ],
)
def test_growing_by_what_cannot_be(factor, text):
    refused(parts.converted("mlp", 2), hatcl.ConfigError, text, factor, example_inputs=parts.images("mlp"))


def test_growing_what_cannot_grow():
    model, x = parts.converted("mlp", 2), parts.images("mlp")
    with pytest.raises(hatcl.TaskError, match="task 0 is being learned; leave its hatcl.learn block before growing"):
        with hatcl.learn(model, 0, torch.optim.AdamW(model.parameters()), 1):
            hatcl.grow(model, 1.5, example_inputs=x)
    by_hand = nn.Sequential(hatcl.HATLinear(4, 4, num_tasks=1))
    refused(by_hand, hatcl.HATError, "grow: this model was put together by hand, not converted", 1.5)
    refused(model, hatcl.ConfigError, "example_inputs: the model's forward failed on", 1.5, example_inputs=x[:, :2])
    with torch.no_grad():
        broken = parts.pretend(parts.converted("mlp", 2), [0])
        broken[1]._parameters["weight"].add_(1)
    refused(broken, hatcl.IntegrityError, "task 0 was sealed, but", 1.5, example_inputs=x)


def test_a_state_of_a_model_that_grew_otherwise(tmp_path):
    x = parts.images("mlp")
    twice, once = parts.converted("mlp", 2), parts.converted("mlp", 2)
    for more in (8, 8):
        hatcl.grow(twice, {"1": more}, example_inputs=x)
    hatcl.grow(once, {"1": 16}, example_inputs=x)
    with pytest.raises(RuntimeError, match="growth_key: this state belongs to a model that grew differently"):
        once.load_state_dict(twice.state_dict())
    hatcl.save_pretrained(twice, tmp_path)
    with pytest.raises(hatcl.IntegrityError, match=r"converted otherwise than this one \(growths: its sizes differ\)"):
        load_pretrained_(once, tmp_path)
    again = parts.converted("mlp", 2)
    hatcl.grow(again, {"1": 16}, example_inputs=x)
    again.load_state_dict(once.state_dict())
    assert torch.equal(parts.logits(again, None, x), parts.logits(once, None, x))


def test_a_wrapped_model_and_inputs_of_another_kind():
    model, x = parts.converted("mlp", 2), parts.images("mlp")
    ddp = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(ddp)
    ddp.module = model
    refused(ddp, hatcl.HATError, "DistributedDataParallel keeps the parameters that it was built with; grow the model")
    assert hatcl.grow(nn.Sequential(model), 1.5, example_inputs=x).exact == [None]

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.more, self.head = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x, more=True):
            h = self.body(x).relu()
            return self.head(self.more(h).relu() if more else h)

    two = hatcl.convert(Two(), 1, (x.new_ones(2, 8), True))
    text = "grow: on example_inputs = .* the model has 6 units, and 12 on its map; pass inputs of the same kind"
    refused(two, hatcl.ConversionError, text, 1.5, example_inputs=(x.new_ones(2, 8), False))
    each = hatcl.convert(zoo.make("group_norm_each"), 1, zoo.data("group_norm_each")[0])
    refused(each, hatcl.ConversionError, "Sequential: none of its layers can grow; 0: its units go together with", 1.5)


def test_an_adapter_that_grew_is_none_that_peft_knows():
    bert = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    adapted = get_peft_model(BertModel(bert).eval(), LoraConfig(r=4, target_modules=["query"]))
    words = {"input_ids": torch.arange(8).view(2, 4)}
    model = parts.pretend(hatcl.convert(adapted, 2, words), [0])
    report = hatcl.grow(model, 1.5)
    assert list(report.layers.values()) == [(4, 6)] and report.exact == [None, 0]
    factors = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert [tuple(p.shape) for p in factors] == [(16, 6)]
    with pytest.raises(hatcl.TaskError, match="has grown, and peft's config says the rank of before"):
        with hatcl.as_adapter(model, 0):
            pass


def test_an_averaged_copy_of_before():
    model = parts.converted("mlp", 2)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    data = parts.problem(parts.shape_of("mlp"), 0)
    parts.train(model, 0, optimizer, data, 2, inside=lambda step: ema.update_parameters(model))
    hatcl.grow(model, 1.5)
    with pytest.raises(hatcl.TaskError, match="the model that it was copied from has grown since"):
        ema(data[0])


def test_an_averaged_copy_grows_once_it_is_sealed():
    model = parts.converted("mlp", 2)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)).module
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    x, y = parts.problem(parts.shape_of("mlp"), 0)
    averaged = get_ema_multi_avg_fn(0.9)

    def average(step):
        averaged(list(ema.parameters()), [p.detach() for p in model.parameters()], torch.tensor(step + 1))

    parts.train(model, 0, optimizer, (x, y), 4, inside=average)
    units = gates_of(ema)[0].num_units
    with pytest.raises(hatcl.TaskError, match="averaged with a model that learns task 0, which could not continue"):
        hatcl.grow(ema, 1.5)
    assert gates_of(ema)[0].num_units == units
    hatcl.seal(ema)
    want = parts.logits(ema, 0, x)
    hatcl.grow(ema, 1.5)
    assert torch.equal(parts.logits(ema, 0, x), want) and hatcl.certify(ema, x).exact
    parts.train(ema, 1, torch.optim.AdamW(ema.parameters(), 1e-2), (x, y), 4)
    assert torch.equal(parts.logits(ema, 0, x), want)


@pytest.mark.parametrize("protection", ["adahat", "fg_adahat"])
def test_a_model_that_is_protected_by_degrees_grows(protection):
    model, x = parts.converted("mlp", 2, protection=protection), parts.images("mlp")
    parts.train(model, 0, torch.optim.AdamW(model.parameters(), 1e-2), parts.problem(parts.shape_of("mlp"), 0), 4)
    want, g = parts.logits(model, 0, x), gates_of(model)[0]
    mattered = g.importance[0, g.masks[0]] if protection == "fg_adahat" else None
    hatcl.grow(model, 1.5)
    assert torch.equal(parts.logits(model, 0, x), want)
    if mattered is not None:
        assert bool(mattered.any()) and torch.equal(g.importance[0, g.masks[0]], mattered)
    certificate = hatcl.certify(model, x)
    assert not certificate.exact and certificate.max_abs_diff == {0: 0.0} and "by choice" in str(certificate)
    parts.train(model, 1, torch.optim.AdamW(model.parameters(), 1e-2), parts.problem(parts.shape_of("mlp"), 1), 2)
    assert hatcl.tasks(model) == [0, 1]


def test_by_degrees_too_a_growth_in_which_tasks_reach_each_other_is_refused(monkeypatch):
    model = parts.pretend(parts.converted("mlp", 2, protection="adahat"), [0])
    monkeypatch.setattr(growing, "certify", lambda *_, **__: Certificate(False, {0: 0.5}))
    before = parts.snapshot(model)
    with pytest.raises(hatcl.IsolationError, match="these moved: {0: 0.5}"):
        hatcl.grow(model, 1.5)
    assert parts.same(parts.snapshot(model), before)


def test_a_checkpoint_goes_into_a_model_that_grew_alike(tmp_path):
    """Its tasks may have been sealed at other times: their copies get the sizes that they had."""
    x = parts.images("vit")
    model, fresh = parts.pretend(parts.converted("vit", 3), [0]), parts.converted("vit", 3)
    for m in (model, fresh):
        hatcl.grow(m, 1.5, example_inputs=x)
    parts.pretend(model, [1], own=False)
    hatcl.save_pretrained(model, tmp_path)
    for other in (fresh, copy.deepcopy(model)):
        load_pretrained_(other, tmp_path)
        assert gates_of(other)[0].stages == [0, 1, 1]
        assert all(torch.equal(parts.logits(other, t, x), parts.logits(model, t, x)) for t in (None, 0, 1))
    late = parts.converted("vit", 3)
    with pytest.raises(hatcl.IntegrityError, match="converted otherwise than this one"):
        load_pretrained_(late, tmp_path)
    load_pretrained_(late, tmp_path, grow=True)
    assert all(torch.equal(parts.logits(late, t, x), parts.logits(model, t, x)) for t in (None, 0, 1))
    with pytest.raises(hatcl.IntegrityError, match="converted otherwise than this one"):
        load_pretrained_(parts.converted("vit", 3, init="dense"), tmp_path, grow=True)
    gates_of(model)[0].stage_table[2] = 7
    hatcl.save_pretrained(model, tmp_path)
    with pytest.raises(hatcl.IntegrityError, match=r"stage_table says \[0, 1, 7\], expected for each of 3 tasks"):
        load_pretrained_(fresh, tmp_path)


def test_forgetting_a_task_of_before_that_fails_leaves_it_as_it_was(monkeypatch):
    model, x = parts.pretend(parts.converted("mlp", 2), [0]), parts.images("mlp")
    hatcl.grow(model, 1.5, example_inputs=x)
    before, want, plain = parts.snapshot(model), parts.logits(model, 0, x), hatcl.HATLayer._hat_redrawn
    calls = []

    def third_fails(self, shapes=None):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("an initialiser of the user's")
        return plain(self, shapes)

    monkeypatch.setattr(hatcl.HATLayer, "_hat_redrawn", third_fails)
    with pytest.raises(RuntimeError, match="an initialiser"):
        hatcl.forget_task(model, 0)
    assert parts.same(before, parts.snapshot(model)) and torch.equal(parts.logits(model, 0, x), want)
    monkeypatch.undo()
    hatcl.forget_task(model, 0)
    assert gates_of(model)[0].stages == [1, 1]


def test_several_tasks_at_once():
    model, x = parts.pretend(parts.converted("mlp", 3), [0]), parts.images("mlp")
    hatcl.grow(model, 1.5, example_inputs=x)
    parts.pretend(model, [1, 2], own=False)
    ids = [0, 1, 2, 1, 0, 2, 1, 0]
    assert torch.equal(hatcl.forward(model, x, tasks=ids)[0], parts.logits(model, 0, x[[0, 4, 7]])[0])
    with pytest.raises(hatcl.TaskError, match="task 0 was sealed before the network grew and keeps the sizes of then"):
        hatcl.forward(model, x, tasks=ids, fused=True)
