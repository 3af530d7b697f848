"""Digests of what vectors were taken from, and tied tensors under one name."""

from __future__ import annotations

import pytest
import torch

from hatcl.errors import VectorError
from hatcl.functional import digest_of
from hatcl.vectors.bases import digests_of, joined_bases, joined_kinds, known_as, refuse_integers
from hatcl.vectors.tensors import Kind, Lazy

X, Y = torch.arange(3.0), torch.ones(2)
KINDS = {"x": Kind((3,), torch.float32)}


def test_files_are_hashed_when_asked_for_and_once():
    read = []
    lazy = digests_of(Lazy(KINDS, lambda name: read.append(name) or X))
    assert read == [] and lazy["x"] == lazy["x"] == digest_of(X) == digests_of({"x": X})["x"] and read == ["x"]


def test_digests_of_several_bases_are_joined():
    base, other = {"x": "1"}, {"x": "2"}
    assert joined_bases([base, None], "x") == base == joined_bases([None, base], "x") == joined_bases([base] * 2, "x")
    assert joined_bases([None, None], "x") is None
    assert joined_bases([base, {"y": "2", "x": "1"}], "xy") == {"x": "1", "y": "2"}
    assert joined_bases([base, None], "xy") is None  # nobody knows y
    with pytest.raises(VectorError, match="x: the vectors were taken from different bases; both must start from one"):
        joined_bases([base, other], "x")
    late = joined_bases([base, Lazy(KINDS, lambda name: "2")], "x")
    with pytest.raises(VectorError, match="x: the vectors were taken from different bases"):
        late["x"]


def test_one_rule_for_what_a_vector_lacks():
    full, part = {"x": Kind((3,), torch.float32), "y": Kind((2,), torch.float32)}, KINDS
    assert joined_kinds([(full, False), (part, True)]) == joined_kinds([(part, True), (full, False)]) == full
    with pytest.raises(VectorError, match=r"vector 1 lacks 1 tensors that vector 0 has: y\. Take both from"):
        joined_kinds([(full, False), (part, False)])
    with pytest.raises(VectorError, match=r"vector 0 lacks 1 tensors that vector 1 has: y"):
        joined_kinds([(part, False), (full, True)])
    with pytest.raises(VectorError, match=r"x is \[3\] in vector 0, \[4\] in vector 2; take the vectors"):
        joined_kinds([(part, True), ({}, True), ({"x": Kind((4,), torch.float32)}, True)])


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
