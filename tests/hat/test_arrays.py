"""Array masks: q x q tasks that share no element with a unit at both ends."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import parts
import pytest
import timm
import torch
from torch import nn

import hatcl
from hatcl.hat import arrays
from hatcl.hat.arrays import array_masks, exempt, with_own_ends
from hatcl.hat.convert import map_of
from hatcl.hat.gates import gates_of
from hatcl.hat.held import held
from hatcl.hat.registry import layer_for
from hatcl.map.units import Entry, Factor, UnitMap


def timm_net(name, **options):
    return lambda: timm.create_model(name, num_classes=4, **options)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.cell, self.head = nn.Linear(6, 8), nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.cell(self.read(x))[0])


def grouped():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3, groups=4), nn.ReLU(), nn.Conv2d(24, 8, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


NETS = {
    "mlp": (parts.mlp, (3, 4, 4)),
    "resnet": (parts.resnet, (3, 32, 32)),
    "vit": (parts.vit, (3, 16, 16)),
    "grouped": (grouped, (3, 8, 8)),
    "convnext": (timm_net("test_convnext"), (3, 32, 32)),
    "efficientnet": (timm_net("test_efficientnet"), (3, 32, 32)),
    "lstm": (Tagger, (5, 6)),
}


def mapped(name):
    torch.manual_seed(0)
    make, shape = NETS[name]
    net = make().eval()
    return with_own_ends(map_of(net, torch.randn(2, *shape)), net), net


def live_by_tasks(unit_map, q):
    """For each shared parameter, of how many of all q x q tasks an element is live: `[*shape]`."""
    rows = array_masks(unit_map, q, q * q)
    always = torch.ones(1, dtype=torch.bool)
    masks = [torch.cat([always, row]) for row in rows]
    return {e.name: sum(e.live(on).int() for on in masks) for e in unit_map.entries.values() if not e.copied}


@pytest.mark.parametrize("name, q", [*((name, 2) for name in NETS), ("resnet", 4), ("vit", 4), ("grouped", 4)])
def test_no_two_tasks_share_an_element_with_two_ends(name, q):
    """And none is left over, where q divides every layer: each element is live for exactly one task."""
    unit_map, net = mapped(name)
    counts = live_by_tasks(unit_map, q)
    spared = set(exempt(unit_map))
    two = {n for n in counts if len({f.owner for f in unit_map.entries[n].factors}) == 2}
    assert two - spared and all(bool((counts[n] == 1).all()) for n in two - spared)
    assert spared == ({"cell.weight_hh_l0"} if name == "lstm" else set())
    assert [path for path, note in unit_map.notes.items() if arrays.EXEMPT in note] == ["cell"] * (name == "lstm")
    stem = counts.keys() - two
    assert stem and all(bool((counts[n] == q).all()) for n in stem)
    reads = {id(p) for m in net.modules() for n, p in m._parameters.items() if n in layer_for(type(m)).hat_reader_dims}
    assert all(id(net.get_parameter(n)) in reads for n in stem)


def test_with_one_colour_for_all_they_do(monkeypatch):
    """Twin: it is the colours that keep tasks apart."""
    monkeypatch.setattr(arrays, "_coloured", lambda unit_map, q: [(1, 0)] * len(unit_map.layers))
    with pytest.raises(AssertionError):
        test_no_two_tasks_share_an_element_with_two_ends("resnet", 2)


def clique(layers, q):
    """A map of layers of q units each that all read each other."""
    units = [np.arange(1 + i * q, 1 + (i + 1) * q) for i in range(layers)]
    entries = {
        f"{i}.{j}": Entry(
            f"{i}.{j}", (q, q), (q, q),
            (Factor(0, units[i], (q, 1), True), Factor(1, units[j], (1, q), False)), False,
        )
        for i in range(layers) for j in range(i)
    }  # fmt: skip
    bounds = [(str(i), 1 + i * q, 1 + (i + 1) * q) for i in range(layers)]
    return UnitMap(layers * q, bounds, entries, {}, {}, {}, {})


def test_without_copies_of_what_has_one_end_tasks_share_it(monkeypatch):
    """Twin: biases, layer scales and depthwise kernels."""
    monkeypatch.setattr(sys.modules[__name__], "with_own_ends", lambda unit_map, net: unit_map)
    with pytest.raises(AssertionError):
        test_no_two_tasks_share_an_element_with_two_ends("convnext", 2)


@pytest.mark.parametrize("q", range(2, 14))
def test_any_two_colours_tell_all_tasks_apart(q):
    """On a clique of as many layers as there are colours; of one more there is none left, and its layer is named."""
    prime = next(n for n in range(2, q + 1) if q % n == 0)
    rows = array_masks(clique(prime + 1, q), q, q * q)
    for layer, other in itertools.combinations(range(prime + 1), 2):
        seen = {tuple(row.view(-1, q)[[layer, other]].int().argmax(1).tolist()) for row in rows}
        assert len(seen) == q * q
    with pytest.raises(hatcl.ConfigError) as caught:
        array_masks(clique(prime + 2, q), q, q * q)
    text = str(caught.value)
    assert f"reads or is read by layers of all {prime + 1} colours that there are for q={q} (" in text
    assert "a q without small factors has more (array:" in text and "else take masks='learned'" in text


def arrayed(name="mlp", tasks=4, verify=False):
    torch.manual_seed(0)
    make, shape = NETS[name]
    return hatcl.convert(make(), tasks, torch.randn(2, *shape), config={"masks": "array:2"}, verify=verify)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def learned(name):
    model, shape, want = arrayed(name, verify=True), NETS[name][1], {}
    optimizer, x = adamw(model), parts.problem(shape)[0]
    for t in range(4):
        losses = parts.train(model, t, optimizer, parts.problem(shape, t), 5)
        assert min(losses[-2:]) < max(losses[:2])
        want[t] = parts.logits(model, t, x)
        assert all(torch.equal(parts.logits(model, e, x), want[e]) for e in want)
    return model, x, want


@pytest.mark.parametrize("name", ["resnet", "convnext"])
def test_q_times_q_tasks_are_learned_and_one_is_forgotten_whole(name):
    model, x, want = learned(name)
    assert hatcl.certify(model, x, strict=True).exact
    before = {h.name: h.param.detach().clone() for h in held(model)}
    report = hatcl.forget_task(model, 2)
    stem = {"resnet": "conv1.0.weight", "convnext": "stem.0.weight"}[name]
    assert report.kept == int(gates_of(model)[0].unit_map.entries[stem].live(on(model, 2)).sum()) > 0
    assert stem not in report.erased and report.share_kept < 0.05
    assert all(torch.equal(parts.logits(model, t, x), want[t]) for t in (0, 1, 3))
    shared = [h for h in held(model) if h.task is None and not h.plain and h.name != stem]
    assert all(not bool((h.param == before[h.name])[h.live(2)].any()) for h in shared if "bias" not in h.name)
    parts.train(model, 2, adamw(model), parts.problem(NETS[name][1], 2), 2)  # with the gates that it had
    assert all(torch.equal(parts.logits(model, t, x), want[t]) for t in (0, 1, 3))
    assert hatcl.describe(model).room.tasks_left == 0


def on(model, task):
    return torch.cat([torch.ones(1, dtype=torch.bool), gates_of(model)[0].given[task]])


def test_copies_say_why_and_stems_are_none():
    copies = hatcl.describe(arrayed("convnext")).copies
    assert copies["stages.0.blocks.0.conv_dw.weight"] == arrays.ONE_END == copies["stages.0.blocks.0.gamma"]
    assert "stem.0.weight" not in copies and "stages.0.blocks.0.mlp.fc1.weight" not in copies


def test_they_survive_a_file_and_tasks_that_are_added(tmp_path):
    model = arrayed(tasks=2)
    hatcl.save_pretrained(model, tmp_path)
    again = hatcl.from_pretrained(tmp_path, base=parts.plain("mlp"))
    hatcl.add_tasks(again, 2)
    assert torch.equal(gates_of(again)[0].given, gates_of(arrayed())[0].given)
    assert gates_of(again)[0].config.masks == "array:2" and hatcl.describe(again).room.tasks_left == 4
    before = parts.snapshot(again)
    with pytest.raises(hatcl.ConfigError, match="num_tasks: got 5, masks='array:2' has room for 2 x 2 = 4 tasks; use"):
        hatcl.add_tasks(again, 1)
    assert parts.same(before, again.state_dict())


def test_a_timm_name_takes_them():
    model = timm.create_model(
        "hat_test_resnet", num_tasks=9, num_classes=4, hat_config={"masks": "array:3"}, verify=False
    )
    assert gates_of(model)[0].given.any(1).all() and gates_of(model)[0].config.array == 3


# ---- masks of one's own ---------------------------------------------------------------------------------


def halves(task, layer, units):
    return torch.arange(units) % 2 == task


@pytest.mark.parametrize("masks", [halves, [{n: halves(t, n, 32) for n in ("1", "4")} for t in (0, 1)]])
def test_masks_of_ones_own_are_resolved_at_conversion(masks, tmp_path):
    model = hatcl.convert(parts.mlp(), 2, parts.images("mlp", 2), masks=masks)
    assert gates_of(model)[0].config.masks == "given"
    hatcl.save_pretrained(model, tmp_path)
    again = hatcl.from_pretrained(tmp_path, base=parts.mlp())
    for t in (1, 0):
        parts.train(again, t, adamw(again), parts.problem(parts.shape_of("mlp"), t), 3)
        assert all(torch.equal(m, halves(t, n, 32)) for n, m in hatcl.masks_of(again, t).items())
    hatcl.add_tasks(again, 1)
    with pytest.raises(hatcl.TaskError, match="task 2: it is given no gates, and masks='given' has them given; call"):
        parts.train(again, 2, adamw(again), parts.problem(parts.shape_of("mlp"), 2), 3)
    hatcl.forget_task(again, 1)
    parts.train(again, 1, adamw(again), parts.problem(parts.shape_of("mlp"), 1), 3)
    assert all(torch.equal(m, halves(1, n, 32)) for n, m in hatcl.masks_of(again, 1).items())


# ---- what is refused ------------------------------------------------------------------------------------


def deep(*widths, groups=1):
    sizes = enumerate(itertools.pairwise(widths))
    layers = [(nn.Conv1d(a, b, 1, groups=groups if i else 1), nn.ReLU()) for i, (a, b) in sizes]
    return nn.Sequential(*[m for pair in layers for m in pair], nn.Flatten(), nn.Linear(widths[-1], 4))


@pytest.mark.parametrize(
    "net, q, text",
    [
        (deep(5, 8, 3, 8), 4, "masks='array:4': 2 has 3 units, which are fewer than 4 groups; take a smaller q"),
        (
            deep(5, 8, 8, groups=4),
            4,
            "masks='array:4': a convolution group of 2 has 2 outputs, in which not all of 4 gr",
        ),
        (
            deep(5, 8),
            2,
            "masks='array:2': no element reads a unit of one layer and writes one of another, so tasks could",
        ),
    ],
)
def test_networks_without_room_for_arrays(net, q, text):
    parts.unchanged(
        net,
        lambda: hatcl.convert(net, 4, torch.randn(2, 5, 1), config={"masks": f"array:{q}"}),
        hatcl.ConfigError,
        text,
    )


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"config": {"masks": "given"}}, hatcl.ConfigError, "the option masks='given' needs hatcl.convert"),
        (
            {"config": {"masks": "array:2"}, "masks": halves},
            hatcl.ConfigError,
            "masks: got masks for every task and the op",
        ),
        ({"masks": [{}]}, hatcl.ConfigError, "masks: got 1 masks, expected one mapping .* for each of 2 tasks, or"),
        ({"masks": {"1": 1}}, hatcl.ConfigError, "masks: got dict, expected one mapping"),
        (
            {"masks": lambda t, n, k: torch.zeros(k)},
            hatcl.TaskError,
            "task 0: masks.'1'.: got float32 of shape .32., exp",
        ),
    ],
)
def test_masks_that_are_no_masks(options, error, text):
    net = parts.mlp()
    parts.unchanged(net, lambda: hatcl.convert(net, 2, parts.images("mlp", 2), **options), error, text)


def test_layers_by_hand_have_no_map_to_arrange_them_on():
    layer = hatcl.HATLinear(12, 16, num_tasks=2, config=hatcl.HATConfig(masks="array:2"))
    model = nn.Sequential(layer, hatcl.TaskIndexedLinear(16, 4, reads=layer))
    with pytest.raises(hatcl.TaskError, match="task 0: it is given no gates, and masks='array:2' has them given; call"):
        parts.train(model, 0, adamw(model), parts.problem((12,)), 2)


def test_new_units_are_dealt_to_all_groups():
    """A network that has grown: tasks that are not sealed use the new units too, and still share no weight."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(16, 6)
    model = hatcl.convert(net, 2, x, config={"masks": "array:2"})
    parts.train(model, 0, adamw(model), parts.problem((6,)), 2)
    want = parts.logits(model, 0, x)
    hatcl.grow(model, factor=1.5)
    hatcl.add_tasks(model, 2)
    g = gates_of(model)[0]
    live = [g.unit_map.entries["2.weight"].live(torch.cat([torch.ones(1, dtype=torch.bool), row])) for row in g.given]
    assert int(sum(mask.int() for mask in live).max()) == 1
    assert g.given.sum(1).tolist() == [12] * 4 and int(g.masks[0].sum()) == 8
    for task in (1, 2, 3):
        parts.train(model, task, adamw(model), parts.problem((6,)), 2)
    assert torch.equal(parts.logits(model, 0, x), want) and hatcl.certify(model, x).exact
