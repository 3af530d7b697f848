"""Reductions: branches that are summed, softmax over units."""

from __future__ import annotations

import parts
import torch
from map_parts import units
from torch import nn

import hatcl
from hatcl.hat.convert import map_of
from hatcl.hat.gates import gates_of
from hatcl.map.coupling import Coupling
from hatcl.map.labels import Labels

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
