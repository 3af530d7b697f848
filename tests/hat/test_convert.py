"""The converter: what it computes, what belongs to whom, and that it changes nothing when it fails."""

from __future__ import annotations

import copy
import importlib
import math

import layer_zoo as zoo
import parts
import pytest
import torch
from torch import nn
from torch.nn import functional as tf

import hatcl
from hatcl.hat import guard
from hatcl.hat.convert import map_of
from hatcl.hat.gates import gates_of
from hatcl.hat.layers.gated import HATLayer
from hatcl.map.rules import TRACE_RULES, Rule

converting = importlib.import_module("hatcl.hat.convert")  # `hatcl.convert` itself is the function

# ---- M1 with branches: residual stream, attention, norms over units -------------------------------


class Block(nn.Module):
    """A pre-norm transformer block over tokens, with a class token and positions, every matrix by itself."""

    def __init__(self, width=12, heads=2, hidden=20):
        super().__init__()
        self.heads = heads
        self.words = nn.Embedding(20, width)
        self.position = nn.Parameter(0.3 * torch.randn(1, 7, width))
        self.token = nn.Parameter(0.3 * torch.randn(1, 1, width))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.head = nn.Linear(width, parts.CLASSES)

    def forward(self, index):
        x = torch.cat([self.token.expand(len(index), -1, -1), self.words(index)], 1) + self.position
        h = self.norm1(x)
        q, k, v = (layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(tf.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(tf.gelu(self.up(self.norm2(x))))
        return self.head(self.norm3(x)[:, 0])


def cut_block(model, task, index):
    """The same with every tensor sliced down to what the task has on; heads keep what is left of their channels."""

    def own(name, part):
        return getattr(model.get_submodule(name).hat_tasks[task], part)

    stream = parts.ends(model, "words.weight", task)[0]
    queries, values = parts.ends(model, "q.weight", task)[0], parts.ends(model, "v.weight", task)[0]
    hidden = parts.ends(model, "up.weight", task)[0]
    raw = {n: p.detach() for n, p in model.named_parameters()}

    def linear(x, name, rows, columns):
        weight = raw[f"{name}.weight"][rows][:, columns] if rows is not None else own(name, "weight")[:, columns]
        return tf.linear(x, weight, raw[f"{name}.bias"][rows] if rows is not None else own(name, "bias"))

    def norm(x, name):
        return tf.layer_norm(x, (int(stream.sum()),), own(name, "weight")[stream], own(name, "bias")[stream])

    x = torch.cat([raw["token"][..., stream].expand(len(index), -1, -1), raw["words.weight"][index][..., stream]], 1)
    x = x + raw["position"][..., stream]
    h = norm(x, "norm1")
    q, k = linear(h, "q", queries, stream), linear(h, "k", queries, stream)
    v = linear(h, "v", values, stream)
    size = len(queries) // model.heads
    mixed = []
    for i in range(model.heads):
        mine = slice(i * size, (i + 1) * size)
        at = slice(int(queries[: mine.start].sum()), int(queries[: mine.stop].sum()))
        to = slice(int(values[: mine.start].sum()), int(values[: mine.stop].sum()))
        scores = q[..., at] @ k[..., at].transpose(1, 2) / math.sqrt(size)
        mixed.append(scores.softmax(-1) @ v[..., to])
    x = x + linear(torch.cat(mixed, -1), "out", stream, values)
    x = x + linear(tf.gelu(linear(norm(x, "norm2"), "up", hidden, stream)), "down", stream, hidden)
    return linear(norm(x, "norm3")[:, 0], "head", None, stream)


def test_a_transformer_block_computes_what_the_cut_one_does():
    torch.manual_seed(0)
    index, _ = zoo.data("embedding")
    model = parts.pretend(hatcl.convert(Block(), 3, index).double(), share=0.6)
    assert set(e.why for e in gates_of(model)[0].unit_map.entries.values()) == {"", "norm", "no unit owns it"}
    for t in range(3):
        with torch.no_grad():
            want = cut_block(model, t, index)
        got = parts.logits(model, t, index)
        assert float((got - want).abs().max()) < 1e-10  # float64: measured 1.2e-12
        assert torch.isfinite(want).all() and float(want.abs().max()) > 1e-3


def test_twin_the_cut_of_another_task_is_another_network():
    torch.manual_seed(0)
    index, _ = zoo.data("embedding")
    model = parts.pretend(hatcl.convert(Block(), 3, index).double(), share=0.6)
    with torch.no_grad():
        assert float((parts.logits(model, 0, index) - cut_block(model, 1, index)).abs().max()) > 1e-2


# ---- M5: copies per task --------------------------------------------------------------------------


@pytest.mark.parametrize("name", parts.MODELS)
def test_what_no_unit_owns_is_each_tasks_own_and_starts_from_the_plain_values(name):
    model = parts.converted(name)
    entries = gates_of(model)[0].unit_map.entries
    copied = {e.name for e in entries.values() if e.copied}
    assert any(e.head for e in entries.values())
    for name_, e in entries.items():
        owners = [f for f in e.factors if f.owner]
        assert e.copied == (not owners) or e.why == "norm", name_
        path, _, leaf = name_.rpartition(".")
        module = model.get_submodule(path)
        made = [m for m in getattr(module, "hat_tasks", [])]
        assert (leaf in made[0]._parameters if made else False) == (name_ in copied)
        if name_ in copied:
            assert len(made) == 3
            assert all(torch.equal(m._parameters[leaf], module._parameters[leaf]) for m in made)
            assert len({m._parameters[leaf].data_ptr() for m in made} | {module._parameters[leaf].data_ptr()}) == 4


# ---- heads of different widths --------------------------------------------------------------------


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


class TwoHeads(nn.Module):
    def __init__(self, boxes=4):
        super().__init__()
        self.body, self.cls, self.box = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, boxes)

    def forward(self, x):
        h = self.body(x).relu()
        return self.cls(h), self.box(h)


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


class Scored(nn.Module):
    """Two heads; of the first each class has a factor, and another module adds to it."""

    def __init__(self, tied=False):
        super().__init__()
        self.body, self.cls, self.more, self.box = nn.Linear(8, 16), *(nn.Linear(16, n) for n in (3, 3, 4))
        self.factor = nn.Parameter(torch.ones(3))
        if tied:
            self.more.weight = self.cls.weight

    def forward(self, x):
        h = self.body(x).relu()
        return (self.cls(h) + self.more(h.cos())) * self.factor, self.box(h)


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


# ---- M9: nothing half done ------------------------------------------------------------------------


def unchanged(source, run, error, text):
    before, classes, modes = parts.snapshot(source), [type(m) for m in source.modules()], source.training
    names = [n for n, _ in source.named_modules()]
    with pytest.raises(error, match=text):
        run()
    assert parts.same(before, source.state_dict()) and source.training == modes
    assert [type(m) for m in source.modules()] == classes and [n for n, _ in source.named_modules()] == names
    assert not any(isinstance(m, HATLayer) for m in source.modules())


def test_a_conversion_that_fails_leaves_the_source_as_it_was(monkeypatch):
    source, x = parts.plain("resnet"), parts.images("resnet")
    unchanged(
        source, lambda: hatcl.convert(source, 2, x[:, :2]), hatcl.ConversionError, "its forward failed on example"
    )
    with monkeypatch.context() as patch:
        patch.setattr(HATLayer, "_hat_attach", lambda *args: 1 / 0)  # while modules are being swapped
        unchanged(source, lambda: hatcl.convert(source, 2, x), ZeroDivisionError, "division")
    with monkeypatch.context() as patch:
        patch.setattr(converting, "_leaks", lambda *args: ["conv1.0.weight"])
        text = "other tasks reach a task's output through conv1.0.weight .*verify=False"
        unchanged(source, lambda: hatcl.convert(source, 2, x), hatcl.ConversionError, text)
    with monkeypatch.context() as patch:
        patch.setitem(TRACE_RULES, "convolution", Rule(lambda *args: 1 / 0))
        text = r"conv1.0: the trace cannot follow aten::convolution \(ZeroDivisionError: .*\); please report the model"
        unchanged(source, lambda: hatcl.convert(source, 2, x), hatcl.ConversionError, text)
    assert hatcl.convert(source, 2, x)


def test_the_source_and_the_model_share_nothing():
    source = parts.plain("vit")
    model = hatcl.convert(source, 2, parts.images("vit"))
    mine = {t.untyped_storage().data_ptr() for t in source.state_dict().values()}
    assert not mine & {t.untyped_storage().data_ptr() for t in model.state_dict().values() if t.numel()}


# ---- M7: the attack at conversion -----------------------------------------------------------------


def test_a_parameter_through_which_the_attack_gets_out_becomes_a_copy_per_task():
    """A map with holes: where a gate should act it does not."""
    source, x = parts.plain("mlp"), parts.images("mlp")
    holes = map_of(copy.deepcopy(source).eval(), x)
    holes.folds = {key: axes for key, axes in holes.folds.items() if key[1] not in ("1.weight", "1.bias")}
    holed = parts.pretend(hatcl.convert(source, 2, x, unit_map=copy.deepcopy(holes), verify=False))
    assert parts.leaks(holed, x, 0) is None  # a hard gate cuts also what the folds of the map leave
    gates_of(holed)[0].cut = False
    assert parts.leaks(holed, x, 0) is not None
    model = hatcl.convert(source, 2, x, unit_map=holes)
    copies = hatcl.describe(model).copies
    assert {n for n, why in copies.items() if why == "the attack got out through it"} >= {"1.weight", "1.bias"}
    assert parts.leaks(parts.pretend(model), x, 0) is None


def test_a_leak_that_copies_cannot_close_is_refused():
    class Sneaky(nn.Linear):
        """Keeps its weight where no attribute finds it."""

        def __init__(self, *args):
            super().__init__(*args)
            self.__dict__["secret"] = [self.weight]

        def forward(self, x):
            return tf.linear(x, self.__dict__["secret"][0], self.bias)

    source = nn.Sequential(nn.Flatten(), Sneaky(48, 16), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(hatcl.ConversionError, match="other tasks reach a task's output through .*1.weight"):
        hatcl.convert(source, 2, parts.images("mlp"))


# ---- other ways in --------------------------------------------------------------------------------


def test_a_map_found_earlier_needs_no_inputs():
    source = parts.plain("vit")
    found = map_of(copy.deepcopy(source), parts.images("vit"))
    model = hatcl.convert(source, 2, unit_map=found)
    assert torch.equal(parts.logits(model, None, parts.images("vit")), source.eval()(parts.images("vit")))
    with pytest.raises(hatcl.ConversionError, match=r"the map says shape \[.*\], it has \[.*\]; trace this model anew"):
        hatcl.convert(parts.vit(embed_dim=16), 2, unit_map=found)


def test_options_as_a_mapping_or_a_config():
    x = parts.images("mlp")
    for config in ({"init": "dense", "num_tasks": 4}, hatcl.HATConfig(init="dense", num_tasks=4)):
        model = hatcl.convert(parts.plain("mlp"), None, x, config=config)
        assert gates_of(model)[0].num_tasks == 4 and bool((gates_of(model)[0].embeddings[3] == 1).all())
    assert gates_of(hatcl.convert(parts.plain("mlp"), 2, x, config={"num_tasks": 4}))[0].num_tasks == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", parts.MODELS)
def test_models_of_other_types_convert(name, dtype):
    source = parts.plain(name).to(dtype).eval()
    x = parts.images(name).to(dtype)
    model = hatcl.convert(source, 2, x)
    assert torch.equal(parts.logits(model, None, x), source(x))
    parts.pretend(model)
    assert parts.logits(model, 0, x).dtype == dtype
    assert hatcl.certify(model, x, strict=True).exact


@pytest.mark.parametrize("name", parts.MODELS)
def test_casting_back_and_forth_keeps_sealed_tasks(name):
    model, x = parts.pretend(parts.converted(name)), parts.images(name)
    want = parts.logits(model, 0, x)
    model.double()
    assert hatcl.tasks(model) == [0, 1, 2] and parts.logits(model, 0, x.double()).dtype == torch.float64
    # the same numbers in float64; measured 6e-7
    assert float((parts.logits(model, 0, x.double()) - want).abs().max()) < 1e-5
    model.float()
    assert torch.equal(parts.logits(model, 0, x), want)
    assert hatcl.certify(model, x, strict=True).exact
    model.half()
    assert hatcl.certify(model, x.half(), strict=True).exact


def test_a_module_used_twice_is_one_layer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            x = torch.relu(self.first(x))
            return self.head(torch.relu(self.again(torch.relu(self.again(x)))))

    x = torch.randn(8, 12)
    source = Twice()
    model = hatcl.convert(source, 3, x)
    assert torch.equal(parts.logits(model, None, x), source(x))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    want = {}
    for t in range(3):
        parts.train(model, t, optimizer, parts.problem((12,), t), 6)
        want[t] = parts.logits(model, t, x)
        assert all(torch.equal(parts.logits(model, e, x), want[e]) for e in want)
    assert hatcl.certify(model, x).exact


def test_a_layer_of_ones_own_is_registered_with_one_decorator():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    @hatcl.register(Scaled)
    class HATScaled(hatcl.HATLinear, Scaled):
        pass

    source = nn.Sequential(nn.Flatten(), Scaled(48, 16), nn.Sigmoid(), nn.Linear(16, 4))
    x = parts.images("mlp")
    model = hatcl.convert(source, 2, x)
    assert type(model[1]) is HATScaled and type(model[3]) is hatcl.HATLinear
    assert torch.equal(parts.logits(model, None, x), source(x))
    assert parts.leaks(parts.pretend(model), x, 0) is None


def test_a_class_the_registry_does_not_know_keeps_its_forward():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix, self.shift = nn.Parameter(torch.randn(16, 48) / 7), nn.Parameter(torch.randn(16))
            self.temperature = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return torch.sigmoid(x @ self.matrix.t() + self.shift) * self.temperature

    source = nn.Sequential(nn.Flatten(), Own(), nn.Linear(16, 4))
    x = parts.images("mlp")
    model = hatcl.convert(source, 3, x)
    assert isinstance(model[1], Own) and torch.equal(parts.logits(model, None, x), source(x))
    entries = gates_of(model)[0].unit_map.entries
    assert entries["1.temperature"].copied and not entries["1.matrix"].copied
    optimizer, want = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1), {}
    for t in range(3):
        parts.train(model, t, optimizer, parts.problem(parts.shape_of("mlp"), t), 6)
        want[t] = parts.logits(model, t, x)
        assert all(torch.equal(parts.logits(model, e, x), want[e]) for e in want)
    assert hatcl.certify(model, x, strict=True).exact


def test_transformers_models_take_dicts():
    pytest.importorskip("transformers", reason="needs the extra: pip install 'hatcl[hf]'")
    index, y = zoo.data("transformers_bert")
    mask = torch.ones_like(index)
    mask[::2, 4:] = 0
    inputs = {"input_ids": index, "attention_mask": mask}
    source = zoo.bert()
    model = hatcl.convert(source, 2, inputs)
    assert isinstance(model, type(source))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for t in range(2):
        with hatcl.learn(model, t, optimizer, steps=3) as learning:
            for _ in range(3):
                loss = model(**inputs, labels=(y + t) % parts.CLASSES).loss + learning.penalty()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    assert hatcl.certify(model, inputs, strict=True).exact
    assert guard.sealed_tasks(model) == [0, 1]


# ---- M7: what parameters that start at zero would hide ---------------------------------------------


class Hidden(nn.Module):
    """A branch that adds nothing yet: its scale starts at zero."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.out, self.head = (nn.Linear(*n) for n in ((48, 16), (16, 12), (12, 16), (16, 4)))
        self.scale = nn.Parameter(torch.zeros(16))

    def forward(self, x):
        x = torch.relu(self.stem(x.flatten(1)))
        return self.head(x + self.scale * self.out(torch.relu(self.inner(x))))


def with_a_hole(source, x):
    """Converted on a map in which the gate of the branch's inner layer is missing."""
    holes = map_of(copy.deepcopy(source), x)
    holes.folds = {key: axes for key, axes in holes.folds.items() if not key[1].startswith("inner.")}
    return hatcl.convert(source, 2, x, unit_map=holes)


def leaks_once_the_scale_has_moved(model, x):
    with torch.no_grad():
        model._parameters["scale"].fill_(0.5)
    parts.pretend(model)
    gates_of(model)[0].cut = False  # by its folds alone, as while it learns
    return [parts.leaks(model, x, t) is not None for t in range(2)]


def blamed(model):
    return {n for n, why in hatcl.describe(model).copies.items() if why == "the attack got out through it"}


def test_a_leak_that_zeros_at_the_start_would_hide_is_found_at_conversion():
    x = parts.images("mlp")
    source = Hidden()
    model = with_a_hole(source, x)
    assert blamed(model) >= {"inner.weight", "inner.bias"}
    assert torch.equal(model.scale, torch.zeros(16)) and torch.equal(parts.logits(model, None, x), source(x))
    assert leaks_once_the_scale_has_moved(model, x) == [False, False]


def test_twin_without_the_stir_it_is_not_found(monkeypatch):
    monkeypatch.setattr(converting, "_stirred", lambda model, inputs: copy.deepcopy(model).eval())
    x = parts.images("mlp")
    model = with_a_hole(Hidden(), x)
    assert blamed(model) == set()
    assert leaks_once_the_scale_has_moved(model, x) == [True, True]


def test_stirring_moves_every_parameter_of_a_copy():
    model = parts.converted("vit")
    before = parts.snapshot(model)
    trial = converting._stirred(model, parts.images("vit"))
    assert parts.same(before, model.state_dict()) and not trial.training and model.training
    kept = dict(model.named_parameters())
    assert all(not torch.equal(p, kept[n]) for n, p in trial.named_parameters())
    assert parts.same(dict(model.named_buffers()), dict(trial.named_buffers()))


def test_a_model_that_noise_makes_overflow_is_attacked_as_it_is():
    class Steep(nn.Linear):
        def forward(self, x):
            return super().forward(x).mul(1e30).exp()

    model = hatcl.convert(nn.Sequential(nn.Flatten(), Steep(48, 4)), 2, torch.zeros(2, 48), verify=False)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    trial = converting._stirred(model, torch.zeros(2, 48))
    assert parts.same(dict(model.named_parameters()), dict(trial.named_parameters()))


def test_what_a_sealed_task_computes_with_needs_no_gradient_the_first_time_either():
    """`matmul` takes another path, with other last bits, where an input needs a gradient: the first evaluation after
    sealing must not take another one than the next, which reads what the first has folded."""
    model = parts.pretend(parts.converted("mlp"))
    with hatcl.task(model, 0), torch.no_grad():
        assert [model[1].weight.requires_grad for _ in range(2)] == [False, False]


# ---- M2: without a task it is the source ------------------------------------------------------------


class Asks(nn.Module):
    def __init__(self, ask):
        super().__init__()
        self.stem, self.body, self.ask = nn.Linear(12, 16), Inner(ask), ask

    def forward(self, x):
        return self.body(torch.relu(self.stem(x)))


class Inner(nn.Module):
    def __init__(self, ask):
        super().__init__()
        self.fc, self.ask = nn.Linear(16, 4), ask

    def forward(self, x):
        return self.fc(x) if self.ask(self) else 2 * self.fc(x)


ASKS = {
    "the class": (lambda m: type(m.fc) is nn.Linear, "evaluation"),
    "the name of the class": (lambda m: m.fc._get_name() == "Linear", "evaluation"),
    "in training": (lambda m: type(m.fc) is nn.Linear or not m.training, "training"),
    "an attribute of hatcl": (lambda m: not hasattr(m.fc, "hat_direct"), "evaluation"),
}


@pytest.mark.parametrize("what", ASKS)
def test_a_model_that_would_compute_something_else_without_a_task_is_refused(what):
    ask, mode = ASKS[what]
    x = torch.randn(4, 12)
    text = f"body: without a task, in {mode} mode, the converted module computes something else .*must use isinstance"
    source = Asks(ask)
    unchanged(source, lambda: hatcl.convert(source, 2, x), hatcl.ConversionError, text)
    assert hatcl.convert(Asks(lambda m: isinstance(m.fc, nn.Linear)), 2, x)


def test_twin_without_the_comparison_it_would_be_converted(monkeypatch):
    ask, x = ASKS["the class"][0], torch.randn(4, 12)
    monkeypatch.setattr(converting, "_check_plain", lambda *args: None)
    source = Asks(ask)
    model = hatcl.convert(source, 2, x)
    assert not torch.equal(model(x), source(x))


def test_a_training_forward_that_cannot_be_seeded_is_not_compared():
    import numpy

    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.generator = parts.mlp(), numpy.random.default_rng()

        def forward(self, x):
            fresh = numpy.random.default_rng().random() if self.training else 1.0
            return self.body(x) * fresh

    assert hatcl.convert(Noise(), 2, parts.images("mlp"))


def test_random_state_is_as_it_was():
    before = torch.get_rng_state()
    source = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Dropout(0.5), nn.Linear(16, 4))
    torch.set_rng_state(before)
    made = converting._plain_outputs(source, parts.images("mlp"), True)
    assert torch.equal(before, torch.get_rng_state()) and made


@pytest.mark.parametrize("name", ["_hat", "hat_tasks", "_hat_states"])
def test_names_that_hatcl_uses(name):
    source = nn.Sequential(nn.Flatten(), parts.mlp())
    source[1].__dict__[name] = 3
    with pytest.raises(hatcl.ConversionError, match=f"1: it has an attribute '{name}', which hatcl uses; rename it"):
        hatcl.convert(source, 2, parts.images("mlp"))


@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_weights_that_a_hook_makes_are_refused(norm):
    source = nn.Sequential(nn.Flatten(), norm(nn.Linear(48, 16)), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(
        hatcl.ConversionError, match="1.weight: it is no parameter but .* use torch.nn.utils.parametriz"
    ):
        hatcl.convert(source, 2, parts.images("mlp"))


def test_names_of_ones_own_are_free():
    """`active`, `attach`, `folded` and others were names of HAT layers."""

    class Named(nn.Linear):
        def __init__(self, *args):
            super().__init__(*args)
            self.active, self.learning, self.output_dim, self.gates, self.units = True, False, 7, "g", 3

        def attach(self):
            return 2.0

        def folded(self):
            return 0.5

        def forward(self, x):
            return super().forward(x) * self.attach() * self.folded() if self.active else x[:, :4]

    x = parts.images("mlp")
    source = nn.Sequential(nn.Flatten(), Named(48, 16), nn.ReLU(), Named(16, 4))
    model = hatcl.convert(source, 2, x)
    assert torch.equal(model(x), source(x)) and model[1].output_dim == 7 and model[1].gates == "g"
    assert hatcl.certify(parts.pretend(model), x, strict=True).exact


def test_what_hat_layers_add_has_a_prefix():
    from hatcl.hat.registry import registered

    layers = {HATLayer, *registered().values(), *registered("rms").values(), *registered("centred").values()}
    for layer in layers:
        torchs = {n for base in layer.__mro__ if "hatcl" not in base.__module__ for n in dir(base)} | set(
            dir(nn.Module)
        )
        added = {n for base in layer.__mro__ if "hatcl" in base.__module__ for n in vars(base)} - torchs
        bases = [b for b, found in registered().items() if found is layer]
        known = {n for b in bases for n in (*dir(b), *getattr(b, "__annotations__", ()), *own_names(b))}
        odd = {n for n in added - known if not n.startswith(("hat_", "_hat_", "__")) and n != "_hat"}
        assert not odd, (layer, odd)


def own_names(cls):
    """Parameters and attributes that a class of torch gives its instances."""
    return {"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "eps"} | {
        "_flat_weights", "use_nested_tensor", "activation_relu_or_gelu", "in_proj_weight", "in_proj_bias",
        "q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v", "gain",
    }  # fmt: skip


# ---- what came out of the map must hold for the cut network as well ----------------------------------


def test_a_cut_that_computes_something_else_is_refused(monkeypatch):
    plain = HATLayer._hat_cut

    def wrong(self, name, raw, plan, task):
        return plain(self, name, raw, plan, task) * 1.001

    monkeypatch.setattr(HATLayer, "_hat_cut", wrong)
    text = "Sequential: cut down to half of its units it computes another output .* than gated to them"
    with pytest.raises(hatcl.ConversionError, match=text):
        hatcl.convert(parts.plain("mlp"), 2, parts.images("mlp"))
