"""The converter: what it computes, what belongs to whom, and that it changes nothing when it fails."""

from __future__ import annotations

import math

import layer_zoo as zoo
import parts
import pytest
import torch
from torch import nn
from torch.nn import functional as tf

import hatcl
from hatcl.hat import verify
from hatcl.hat.gates import gates_of
from hatcl.hat.layers.gated import HATLayer
from hatcl.hat.tasks import tasks
from hatcl.map.rules import TRACE_RULES, Rule

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
    model = parts.converted(name, heads="plain")
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


# ---- M9: nothing half done ------------------------------------------------------------------------


def test_a_conversion_that_fails_leaves_the_source_as_it_was(monkeypatch):
    source, x = parts.plain("resnet"), parts.images("resnet")
    parts.unchanged(
        source, lambda: hatcl.convert(source, 2, x[:, :2]), hatcl.ConversionError, "its forward failed on example"
    )
    with monkeypatch.context() as patch:
        patch.setattr(HATLayer, "_hat_attach", lambda *args: 1 / 0)  # while modules are being swapped
        parts.unchanged(source, lambda: hatcl.convert(source, 2, x), ZeroDivisionError, "division")
    with monkeypatch.context() as patch:
        patch.setattr(verify, "_leaks", lambda *args: ["conv1.0.weight"])
        text = "other tasks reach a task's output through conv1.0.weight .*verify=False"
        parts.unchanged(source, lambda: hatcl.convert(source, 2, x), hatcl.ConversionError, text)
    with monkeypatch.context() as patch:
        patch.setitem(TRACE_RULES, "convolution", Rule(lambda *args: 1 / 0))
        text = r"conv1.0: the trace cannot follow aten::convolution \(ZeroDivisionError: .*\); please report the model"
        parts.unchanged(source, lambda: hatcl.convert(source, 2, x), hatcl.ConversionError, text)
    assert hatcl.convert(source, 2, x)


def test_the_source_and_the_model_share_nothing():
    source = parts.plain("vit")
    model = hatcl.convert(source, 2, parts.images("vit"))
    mine = {t.untyped_storage().data_ptr() for t in source.state_dict().values()}
    assert not mine & {t.untyped_storage().data_ptr() for t in model.state_dict().values() if t.numel()}


# ---- other ways in --------------------------------------------------------------------------------


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
    assert tasks(model) == [0, 1]


def test_what_a_sealed_task_computes_with_needs_no_gradient_the_first_time_either():
    """`matmul` takes another path, with other last bits, where an input needs a gradient: the first evaluation after
    sealing must not take another one than the next, which reads what the first has folded."""
    model = parts.pretend(parts.converted("mlp"))
    with hatcl.task(model, 0), torch.no_grad():
        assert [model[1].weight.requires_grad for _ in range(2)] == [False, False]


# ---- names --------------------------------------------------------------------------------------


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
        hatcl.ConversionError, match="1.weight: it is not a parameter but .* use torch.nn.utils.parametriz"
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
