"""A task leaves as an ordinary smaller model."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from parts import MODELS, converted, images, logits, mlp, pretend
from torch import nn
from torch.nn import functional as tf

import hatcl
from hatcl.hat.extraction import cut, extract
from hatcl.hat.gates import gates_of
from hatcl.hat.layers import HATLinear

REL = 1e-5  # measured: 4e-7 at most, over these models


def sealed(module, x, num_tasks=2, share=0.5, seed=0, **options):
    """A converted module whose tasks have random gates, and parameters with noise (what starts at zero would hide)."""
    torch.manual_seed(seed)
    model = hatcl.convert(module.eval(), num_tasks, x, verify=False, config=options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "hat_gates" not in name:
                p.add_(torch.randn_like(p) * 0.1 * (p.std() if p.numel() > 1 else 1.0))
    pretend(model, share=share, seed=seed)
    return model.eval()


def same(model, task, small, x, rel=REL):
    want = logits(model, task, x)
    with torch.no_grad():
        got = small(x)
    assert got.shape == want.shape
    assert float((got - want).abs().max() / want.abs().max()) < rel


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_the_task_computes_with_fewer_elements(name):
    model = converted(name)
    pretend(model)
    before = {n: x.clone() for n, x in model.state_dict().items()}
    for task in range(2):
        found = hatcl.extract_task(model, task, images(name, 2))
        same(model, task, found.model, images(name, 5, seed=1))
        assert found.report.kept == sum(p.numel() for p in found.model.parameters()) < 0.75 * found.report.total
        assert found.report.multiply_adds < 0.75 * found.report.multiply_adds_before
        assert found.report.difference < REL and not found.report.full
        assert not any(type(m).__module__.startswith("hatcl") for m in found.model.modules())
        assert "hat" not in ".".join(found.model.state_dict())
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_modules_keep_their_classes(name):
    plain = MODELS[name][0]()
    model = converted(name)
    pretend(model)
    small = hatcl.extract_task(model, 0, images(name, 2)).model
    for path, module in plain.named_modules():
        assert type(small.get_submodule(path)) is type(module), path


def test_layers_know_their_sizes():
    model = sealed(mlp(norm=nn.LayerNorm), torch.randn(2, 48))
    small = hatcl.extract_task(model, 0, torch.randn(2, 48)).model
    on = int(gates_of(model)[0].masks[0, :32].sum())
    assert (small[1].in_features, small[1].out_features) == (48, on) == tuple(reversed(small[1].weight.shape))
    assert small[2].normalized_shape == (on,) and f"out_features={on}" in repr(small)


class Heads(nn.Module):
    """Attention by torch's own function, whose scale depends on the width of a head."""

    def __init__(self, dim=16, heads=2, explicit=False):
        super().__init__()
        self.heads, self.head_dim, self.scale = heads, dim // heads, (dim // heads) ** -0.5
        self.explicit = explicit
        self.embed, self.qkv, self.out = nn.Linear(6, dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, 3)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        if self.explicit:
            y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            y = tf.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("explicit", [False, True])
def test_attention_divides_by_the_width_that_heads_had(explicit):
    x = torch.randn(2, 5, 6)
    model = sealed(Heads(explicit=explicit), x, share=0.4)
    small = hatcl.extract_task(model, 0, x)
    assert small.model.head_dim < 8 and not small.report.full
    same(model, 0, small.model, torch.randn(3, 5, 6))


def test_without_the_scaled_queries_it_would_not_agree(monkeypatch):
    x = torch.randn(2, 5, 6)
    model = sealed(Heads(), x, share=0.4)
    monkeypatch.setattr(cut.Cutter, "_scale_queries", lambda *a: None)
    assert hatcl.extract_task(model, 0, x).report.full  # it says so, and leaves the heads at full width


def test_unequal_heads_are_filled_up_to_the_widest():
    x = torch.randn(2, 5, 6)
    model = sealed(Heads(), x)
    gates = gates_of(model)[0]
    units = gates.unit_map.entries["qkv.weight"].factors[0].units.reshape(3, 2, 8)  # q and k of a head are one
    gates.masks[0] = False
    for head, count in ((0, 3), (1, 5)):
        gates.masks[0, torch.from_numpy(units[:, head, :count].reshape(-1) - 1)] = True
    gates.masks[0, :16] = True
    hatcl.hat.digests.record(model, 0)
    small = hatcl.extract_task(model, 0, x)
    assert small.model.head_dim == 5 and small.report.units - small.report.on == 4
    same(model, 0, small.model, x)


class Literal(nn.Module):
    """A size that stands in the code."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 12)

    def forward(self, x):
        return self.first(x).view(-1, 2, 6).flatten(1)


def test_what_the_code_fixes_stays_at_full_width_and_is_reported():
    x = torch.randn(4, 6)
    net = nn.Sequential(Literal(), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    model = sealed(net, x)
    found = hatcl.extract_task(model, 0, x)
    assert found.model[0].first.out_features == 12 and found.model[2].out_features < 12
    assert list(found.report.full) == ["0"] and "its forward has sizes of its own" in str(found.report)
    same(model, 0, found.model, torch.randn(7, 6))


class Stream(nn.Module):
    """A norm over units some of which only stay since `x.shape` is taken for the width of attention."""

    def __init__(self, norm):
        super().__init__()
        self.heads = 2
        self.embed, self.norm, self.qkv, self.out = nn.Linear(6, 16), norm, nn.Linear(16, 48), nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x)
        batch, n, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(tf.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, n, width))
        return self.head(self.norm(x)).mean(1)


@pytest.mark.parametrize("norm", [nn.LayerNorm(16), nn.RMSNorm(16), nn.LayerNorm(16, elementwise_affine=False)])
def test_widths_that_a_forward_takes_for_one(norm):
    x = torch.randn(2, 5, 6)
    model = sealed(Stream(norm), x, share=0.3)
    found = hatcl.extract_task(model, 0, x)
    assert found.model.embed.out_features == found.model.qkv.out_features // 3 < 16 and not found.report.full
    assert found.shaping.norms["norm"]["width"] == found.model.embed.out_features
    same(model, 0, found.model, torch.randn(3, 5, 6))
    assert not any(type(m).__module__.startswith("hatcl") for m in found.model.modules())


def test_a_norm_that_counted_the_zeros_would_not_agree(monkeypatch):
    x = torch.randn(2, 5, 6)
    model = sealed(Stream(nn.LayerNorm(16)), x, share=0.3)
    monkeypatch.setattr(cut.Cutter, "_norm", lambda *a: None)
    with pytest.raises(hatcl.ConversionError, match="does not agree"):
        hatcl.extract_task(model, 0, x)


@pytest.mark.parametrize("groups", [1, 4])
def test_group_norms_with_unequal_groups(groups):
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(groups, 16), nn.ReLU(), nn.Conv2d(16, 4, 3))
    x = torch.randn(2, 3, 8, 8)
    model = sealed(net, x)
    same(model, 0, hatcl.extract_task(model, 0, x).model, torch.randn(3, 3, 8, 8))


def test_grouped_and_depthwise_convolutions():
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, groups=4), nn.BatchNorm2d(24),
        nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.ReLU(), nn.Conv2d(24, 5, 1),
    )  # fmt: skip
    x = torch.randn(2, 3, 9, 9)
    model = sealed(net, x, share=0.3)
    small = hatcl.extract_task(model, 0, x).model
    same(model, 0, small, torch.randn(3, 3, 9, 9))
    assert small[3].groups == 4 and small[6].groups == small[6].in_channels < 24


def test_standardised_weights_that_are_filled_up():
    conv = timm.layers.ScaledStdConv2d
    net = nn.Sequential(conv(3, 16, 3), nn.ReLU(), conv(16, 24, 3, groups=4), nn.ReLU(), conv(24, 5, 3))
    x = torch.randn(2, 3, 9, 9)
    model = sealed(net, x, share=0.4)
    found = hatcl.extract_task(model, 0, x)
    assert found.report.units > found.report.on and not found.report.full
    same(model, 0, found.model, torch.randn(3, 3, 9, 9))


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(cls):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn, self.head = nn.Embedding(20, 8), cls(8, 12, batch_first=True), nn.Linear(12, 3)

        def forward(self, x):
            return self.head(self.rnn(self.embed(x))[0][:, -1])

    x = torch.randint(20, (2, 5))
    model = sealed(Net(), x)
    same(model, 0, hatcl.extract_task(model, 0, x).model, torch.randint(20, (3, 5)))


def test_a_transformer_encoder_of_torch():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)
            self.embed, self.encoder, self.head = nn.Linear(6, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.encoder(self.embed(x))).mean(1)

    x = torch.randn(2, 5, 6)
    model = sealed(Net(), x)
    found = hatcl.extract_task(model, 0, x)
    same(model, 0, found.model, torch.randn(3, 5, 6))
    assert found.report.kept < found.report.total


def test_heads_of_their_own_width_come_along():
    torch.manual_seed(0)
    x = torch.randn(2, 48)
    model = hatcl.convert(mlp(), 2, x, num_classes=[3, 7])
    pretend(model)
    for task, classes in enumerate((3, 7)):
        small = hatcl.extract_task(model, task, x).model
        assert small[-1].out_features == classes
        same(model, task, small, torch.randn(4, 48))


def test_a_layer_without_a_unit_that_is_on_is_one_zero():
    net = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 3))
    x = torch.randn(2, 6)
    model = sealed(net, x)
    gates_of(model)[0].masks[0] = False
    hatcl.hat.digests.record(model, 0)
    found = hatcl.extract_task(model, 0, x)
    assert found.model[0].out_features == 1 and (found.report.on, found.report.units) == (0, 1)
    same(model, 0, found.model, x)


def test_pairs_of_lora_are_cut_and_peft_merges_what_is_left():
    peft = pytest.importorskip("peft", reason="peft is not installed; run: pip install -e '.[hf]'")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(MODELS["vit"][0](), peft.LoraConfig(r=8, target_modules=["qkv", "fc1", "fc2"]))
    x = images("vit", 2)
    model = sealed(adapted, x)
    found = hatcl.extract_task(model, 0, x)
    same(model, 0, found.model, images("vit", 3, seed=1))
    assert 0 < found.model.base_model.model.blocks[0].attn.qkv.lora_A["default"].out_features < 8
    merged = copy.deepcopy(found.model).merge_and_unload()
    same(model, 0, merged, images("vit", 3, seed=1))
    assert not any("lora" in name for name in merged.state_dict())


def test_its_training_mode_and_gradients_are_those_of_any_module():
    model = converted("resnet")
    pretend(model)
    small = hatcl.extract_task(model, 0, images("resnet", 2)).model
    assert not small.training and all(p.requires_grad for p in small.parameters())
    optimizer = torch.optim.SGD(small.train().parameters(), lr=0.01)
    x, y = images("resnet", 8), torch.arange(8) % 4
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(tf.cross_entropy(small(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_it_is_traced_and_exported_and_copied():
    model = converted("vit")
    pretend(model)
    x = images("vit", 2)
    small = hatcl.extract_task(model, 0, x).model
    more = images("vit", 5)
    with torch.no_grad():
        want = small(more)
        torch.testing.assert_close(torch.jit.trace(small, x)(more), want)
        program = torch.export.export(small, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.testing.assert_close(program.module()(more), want)
        assert torch.equal(copy.deepcopy(small)(more), want)


def test_it_is_quantised():
    model = sealed(mlp(64), torch.randn(2, 48))
    small = hatcl.extract_task(model, 0, torch.randn(2, 48)).model
    quantised = torch.ao.quantization.quantize_dynamic(small, {nn.Linear}, torch.qint8)
    assert sum(isinstance(m, torch.ao.nn.quantized.dynamic.Linear) for m in quantised.modules()) == 3
    x = torch.randn(4, 48)
    torch.testing.assert_close(quantised(x), small(x), rtol=0.1, atol=0.1)


@pytest.mark.slow
def test_it_is_compiled():
    model = converted("resnet")
    pretend(model)
    small = hatcl.extract_task(model, 0, images("resnet", 2)).model
    x = images("resnet", 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(small, fullgraph=True)(x), small(x), rtol=1e-4, atol=1e-4)


def test_example_inputs_are_those_that_the_model_is_for():
    model = timm.create_model("hat_test_resnet", num_tasks=1, num_classes=3, verify=False)
    pretend(model)
    same(model, 0, hatcl.extract_task(model, 0).model, torch.randn(2, 3, 160, 160))


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_a_task_that_is_not_sealed_or_was_forgotten():
    model = converted("mlp")
    with pytest.raises(hatcl.TaskError, match="task 0 is not sealed"):
        hatcl.extract_task(model, 0, images("mlp", 2))
    pretend(model)
    hatcl.forget_task(model, 1)
    with pytest.raises(hatcl.TaskError, match="task 1 is not sealed.*sealed are .0, 2."):
        hatcl.extract_task(model, 1, images("mlp", 2))
    with pytest.raises(hatcl.TaskError, match="the model has tasks 0 to 2"):
        hatcl.extract_task(model, 9, images("mlp", 2))


def test_inputs_that_are_not_there_or_do_not_fit():
    model = converted("mlp")
    pretend(model)
    hatcl.extract_task(model, 0)  # with inputs of the kind that it was converted with
    gates_of(model)[0].takes = None  # as in a model that was saved by an earlier version
    with pytest.raises(hatcl.ConfigError, match="example_inputs: got None, and .*pass an input of its forward"):
        hatcl.extract_task(model, 0)
    with pytest.raises(hatcl.ConfigError, match=r"the model's forward failed on float32\[2, 5\].*pass what it takes"):
        hatcl.extract_task(model, 0, torch.randn(2, 5))


def test_a_norm_of_which_no_unit_is_on():
    model = sealed(mlp(norm=nn.LayerNorm), torch.randn(2, 48))
    gates_of(model)[0].masks[0, :32] = False
    hatcl.hat.digests.record(model, 0)
    with pytest.raises(hatcl.ConversionError, match="2: the task has none of the 32 units on.*penalty_weight"):
        hatcl.extract_task(model, 0, torch.randn(2, 48))


def test_layers_by_hand_have_no_map():
    model = nn.Sequential(HATLinear(4, 8, num_tasks=1), nn.ReLU())
    pretend(model)
    with pytest.raises(hatcl.HATError, match="put together by hand.*convert the plain module"):
        hatcl.extract_task(model, 0, torch.randn(2, 4))


def test_what_changed_since_it_was_sealed_is_not_handed_out():
    model = converted("mlp")
    pretend(model)
    with torch.no_grad():
        dict(model.named_parameters())["1.weight"].add_(1.0)
    with pytest.raises(hatcl.IntegrityError):
        hatcl.extract_task(model, 0, images("mlp", 2))


def test_a_difference_above_the_tolerance_raises(monkeypatch):
    model = converted("mlp")
    pretend(model)
    right = extract.weights_of_task

    def wrong(which, task):  # the model's own, not those of the copy with noise
        return {k: v * (1.01 if which is model else 1.0) for k, v in right(which, task).items()}

    monkeypatch.setattr(extract, "weights_of_task", wrong)
    with pytest.raises(hatcl.ConversionError, match="does not agree with the model within 1e-05.*pass tolerance="):
        hatcl.extract_task(model, 0, images("mlp", 2))
    assert hatcl.extract_task(model, 0, images("mlp", 2), tolerance=1.0).report.difference > 1e-3


def test_values_that_are_not_finite_hide_no_difference():
    nothing = torch.zeros(0)
    nan, inf = float("nan"), float("inf")
    want = torch.tensor([nan, inf, -inf, 2.0])
    assert extract._gap_of(want, want.clone(), None, nothing) == 0.0
    assert extract._gap_of(want, torch.tensor([nan, inf, -inf, 1.0]), None, nothing) == 0.5
    for other in ([0.0, inf, -inf, 2.0], [nan, inf, inf, 2.0], [nan, 1.0, -inf, 2.0], [nan, nan, -inf, 2.0]):
        assert extract._gap_of(want, torch.tensor(other), None, nothing) == inf
    model = converted("mlp")
    pretend(model)
    x = images("mlp", 2)
    with pytest.raises(hatcl.ConfigError, match="no output of .* is finite on them, so nothing could be compared"):
        hatcl.extract_task(model, 0, x * nan)
    x[0] = nan  # one example is enough to compare
    assert hatcl.extract_task(model, 0, x).report.difference <= 1e-5


def test_what_cannot_be_mended_at_full_width_raises(monkeypatch):
    model = converted("mlp")
    pretend(model)
    right = extract.weights_of_task
    monkeypatch.setattr(extract, "weights_of_task", lambda *a: {k: v * 1.01 for k, v in right(*a).items()})
    with pytest.raises(hatcl.ConversionError, match="does not agree with the model, also at full width.*report"):
        hatcl.extract_task(model, 0, images("mlp", 2))


def test_a_batch_without_examples_is_refused():
    model = pretend(converted("mlp"))
    with pytest.raises(hatcl.ConfigError, match=r"example_inputs: got float32\[0, 3, 4, 4\], which holds no example"):
        hatcl.extract_task(model, 0, images("mlp")[:0])
