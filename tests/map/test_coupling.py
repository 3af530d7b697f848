"""The verbs by which rules couple labels, own and read units, fold and note, on a model that does not run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hatcl.map.coupling import Coupling, NormSeen
from hatcl.map.shadow import Shadow, Slot, always_on, placed


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))


@pytest.fixture
def coupling(model):
    return Coupling(model, norms=lambda m: isinstance(m, nn.LayerNorm))


def labels_of(coupling, name, dim):
    start = coupling.found.first[name, dim]
    return torch.arange(start, start + {("0.weight", 1): 3}.get((name, dim), 4))


def having(coupling, role):
    """The axes whose labels play a role."""
    return {axis for axis in coupling.labels.axes_of(np.flatnonzero(coupling.labels.flags[role]))}


def test_each_index_of_a_parameter_has_a_label(model, coupling):
    found = coupling.found.first
    assert list(found) == [("0.weight", 0), ("0.weight", 1), ("0.bias", 0), ("1.weight", 0), ("1.bias", 0)]
    shadow = coupling.shadow(model[0].weight)
    assert shadow.sources == {"0.weight"} and [s.folds for s in shadow.slots] == [{("0.weight", 0)}, {("0.weight", 1)}]
    assert coupling.shadow(torch.zeros(2)) is None


def test_a_parameter_owns_what_it_meets_and_is_forced_on_where_that_is_always_on(model, coupling):
    (bias,) = coupling.shadow(model[0].bias).slots
    rows = labels_of(coupling, "0.weight", 0)
    rows[3] = 0
    coupling.own(bias, rows)
    assert coupling.labels.find(bias.ids.numpy()).tolist() == [*rows[:3].tolist(), int(bias.ids[3])]
    assert coupling.labels.flags["forced"][bias.ids.numpy()].tolist() == [False, False, False, True]


def test_a_weight_carries_its_rows_and_leaves_a_fold_pending(model, coupling):
    coupling.enter("0", ())
    rows = coupling.shadow(model[0].weight).slots[0]
    written, uses = coupling.carry(rows)
    assert written.clean and uses == {("0", ("0.weight", 0))} and not coupling.found.folds
    assert having(coupling, "carried") == having(coupling, "owns") == {("0.weight", 0)}
    coupling.commit(Shadow(pending=frozenset(uses)))
    assert coupling.found.folds == uses


def test_where_the_gate_would_be_scaled_away_the_output_takes_it(model, coupling):
    coupling.enter("0", ())
    rows = replace(coupling.shadow(model[0].weight).slots[0], folds=None)
    _, uses = coupling.carry(rows)
    assert uses == {("0", ("0.weight", 0, "output"))} and "acts on the layer's output" in coupling.found.notes["0"]


@pytest.mark.parametrize("clean", [True, False])
def test_a_weight_reads_units_and_gates_what_is_not_zero_where_they_are_off(model, coupling, clean):
    coupling.enter("0", ())
    columns = coupling.shadow(model[0].weight).slots[1]
    given = labels_of(coupling, "0.bias", 0)[:3]
    coupling.read(columns, [Slot(given, clean)])
    assert having(coupling, "read") == {("0.weight", 1)} and not having(coupling, "forced")
    assert coupling.found.read_dirty == (set() if clean else {("0", ("0.weight", 1))})
    assert torch.equal(coupling.canonical(given), coupling.canonical(columns.ids[0]))


def test_a_weight_that_reads_nothing_known_is_forced_on(model, coupling):
    coupling.read(coupling.shadow(model[0].weight).slots[1], [])
    assert having(coupling, "forced") == {("0.weight", 1)} and not having(coupling, "read")


def test_nothing_is_coupled_with_always_on(coupling):
    labels = labels_of(coupling, "0.bias", 0)
    coupling.couple(labels, always_on([4]))
    assert torch.equal(coupling.canonical(labels), labels)


def test_coupling_along_a_dimension_makes_one_unit_of_what_differs_there(coupling):
    ids = torch.stack([labels_of(coupling, "0.bias", 0), labels_of(coupling, "1.bias", 0)])
    merged = coupling.couple_along(ids, [0])
    assert merged.tolist() == [ids[0].tolist()] * 2 and merged.stride(0) == 0


def test_a_parameter_adopts_along_the_slot_that_couples_the_fewest_units(model, coupling):
    """Of a square table, the side that meets each unit once, not the one that meets them all."""
    table = nn.Linear(4, 4)
    square = Coupling(table, norms=lambda m: False)
    rows, columns = square.shadow(table.weight).slots
    ids = placed(torch.arange(20, 24), 0, (4, 4)) * 1  # runs along both dimensions, differs along one
    assert square.adopt(ids, [columns, rows]) is rows
    assert square.adopt(placed(torch.arange(4), 1, (4, 4)), [rows]) is None and square.adopt(ids, []) is None


def test_a_reduction_over_units_tells_of_a_norm_and_is_noted_elsewhere(model, coupling):
    x, labels = torch.zeros(2, 4), labels_of(coupling, "0.bias", 0)
    coupling.keep(x, Shadow((Slot(labels.expand(2, 4)),)))
    coupling.enter("1", (x,))
    coupling.mixes("mean", labels)
    assert coupling.found.norms["1"].across and coupling.found.norms["1"].over == {1} and not coupling.found.notes
    coupling.leave()
    coupling.enter("0", (x,))
    coupling.mixes("mean", labels)
    coupling.mixes("sum", labels)
    assert coupling.found.mixing["0"].over == {1}
    assert coupling.found.notes == {"0": "mean over differing units forgets them"}  # a module's first note


def test_slots_that_say_nothing_are_left_out(coupling):
    labels = labels_of(coupling, "0.bias", 0)
    dirty = Slot(labels[:1].expand(4), clean=False)  # one unit over all, and not zero where it is off: always on
    x = torch.zeros(4)
    coupling.keep(x, Shadow((Slot(labels), Slot(labels), dirty)))
    assert [s.ids.tolist() for s in coupling.shadow(x).slots] == [labels.tolist()]
    assert coupling.labels.flags["whole"].nonzero()[0].tolist() == [int(labels[0])]


def test_what_enters_a_norm_is_seen_by_dimension():
    ids = torch.arange(1, 4).view(3, 1).expand(2, 3, 5)
    seen = NormSeen.of(Shadow((Slot(ids, clean=False),)))
    assert {d: v.tolist() for d, v in seen.ids.items()} == {1: [1, 2, 3]} and seen.ndim == 3
    assert not seen.clean and not seen.across and NormSeen.of(Shadow()).clean
