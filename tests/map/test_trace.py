"""The trace: what each kind of operation does to units, and what it costs."""

from __future__ import annotations

import time

import layer_zoo as zoo
import parts
import pytest
import timm
import torch
from map_parts import Between
from torch import nn
from torch.nn import functional as tf

import hatcl
from hatcl.hat.convert import map_of
from hatcl.map import trace as traces
from hatcl.map.shadow import small

UNITS_ARE_COUPLED = {
    "add_flipped": (lambda h: h + h.flip(-1), 6),
    "multiply_halves": (lambda h: torch.cat([h[:, :6] * h[:, 6:], h[:, :6]], -1), 6),
    "dot_product": (lambda h: (h.view(-1, 4, 3) @ h.view(-1, 4, 3).transpose(1, 2)).flatten(1)[:, :12], 3),
}


@pytest.mark.parametrize("name", UNITS_ARE_COUPLED)
def test_channels_that_meet_are_one_unit(name):
    between, units = UNITS_ARE_COUPLED[name]
    x = torch.randn(4, 5)
    found = map_of(Between(between).eval(), x)
    assert len(set(next(f.units for f in found.entries["first.weight"].factors if f.owner).tolist())) <= units
    model = parts.pretend(hatcl.convert(Between(between).eval(), 2, x))
    assert [parts.leaks(model, x, t) for t in range(2)] == [None, None]


UNITS_ARE_LOST = {
    "mean": lambda h: h + h.mean(-1, keepdim=True),
    "softmax": lambda h: h.softmax(-1),
    "sort": lambda h: h.sort(-1).values,
    "norm": lambda h: h / h.norm(dim=-1, keepdim=True),
    "fft": lambda h: torch.fft.fft(h).real,
    "cumsum": lambda h: h.cumsum(-1),
    "topk": lambda h: torch.cat([h.topk(6).values, h[:, :6]], -1),
    "cdist": lambda h: torch.cdist(h.unsqueeze(1), h.view(-1, 1, 12)).flatten(1).expand(-1, 12) + h,
    "matrix_exp": lambda h: torch.linalg.matrix_exp(h[:, :9].view(-1, 3, 3)).flatten(1).repeat(1, 2)[:, :12],
    "bilinear_upsample": lambda h: tf.interpolate(h.view(-1, 1, 3, 4), size=(4, 3), mode="bilinear").flatten(1),
}


@pytest.mark.parametrize("name", UNITS_ARE_LOST)
def test_what_the_trace_cannot_follow_is_noted_and_never_a_leak(name):
    torch.manual_seed(0)
    source = Between(UNITS_ARE_LOST[name]).eval()
    x = torch.randn(4, 5)
    model = hatcl.convert(source, 2, x)
    assert hatcl.describe(model).notes
    parts.pretend(model)
    assert [parts.leaks(model, x, t) for t in range(2)] == [None, None]
    assert torch.equal(parts.logits(model, None, x), source(x))


def test_the_trace_leaves_the_model_alone():
    for name in parts.MODELS:
        model = parts.plain(name).train()
        before = parts.snapshot(model)
        fast = torch.backends.mha.get_fastpath_enabled()
        map_of(model, parts.images(name))
        assert parts.same(before, model.state_dict()) and model.training
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
        assert torch.backends.mha.get_fastpath_enabled() == fast
        assert all(p.grad is None for p in model.parameters())


def test_a_forward_that_fails_leaves_the_model_alone():
    model = parts.plain("resnet").train()
    with pytest.raises(hatcl.ConversionError):
        map_of(model, torch.randn(2, 5, 8, 8))
    assert model.training and all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_inputs_may_be_tensors_tuples_dicts():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, a, b=None, scale=1.0):
            x = self.left(a)
            return {"out": self.head(x if b is None else x + scale * self.right(b)), "hidden": (x.sum(), [x])}

    a, b = torch.randn(2, 4), torch.randn(2, 3)
    for inputs in (a, (a, b), [a, b], {"a": a, "b": b, "scale": 2.0}):
        model = parts.pretend(hatcl.convert(Two(), 2, inputs))
        assert hatcl.certify(model, inputs).exact
    found = map_of(Two(), (a, b))
    left, right = (next(f.units for f in found.entries[f"{n}.weight"].factors if f.owner) for n in ("left", "right"))
    assert left.tolist() == right.tolist()


@pytest.mark.parametrize("name", parts.MODELS)
def test_the_map_does_not_depend_on_the_values(name):
    maps = [
        map_of(parts.plain(name, seed).eval(), parts.images(name, count, seed)).to_json()
        for seed, count in ((0, 2), (7, 5))
    ]
    assert maps[0] == maps[1]


@pytest.fixture(scope="module")
def big():
    torch.manual_seed(0)
    return timm.create_model("vit_base_patch16_224", num_classes=10).eval(), torch.randn(2, 3, 224, 224)


@pytest.mark.slow
def test_tracing_a_large_model_takes_at_most_three_forwards_and_two_seconds(big):
    model, x = big

    def seconds(run):
        best = float("inf")
        for _ in range(3):
            begun = time.process_time()
            with torch.no_grad():
                run()
            best = min(best, time.process_time() - begun)
        return best

    assert seconds(lambda: map_of(model, x)) <= 3 * seconds(lambda: model(x)) + 2


def bytes_held(coupling):
    """Of all shadows alive and of the labels."""
    storages = {}
    for s in coupling.shadows.alive():
        for slot in s.slots:
            storage = slot.ids.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    labels = coupling.labels
    return sum(storages.values()) + labels.parent.nbytes + sum(f.nbytes for f in labels.flags.values())


@pytest.mark.slow
@pytest.mark.parametrize("which", ["vit_base_patch16_224", "small"])
def test_shadows_take_at_most_the_models_own_memory(which, big, monkeypatch):
    model, x = big if which != "small" else (parts.plain("resnet").eval(), parts.images("resnet"))
    peak = []
    plain = traces.apply_rule

    def watched(call, coupling):
        out = plain(call, coupling)
        peak.append(bytes_held(coupling) if len(peak) % 10 == 0 else 0)
        return out

    monkeypatch.setattr(traces, "apply_rule", watched)
    map_of(model, x)
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    assert 0 < max(peak) <= (own if which != "small" else 20 * own)
    if which != "small":
        print(f"shadow {max(peak) / 2**20:.1f} MiB, model {own / 2**20:.1f} MiB")


def test_shares_do_not_fall():
    """How much of each small model has both ends known: what the trace reaches today, so that a change shows."""
    reached = {"mlp": 0.38, "resnet": 0.95, "vit": 0.75}
    for name, share in reached.items():
        shares = hatcl.describe(parts.converted(name)).shares
        assert shares["shared_both"] >= share, shares
        assert sum(shares.values()) == pytest.approx(1, abs=1e-3)


def test_constant_labels_take_no_memory():
    assert small(torch.arange(4).view(1, 4, 1).expand(3, 4, 5)).shape == (1, 4, 1)


def test_zoo_maps_know_both_ends_where_a_human_would():
    for name in ("batch_norm2d", "transposed2d", "depthwise2d", "grouped2d", "timm_conv_same", "encoder", "attention"):
        shares = hatcl.describe(hatcl.convert(zoo.make(name), 2, zoo.data(name)[0])).shares
        assert shares["shared_both"] > 0.6, (name, shares)
