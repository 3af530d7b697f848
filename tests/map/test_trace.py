"""The trace: what each kind of operation does to units, and what it costs."""

from __future__ import annotations

import time
from dataclasses import replace

import layer_zoo as zoo
import parts
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as tf

import hatcl
from hatcl.hat.convert import map_of
from hatcl.hat.gates import gates_of
from hatcl.hat.held import held
from hatcl.hat.layers.gated import HATLayer
from hatcl.map import trace as traces
from hatcl.map.coupling import Coupling
from hatcl.map.labels import Labels
from hatcl.map.rules import TRACE_RULES, Rule, pointwise
from hatcl.map.shadow import small, varying


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


# ---- learned queries ------------------------------------------------------------------------------


def units(found, name, owner):
    """The unit numbers that a parameter writes (or reads), None where no factor does."""
    return next((f.units.tolist() for f in found.entries[name].factors if f.owner == owner), None)


class Queries(nn.Module):
    """Attention from learned queries to what comes in: the queries meet a weight, or a norm and then a weight."""

    def __init__(self, norm):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 3, 12))
        self.norm = nn.LayerNorm(12) if norm else nn.Identity()
        self.first, self.q, self.k, self.v = nn.Linear(5, 10), nn.Linear(12, 8), nn.Linear(10, 8), nn.Linear(10, 8)
        self.out, self.head = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        q = self.norm(self.queries.expand(len(x), -1, -1))
        h = tf.scaled_dot_product_attention(self.q(q), self.k(x), self.v(x))
        return self.head(self.out(h).mean(1))


TOKENS = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", [False, True], ids=["weight", "norm and weight"])
def test_learned_queries_have_units_of_their_own(norm):
    """They are data that a parameter writes: twelve units, which the query's weight reads, and no copy per task."""
    torch.manual_seed(0)
    source = Queries(norm).eval()
    found = map_of(source, TOKENS)
    mine = units(found, "queries", True)
    assert len(set(mine)) == 12 and 0 not in mine and units(found, "q.weight", False) == mine
    assert not found.entries["queries"].copied and found.entries["q.weight"].known == 1
    assert not norm or (units(found, "norm.weight", True) == mine and found.entries["norm.weight"].why == "norm")
    model = parts.pretend(hatcl.convert(source, 3, TOKENS))
    assert "queries" not in hatcl.describe(model).copies
    assert [parts.leaks(model, TOKENS, t) for t in range(3)] == [None] * 3


@pytest.mark.parametrize("norm", [False, True], ids=["weight", "norm and weight"])
def test_twin_queries_that_are_no_data_are_copied(norm, monkeypatch):
    monkeypatch.setattr(Coupling, "as_activation", lambda self, slots, dims: [])
    found = map_of(Queries(norm).eval(), TOKENS)
    assert units(found, "queries", True) is None and found.entries["queries"].copied


# ---- experts --------------------------------------------------------------------------------------

grouped_mm = getattr(tf, "grouped_mm", getattr(torch, "_grouped_mm", None))


class Experts(nn.Module):
    """Every row goes through the matrices of one of three experts."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(5, 16), nn.Linear(16, 3)
        self.up, self.down = nn.Parameter(0.3 * torch.randn(3, 16, 24)), nn.Parameter(0.3 * torch.randn(3, 24, 16))

    def forward(self, x):
        x = torch.relu(self.first(x))
        ends = torch.tensor([2, 5, 8], dtype=torch.int32)
        return self.head(x + grouped_mm(tf.silu(grouped_mm(x, self.up, offs=ends)), self.down, offs=ends))


ROWS = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.skipif(grouped_mm is None, reason="this torch has no grouped_mm")
def test_experts_keep_both_ends():
    torch.manual_seed(0)
    source = Experts().eval()
    found = map_of(source, ROWS)
    stream = units(found, "first.weight", True)
    assert units(found, "up", False) == stream == units(found, "down", True) == units(found, "head.weight", False)
    hidden = units(found, "up", True)
    assert hidden == units(found, "down", False) and len(set(hidden)) == 24 and not set(hidden) & {0, *stream}
    assert found.entries["up"].known == found.entries["down"].known == 1 and found.notes == {}
    model = parts.pretend(hatcl.convert(source, 3, ROWS))
    assert not {"up", "down"} & set(hatcl.describe(model).copies)
    assert [parts.leaks(model, ROWS, t) for t in range(3)] == [None] * 3
    assert torch.equal(parts.logits(model, None, ROWS), source(ROWS))


@pytest.mark.skipif(grouped_mm is None, reason="this torch has no grouped_mm")
def test_twin_experts_by_an_operation_that_is_not_known_are_copied(monkeypatch):
    for name in ("_grouped_mm", "grouped_mm_fallback"):
        monkeypatch.delitem(TRACE_RULES, name)
    found = map_of(Experts().eval(), ROWS)
    assert found.entries["up"].copied and found.entries["down"].copied
    assert any("_grouped_mm is not known to the trace" in note for note in found.notes.values())


# ---- weight norm ----------------------------------------------------------------------------------


def weight_normed():
    torch.manual_seed(0)
    made = Between(nn.ReLU())
    made.second = nn.utils.parametrizations.weight_norm(made.second, dim=0)
    return made.eval()


GAIN, DIRECTION = (f"second.parametrizations.weight.original{i}" for i in (0, 1))


def test_weight_norm_keeps_its_owner_and_holds_whole_rows():
    """What a row's element is divided by depends on the whole row, so whoever has the row on holds all of it."""
    source, x = weight_normed(), torch.randn(4, 5)
    found = map_of(source, x)
    mine = units(found, "head.weight", False)
    assert units(found, DIRECTION, True) == mine and len(set(mine)) == 7
    assert units(found, DIRECTION, False) is None and not found.entries[DIRECTION].copied
    model = parts.pretend(hatcl.convert(source, 3, x))
    assert [parts.leaks(model, x, t) for t in range(3)] == [None] * 3
    (direction,) = [h for h in held(model) if h.name == DIRECTION]
    on = gates_of(model)[0].masks[0][torch.tensor(mine) - 1]
    assert torch.equal(direction.live(0), on.unsqueeze(1).expand(7, 12)) and on.any() and not on.all()
    assert torch.equal(parts.logits(model, None, x), source(x))


def test_the_gain_of_a_weight_norm_is_its_rows():
    found = map_of(weight_normed(), torch.randn(4, 5))
    assert units(found, GAIN, True) == units(found, DIRECTION, True) and not found.entries[GAIN].copied


def test_twin_rows_of_a_weight_norm_that_are_held_in_part_leak(monkeypatch):
    plain = TRACE_RULES["_weight_norm_interface"]

    def by_element(call, coupling):
        (moved,) = plain.apply(call, coupling)
        columns = (s for s in call.shadows[0].slots if varying(s.ids) == (1,))
        return [replace(moved, slots=(*moved.slots, *columns))]

    monkeypatch.setitem(TRACE_RULES, "_weight_norm_interface", Rule(by_element))
    monkeypatch.setattr(Labels, "mark", _unless_dropped(Labels.mark))
    monkeypatch.setattr(HATLayer, "_hat_cut", HATLayer._hat_by_folds)  # or nothing foreign is ever computed with
    x = torch.randn(4, 5)
    model = parts.pretend(hatcl.convert(weight_normed(), 3, x, verify=False))
    assert units(gates_of(model)[0].unit_map, DIRECTION, False) is not None
    assert any(parts.leaks(model, x, t) is not None for t in range(3))


def _unless_dropped(mark):
    return lambda self, flag, labels: None if flag == "dropped" else mark(self, flag, labels)


# ---- branches -------------------------------------------------------------------------------------


class Selective(nn.Module):
    """Two convolutions, weighed against each other channel by channel (a selective-kernel block)."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.down, self.up, self.head = nn.Linear(8, 4), nn.Linear(4, 16), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        both = torch.stack([self.a(x), self.b(x)], 1)
        weigh = self.up(torch.relu(self.down(both.sum(1).mean((2, 3))))).view(len(x), 2, -1).softmax(1)
        return self.head((both * weigh[..., None, None]).sum(1).mean((2, 3)))


IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def test_branches_that_are_summed_share_their_channels():
    torch.manual_seed(0)
    source = Selective().eval()
    found = map_of(source, IMAGES)
    a = units(found, "a.weight", True)
    assert (
        a == units(found, "b.weight", True) == units(found, "down.weight", False) == units(found, "head.weight", False)
    )
    assert units(found, "up.weight", True) == a * 2 and len(set(a)) == 8 and 0 not in a
    assert found.known == 1 and found.notes == {}
    model = parts.pretend(hatcl.convert(source, 3, IMAGES))
    assert [parts.leaks(model, IMAGES, t) for t in range(3)] == [None] * 3


def test_twin_without_the_coupling_branches_forget_their_channels(monkeypatch):
    monkeypatch.setattr(Coupling, "couple_along", lambda self, ids, dims: ids)
    found = map_of(Selective().eval(), IMAGES)
    assert "sum over differing units forgets them" in found.notes.values()
    assert not set(units(found, "a.weight", True)) & set(units(found, "b.weight", True))
    assert units(found, "down.weight", False) is None


# ---- softmax over units ---------------------------------------------------------------------------


def softmaxed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), nn.Softmax(-1), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 3))


def gap(source, model, x):
    """The largest difference to the network that is physically cut down to each task."""
    with torch.no_grad():
        return max(float((parts.logits(model, t, x) - parts.cut(source, model, t)(x)).abs().max()) for t in range(3))


def test_units_of_a_softmax_are_always_on():
    """An off unit would still take its share, exp(0): so every task has all of them, in copies of its own."""
    x = torch.randn(4, 5)
    source = softmaxed()
    model = parts.pretend(hatcl.convert(source, 3, x).double())
    found = gates_of(model)[0].unit_map
    assert found.num_units == 7 and units(found, "0.weight", True) is None and units(found, "2.weight", False) is None
    assert found.entries["0.weight"].copied and not found.entries["2.weight"].copied
    assert any("they are always on" in note for note in found.notes.values())
    assert [parts.leaks(model, x.double(), t) for t in range(3)] == [None] * 3
    assert gap(source.double(), model, x.double()) < 1e-12  # float64: measured 1.2e-16


def test_twin_units_of_a_softmax_that_could_be_off_are_not_the_cut_networks(monkeypatch):
    mark = Labels.mark
    monkeypatch.setattr(Labels, "mark", lambda self, flag, ids: None if flag == "whole" else mark(self, flag, ids))
    x = torch.randn(4, 5)
    source = softmaxed()
    model = parts.pretend(hatcl.convert(source, 3, x).double())
    assert gates_of(model)[0].unit_map.num_units == 19
    assert gap(source.double(), model, x.double()) > 1e-3


# ---- a norm beside units --------------------------------------------------------------------------


class MixTokens(nn.Module):
    """Units along the tokens, a layer norm over the channels, and a layer that mixes the tokens."""

    def __init__(self):
        super().__init__()
        self.first, self.mix, self.head = nn.Linear(5, 12), nn.Linear(12, 7), nn.Linear(7, 3)
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x):  # [B, 8 channels, 5 positions]
        x = self.first(x).transpose(1, 2)  # [B, 12 tokens, 8]
        x = tf.layer_norm(x, (8,), self.weight, self.bias).transpose(1, 2)
        return self.head(torch.relu(self.mix(x))).flatten(1)


CHANNELS = torch.randn(4, 8, 5, generator=torch.Generator().manual_seed(0))


def after_the_bias_moved(**options):
    """Two tasks with random gates, each task's bias away from the zero at which it starts."""
    torch.manual_seed(0)
    model = hatcl.convert(MixTokens().eval(), 2, CHANNELS, **options)
    with torch.no_grad():
        for module in (model, *model.hat_tasks):
            module._parameters["bias"].normal_()
    return parts.pretend(model)


def test_a_layer_norm_does_not_make_clean_what_runs_beside_it():
    """A token that is off leaves the norm as its bias, not as zero: the layer that mixes tokens has to multiply it by
    zero."""
    model = after_the_bias_moved()
    found = gates_of(model)[0].unit_map
    assert units(found, "first.weight", True) == units(found, "mix.weight", False) == list(range(1, 13))
    assert 1 in found.folds["mix", "mix.weight"] and not found.entries["mix.weight"].copied
    assert [parts.leaks(model, CHANNELS, t) for t in range(2)] == [None, None]


def test_twin_were_it_clean_other_tasks_would_get_in_with_the_bias(monkeypatch):
    monkeypatch.setitem(TRACE_RULES, "native_layer_norm", clean_beside_a_norm(TRACE_RULES["native_layer_norm"]))
    monkeypatch.setattr(HATLayer, "_hat_cut", HATLayer._hat_by_folds)  # or nothing foreign is ever computed with
    model = after_the_bias_moved(verify=False)
    assert 1 not in gates_of(model)[0].unit_map.folds["mix", "mix.weight"]
    assert None not in [parts.leaks(model, CHANNELS, t) for t in range(2)]


def clean_beside_a_norm(rule):
    """The rule as it once was: what a layer norm puts out is zero where what it read was."""

    def layer_norm(call, coupling):
        (moved,) = rule.apply(call, coupling)
        return [replace(moved, slots=tuple(replace(slot, clean=True) for slot in moved.slots))]

    return Rule(layer_norm)


# ---- zero, whatever the sign of the others ----------------------------------------------------------


class Kinked(nn.Module):
    """An activation that is not 0 at 0, by a constant below it (`xielu` of Apertus)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("eps", torch.tensor(-0.1))

    def forward(self, h):
        return torch.expm1(torch.minimum(h, self.eps)) - h


class Floored(nn.Linear):
    """A weight that is kept from falling below a bound."""

    def forward(self, x):
        return tf.linear(x, torch.maximum(self.weight, self.weight.new_tensor(-0.05)), self.bias)


@pytest.mark.parametrize(
    "make", [lambda: Between(Kinked()), lambda: Between(Floored(12, 12))], ids=["activation", "weight"]
)
def test_what_is_zero_for_positive_numbers_alone_is_not_taken_for_zero(make):
    torch.manual_seed(0)
    source, x = make().eval(), torch.randn(4, 5)
    model = hatcl.convert(source, 3, x)
    assert not {"first.weight", "second.weight"} & set(hatcl.describe(model).copies)
    parts.pretend(model)
    assert [parts.leaks(model, x, t) for t in range(3)] == [None] * 3


def test_twin_tried_on_positive_numbers_alone_it_gets_out(monkeypatch):
    torch.manual_seed(0)
    source, x = Between(Kinked()).eval(), torch.randn(4, 5)
    real = pointwise._tried
    monkeypatch.setattr(pointwise, "_tried", lambda call, zero, seed: real(call, zero, seed % 2))
    model = hatcl.convert(source, 3, x)
    assert hatcl.describe(model).copies["second.weight"] == "the attack got out through it"


# ---- known norms that make another weight of theirs -------------------------------------------------


class OneMore(nn.LayerNorm):
    """Multiplies by 1 + weight (`LayerNorm1P` of Nemotron)."""

    def forward(self, x):
        return tf.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class OneMoreRMS(nn.RMSNorm):
    def forward(self, x):
        return tf.rms_norm(x, self.normalized_shape, self.weight + 1, self.eps)


class OneMoreBatch(nn.BatchNorm1d):
    def forward(self, x):
        return tf.batch_norm(x, self.running_mean, self.running_var, self.weight + 1, self.bias, self.training)


@pytest.mark.parametrize("norm", [OneMore, OneMoreRMS, OneMoreBatch])
def test_a_norm_that_makes_another_weight_of_its_own_is_gated_by_what_it_does(norm):
    """The gate folded into the weight would be `1 + 0`. With all units on a task computes what the plain model does,
    with some what the network cut down to them does, and nobody gets in."""
    torch.manual_seed(0)
    source, x = Between(norm(12)).eval(), torch.randn(4, 5)
    with torch.no_grad():
        for p in source.between.parameters():
            p.uniform_(-0.5, 0.5)
    found = map_of(source, x)
    assert found.norms["between"].kind == {OneMore: "centred", OneMoreRMS: "rms", OneMoreBatch: ""}[norm]
    assert units(found, "first.weight", True) == units(found, "second.weight", False) == list(range(1, 13))
    model = parts.pretend(hatcl.convert(source, 3, x), own=False)
    assert not {"first.weight", "second.weight"} & set(hatcl.describe(model).copies)
    assert [parts.leaks(model, x, t) for t in range(3)] == [None] * 3
    gates = gates_of(model)[0]
    on = torch.zeros(13, dtype=torch.bool)
    on[[0, 1, 3, 4, 7, 8, 11]] = True
    gates.masks[0] = torch.cat([on[1:], torch.ones(len(gates.masks[0]) - 12, dtype=torch.bool)])
    gates.epoch += 1
    cut = Between(norm(6))
    for name, p in source.state_dict().items():
        keep = on[1:] if name.startswith(("first", "between")) and p.shape[:1] == (12,) else slice(None)
        value = p[keep] if p.dim() else p
        value = value[:, on[1:]] if name == "second.weight" else value
        path, _, last = name.rpartition(".")
        store = cut.get_submodule(path)
        (store._parameters if last in store._parameters else store._buffers)[last] = (
            nn.Parameter(value) if last in store._parameters else value
        )
    torch.testing.assert_close(parts.logits(model, 0, x), cut.eval()(x), rtol=1e-4, atol=1e-5)
