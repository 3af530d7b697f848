"""How a plain model is made again: a source registers under a kind, and is found by what it recognises."""

from __future__ import annotations

import pytest
from torch import nn

from hatcl import sources
from hatcl.sources import build_source, register_source, source_of


class Mine(nn.Linear):
    pass


@pytest.fixture
def registered(monkeypatch):
    """Registers a source, for one test."""
    for table in ("_SOURCES", "_RECOGNISERS"):
        monkeypatch.setattr(sources, table, dict(getattr(sources, table)))

    @register_source("mine", lambda m: {"width": m.in_features} if isinstance(m, Mine) else None)
    def make(source):
        return Mine(source["width"], 2)

    return make


def test_what_is_recognised_is_made_again(registered):
    source = source_of(Mine(5, 2))
    assert source == {"kind": "mine", "width": 5}
    made = build_source(source)
    assert type(made) is Mine and made.in_features == 5
    assert registered({"width": 3}).in_features == 3  # the decorator gives the function back


def test_what_nobody_recognises_has_no_source(registered):
    assert source_of(nn.Linear(5, 2)) is None


def test_a_source_without_a_recogniser_is_written_by_its_own_maker(registered):
    register_source("silent")(lambda source: nn.Identity())
    assert source_of(nn.Identity()) is None and isinstance(build_source({"kind": "silent"}), nn.Identity)
