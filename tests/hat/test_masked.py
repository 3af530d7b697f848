"""A gate for each input feature: `convert(..., mask_inputs=True)`."""

from __future__ import annotations

import copy

import parts
import pytest
import torch
import transformers
from torch import nn

import hatcl
from hatcl.hat.gates import gates_of
from hatcl.hat.masked import MASK, InputFeatures, MaskedInputs

NAMES = pytest.mark.parametrize("name", list(parts.MODELS))
UNITS = {"mlp": 48, "resnet": 3, "vit": 3}  # what the network tells apart: pixels, or the channels of an image


@pytest.fixture(scope="module")
def every():
    """Of each network: the plain one, and one behind gates for its inputs in which a task is sealed."""
    made = {}
    for name in parts.MODELS:
        plain = parts.plain(name).eval()
        model = hatcl.convert(plain, 3, parts.images(name, 2), mask_inputs=True)
        for seed in range(99):  # until each task has some features, and not all
            sealed = parts.pretend(copy.deepcopy(model), [0, 1], share=0.7, seed=seed)
            if all(0 < int(sealed.features_of(t).sum()) < sealed.features for t in (0, 1)):
                break
        made[name] = plain, model, sealed
    return made


def ones(model):
    """Do the features still have the weight 1?"""
    return bool((model.masked_inputs._parameters["weight"] == 1).all())


@NAMES
def test_before_anything_is_learned_it_is_the_plain_model(every, name):
    plain, model, _ = every[name]
    x = parts.images(name)
    for training in (False, True):
        for m in (plain, model):
            m.train(training)
        with torch.no_grad():
            assert torch.equal(copy.deepcopy(model)(x), copy.deepcopy(plain)(x))
    assert isinstance(model, MaskedInputs) and type(plain) in type(model.model).__mro__
    assert gates_of(model)[0].layers[0] == (MASK, 0, UNITS[name])
    assert not any(n.startswith(MASK) and p.requires_grad for n, p in model.named_parameters())


@NAMES
def test_a_task_sees_the_features_that_it_has_on_and_no_other(every, name):
    """And it is the network behind zeros: the cut network of the design."""
    _, _, model = every[name]
    model.eval()
    x = parts.images(name)
    for t in (0, 1):
        on = model.features_of(t)
        assert on.shape == (model.features,) and 0 < int(on.sum()) < model.features
        kept = x * on.view(1, *x.shape[1:])
        other = torch.where(on.view(1, *x.shape[1:]), x, 7.0)
        want = parts.logits(model, t, x)
        assert torch.equal(parts.logits(model, t, kept), want) and torch.equal(parts.logits(model, t, other), want)
        assert not torch.equal(parts.logits(model, t, x * (~on).view(1, *x.shape[1:])), want)
    assert hatcl.certify(model, x).exact


def test_it_is_learned_which_features_a_task_needs():
    """One pixel in four tells the class; a task that is asked to use little finds some of those alone."""
    torch.manual_seed(0)
    plain = parts.mlp(inputs=16)
    told = torch.arange(4)
    x, y = torch.randn(64, 16), torch.arange(64) % 4
    x[:, told] = torch.eye(4)[y] * 4
    config = {"penalty_weight": 1.0, "embedding_lr_scale": 4.0}
    model = hatcl.convert(plain, 2, x[:2], mask_inputs=True, config=config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    parts.train(model, 0, optimizer, (x, y), 150)
    on = model.features_of(0)
    assert float((parts.logits(model, 0, x).argmax(1) == y).float().mean()) == 1.0
    assert int(on[told].sum()) >= 3 and int(on[4:].sum()) <= 2
    before = parts.logits(model, 0, x)
    parts.train(model, 1, optimizer, (x.flip(1), y), 30)
    assert torch.equal(parts.logits(model, 0, x), before) and ones(model)


def test_weights_of_features_that_no_task_looks_at_are_free(every):
    _, _, model = every["mlp"]
    model = copy.deepcopy(model)
    first = model.model[1]._parameters["weight"]
    before, seen = first.detach().clone(), model.features_of(0) | model.features_of(1)
    parts.train(model, 2, torch.optim.SGD(model.parameters(), 0.5), parts.problem(parts.shape_of("mlp"), 2), 3)
    moved = first.detach() != before
    used = gates_of(model)[0].masks[:2, UNITS["mlp"] : UNITS["mlp"] + 32].any(0)
    assert bool(moved[used][:, ~seen].any()) and not bool(seen.all())


@NAMES
def test_forgetting_and_extracting(every, name, tmp_path):
    plain, _, model = every[name]
    model, x = copy.deepcopy(model), parts.images(name)
    found = hatcl.extract_task(model, 0, x)
    found.save(tmp_path)
    with torch.no_grad():
        # rounding of the smaller products: 1e-5 is what extraction promises
        got = hatcl.load_extracted(tmp_path, base=plain)(x)
        torch.testing.assert_close(got, parts.logits(model, 0, x), rtol=1e-4, atol=1e-5)
    assert len(found.model.masked_inputs.weight) == model.features  # it takes the inputs that the model takes
    assert found.save(tmp_path / "program", "pt2").exists()
    want = parts.logits(model, 1, x)
    hatcl.forget_task(model, 0)
    assert torch.equal(parts.logits(model, 1, x), want) and ones(model)
    assert hatcl.grow(model, 1.5).left.keys() == {MASK} and torch.equal(parts.logits(model, 1, x), want)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
def test_every_verb_one_after_the_other_where_inputs_come_flat(norm):
    """The number of features is then one that a cut or a growth takes for a number of units."""
    torch.manual_seed(0)
    x = torch.randn(6, 12)
    plain = nn.Sequential(nn.Linear(12, 8), norm(8), nn.ReLU(), nn.Linear(8, 3))
    model = parts.pretend(hatcl.convert(plain, 3, x, mask_inputs=True, verify=False), [0, 1], share=0.6)
    optimizer, data = torch.optim.AdamW(model.parameters(), 1e-2), (x, torch.arange(6) % 3)
    before = [parts.logits(model, t, x) for t in (0, 1)]
    hatcl.grow(model, 1.5, optimizer=optimizer, example_inputs=x)
    parts.train(model, 2, optimizer, data, 2)
    made = hatcl.extract_task(model, 0, x)
    assert list(made.report.full) == ["MaskedInputs"] and made.report.kept < made.report.total
    hatcl.reopen_task(model, 1)
    parts.train(model, 1, optimizer, data, 2)
    assert torch.equal(parts.logits(model, 0, x), before[0])
    want = parts.logits(model, 1, x)
    hatcl.forget_task(model, 0)
    assert torch.equal(parts.logits(model, 1, x), want) and hatcl.certify(model, x).exact and ones(model)


def test_files(every, tmp_path):
    plain, _, model = every["mlp"]
    again = hatcl.from_pretrained(hatcl.save_pretrained(model, tmp_path / "own"), base=plain)
    assert torch.equal(again.features_of(1), model.features_of(1)) and not isinstance(plain, MaskedInputs)
    x = parts.images("mlp")
    assert all(torch.equal(parts.logits(again, t, x), parts.logits(model, t, x)) for t in (None, 0, 1))
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8)}
    known = transformers.ViTForImageClassification(config)
    model = parts.pretend(hatcl.convert(known, 1, inputs, mask_inputs=True, verify=False)).eval()
    hatcl.extract_task(model, 0, inputs).save(tmp_path / "small")
    with torch.no_grad(), hatcl.task(model, 0):
        want = model(**inputs).logits
        again = hatcl.from_pretrained(hatcl.save_pretrained(model, tmp_path / "known"))
        with hatcl.task(again, 0):
            assert torch.equal(again(**inputs).logits, want)
        assert hatcl.extract_task(model, 0, inputs).save(tmp_path / "program", "pt2").exists()
        small = hatcl.load_extracted(tmp_path / "small")
        torch.testing.assert_close(small(**inputs).logits, want, rtol=1e-4, atol=1e-5)


class _ByName(nn.Module):
    """Takes word numbers, and features by their name."""

    def __init__(self):
        super().__init__()
        self.words, self.rows, self.head = nn.Embedding(5, 8), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, ids, features):
        return self.head(torch.relu(self.words(ids) + self.rows(features)))


def test_the_first_floating_point_tensor_is_masked_also_by_its_name():
    inputs = {"ids": torch.arange(4), "features": torch.randn(4, 6)}
    model = parts.pretend(hatcl.convert(_ByName(), 1, inputs, mask_inputs=True), share=0.5)
    on = model.features_of(0)
    with torch.no_grad(), hatcl.task(model.eval(), 0):
        want = model(**inputs)
        assert torch.equal(model(inputs["ids"], inputs["features"] * on), want)
    assert on.shape == (6,)


class _TwoRows(nn.Module):
    """Two inputs of one shape."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x, z):
        return self.head(torch.relu(self.a(x) + self.b(z)))


def test_which_input_is_masked_does_not_depend_on_the_order_of_a_call():
    x, z = torch.randn(4, 6), torch.randn(4, 6)
    model = parts.pretend(hatcl.convert(_TwoRows(), 1, {"z": z, "x": x}, mask_inputs=True), share=0.5).eval()
    on = model.features_of(0)
    assert 0 < int(on.sum()) < 6
    with torch.no_grad(), hatcl.task(model, 0):
        want = model(x, z)
        for got in (model(x=x, z=z), model(z=z, x=x), model(x, z=z), model(z=z, x=x * on)):
            assert torch.equal(got, want)
        assert not torch.equal(model(z=z * on, x=x), want)


def test_inputs_keep_their_layout(every):
    """And so are computed with as in the plain model: a convolution rounds otherwise in another layout. A batch may
    have no rows."""
    plain, model, _ = every["resnet"]
    x = parts.images("resnet")
    seen = []
    hook = model.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].stride()))
    odd = torch.empty_strided(x.shape, (x[0].numel(), 1, *[s * x.shape[1] for s in x[0, 0].stride()])).copy_(x)
    with torch.no_grad():
        for y in (x, x.to(memory_format=torch.channels_last), odd, x.transpose(2, 3).contiguous().transpose(2, 3)):
            assert torch.equal(model.eval()(y), plain.eval()(y)) and seen.pop() == y.stride()
        assert len(model(x[:0])) == 0
    hook.remove()


def test_bad_input(every):
    plain, fresh, model = every["mlp"]
    x = parts.images("mlp")
    for config, text in (({"reuse": "none"}, "reuse='none'"), ({"masks": "array:2"}, "masks='array:2'")):
        with pytest.raises(hatcl.ConfigError, match=f"mask_inputs: got {text}, under which tasks share no units"):
            hatcl.convert(plain, 2, x, mask_inputs=True, config=config)
    with pytest.raises(hatcl.ConversionError, match="mask_inputs: got no floating-point tensor with rows"):
        hatcl.convert(nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 2)), 1, torch.arange(4), mask_inputs=True)
    with pytest.raises(hatcl.ConversionError, match="example_inputs: got None"):
        hatcl.convert(plain, 1, mask_inputs=True, unit_map=gates_of(fresh)[0].unit_map)
    with pytest.raises(hatcl.ConversionError, match="on the map of this model no input feature is a unit"):
        hatcl.convert(_Lora(), 1, torch.randn(2, 6), mask_inputs=True)
    with pytest.raises(hatcl.ConfigError, match=r"got an input of shape \[8, 3, 4, 5\], expected rows of 48 features"):
        model(torch.randn(8, 3, 4, 5))
    with pytest.raises(hatcl.ConfigError, match="none of the inputs 0 is a floating-point tensor"):
        model(torch.arange(4))
    with pytest.raises(hatcl.TaskError, match="task 2 is not sealed"):
        model.features_of(2)
    with pytest.raises(hatcl.TaskError, match="features_of: the model is not converted"):
        MaskedInputs(plain, 48).features_of(0)


class _Lora(nn.Module):
    """A linear layer with an adapter as peft names it."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(6, 3).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(6, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 3, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_without_its_own_initialiser_forgetting_would_draw_the_features_anew(every, monkeypatch):
    """Twin."""
    model = copy.deepcopy(every["mlp"][2])
    monkeypatch.setattr(InputFeatures, "reset_parameters", nn.Conv1d.reset_parameters)
    hatcl.forget_task(model, 0)
    assert not ones(model)
