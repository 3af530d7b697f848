"""Digests of what vectors were taken from, and tied tensors under one name."""

from __future__ import annotations

import pytest
import torch

from hatcl.errors import VectorError
from hatcl.functional import digest_of
from hatcl.vectors.bases import digests_of, joined_bases, known_as, one_base, refuse_integers
from hatcl.vectors.tensors import Kind, Lazy

X, Y = torch.arange(3.0), torch.ones(2)
KINDS = {"x": Kind((3,), torch.float32)}


def test_files_are_hashed_when_asked_for_and_once():
    read = []
    lazy = digests_of(Lazy(KINDS, lambda name: read.append(name) or X))
    assert read == [] and lazy["x"] == lazy["x"] == digest_of(X) == digests_of({"x": X})["x"] and read == ["x"]


def test_one_base_of_two_vectors():
    base, other = {"x": "1"}, {"x": "2"}
    assert one_base(base, None) is base is one_base(None, base) is one_base(base, base) and one_base(None, None) is None
    assert one_base(base, dict(base)) == base
    with pytest.raises(VectorError, match="x: the vectors were taken from different bases; both must start from one"):
        one_base(base, other)
    late = one_base(base, Lazy(KINDS, lambda name: "2"))
    with pytest.raises(VectorError, match="x: the vectors were taken from different bases"):
        late["x"]


def test_bases_of_several_adapters_are_joined():
    assert joined_bases([{"x": "1"}, {"y": "2", "x": "1"}]) == {"x": "1", "y": "2"}
    assert joined_bases([{"x": "1"}, None]) is None
    with pytest.raises(VectorError, match="x: the vectors were taken from different bases"):
        joined_bases([{"x": "1"}, {"x": "2"}])


def test_tied_tensors_go_by_their_first_name():
    tied = {"a": "a", "b": "a"}
    assert list(known_as({"b": X, "c": Y}, tied, {"c"})) == ["a"]
    assert known_as({"a": X, "b": X.clone()}, tied, set())["a"] is X
    with pytest.raises(VectorError, match="a and b are one tensor in one of the models and differ in the other"):
        known_as({"a": X, "b": X + 1}, tied, set())
    lazy = known_as(Lazy({"b": KINDS["x"]}, lambda name: X), tied, set())
    assert isinstance(lazy, Lazy) and lazy["a"] is X


def test_models_that_differ_in_integers_alone_are_refused():
    ours, theirs = ({"w": torch.tensor([i]), "n.num_batches_tracked": torch.tensor(i)} for i in (1, 2))
    with pytest.raises(VectorError, match=r"differ in integers only, such as w \(torch.int64, \[1\]\)"):
        refuse_integers(ours, theirs)
    refuse_integers({**ours, "w": X}, {**theirs, "w": X})  # a counter is none
