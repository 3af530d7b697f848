"""The trace: what each kind of operation does to units, and what it costs."""

from __future__ import annotations

import time

import layer_zoo as zoo
import parts
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as tf

import hatcl
from hatcl.convert import map_of
from hatcl.map import trace as traces
from hatcl.map.shadow import small


class Between(nn.Module):
    """Two linear layers with something between them that keeps the number of elements."""

    def __init__(self, between, width=12, out=None):
        super().__init__()
        self.first, self.between = nn.Linear(5, width), between
        self.second = nn.Linear(out or width, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        return self.head(torch.relu(self.second(self.between(self.first(x)))))


UNITS_STAY = {
    "view": lambda h: h.view(-1, 3, 4).reshape(len(h), 12),
    "permute": lambda h: h.view(-1, 3, 4).permute(0, 2, 1).reshape(len(h), 12),
    "flip_roll": lambda h: h.flip(-1).roll(5, -1),
    "split_cat": lambda h: torch.cat(h.split([2, 7, 3], -1)[::-1], -1),
    "chunk_stack": lambda h: torch.stack(h.chunk(3, -1), 1).flatten(1),
    "index": lambda h: h[:, torch.tensor([3, 1, 0, 2, 11, 10, 9, 8, 7, 6, 5, 4])],
    "gather": lambda h: h.index_select(-1, torch.arange(11, -1, -1)),
    "in_place": lambda h: h.clone().mul_(2).add_(1),
    "write_into_zeros": lambda h: torch.zeros(len(h), 12).copy_(h),
    "write_a_slice": lambda h: _write(h),
    "cast": lambda h: h.double().float(),
    "pixel_shuffle": lambda h: tf.pixel_unshuffle(tf.pixel_shuffle(h.view(-1, 12, 1, 1), 2), 2).flatten(1),
    "einsum": lambda h: torch.einsum("bi->ib", h).t(),
    "unbind": lambda h: torch.cat(h.unbind(-1)).view(12, len(h)).t(),
    "gelu": tf.gelu,
    "sigmoid": torch.sigmoid,
    "gate": lambda h: h * torch.sigmoid(h),
    "where": lambda h: torch.where(h > 0, h, 0.1 * h),
    "maximum": lambda h: torch.maximum(h, -h),
    "checkpoint": lambda h: torch.utils.checkpoint.checkpoint(torch.tanh, h, use_reentrant=False),
    "dropout": lambda h: tf.dropout(h, 0.5, training=False),
    "pad_and_cut": lambda h: tf.pad(h.view(-1, 12, 1), (2, 2))[..., 2:3].flatten(1),
}


def _write(h):
    out = torch.zeros(len(h), 12)
    out[:, 6:] = h[:, :6]
    out[:, :6] = h[:, 6:]
    return out


@pytest.mark.parametrize("name", UNITS_STAY)
def test_both_ends_are_known_through(name):
    """The second layer's weight has owner and reader, its readers are the first's units, and no one gets in."""
    torch.manual_seed(0)
    source = Between(UNITS_STAY[name]).eval()
    x = torch.randn(4, 5)
    found = map_of(source, x)
    first = next(f.units for f in found.entries["first.weight"].factors if f.owner)
    reader = next(f.units for f in found.entries["second.weight"].factors if not f.owner)
    assert sorted(reader.tolist()) == sorted(first.tolist()) == list(range(1, 13))
    model = parts.pretend(hatcl.convert(source, 2, x))
    assert [parts.leaks(model, x, t) for t in range(2)] == [None, None]


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


def bytes_held(tracer):
    """Of all shadows alive and of the labels."""
    storages = {}
    for s in tracer.shadows.values():
        for slot in s.slots if s is not None else ():
            storage = slot.ids.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    labels = tracer.labels
    return sum(storages.values()) + labels.parent.nbytes + sum(f.nbytes for f in labels.flags.values())


@pytest.mark.slow
@pytest.mark.parametrize("which", ["vit_base_patch16_224", "small"])
def test_shadows_take_at_most_the_models_own_memory(which, big, monkeypatch):
    model, x = big if which != "small" else (parts.plain("resnet").eval(), parts.images("resnet"))
    peak = []
    plain = traces.Tracer.rule

    def rule(self, *args):
        out = plain(self, *args)
        if len(peak) % 10 == 0:
            peak.append(bytes_held(self))
        else:
            peak.append(0)
        return out

    monkeypatch.setattr(traces.Tracer, "rule", rule)
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
