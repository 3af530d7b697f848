"""Batches of tasks: in step with each other, repeated."""

from __future__ import annotations

import pytest

from hatcl import ConfigError
from hatcl.data.batches import Repeated, Zipped, lengths


def test_an_epoch_ends_with_the_shortest_or_follows_the_first():
    assert list(Zipped([[1, 2, 3], "ab"])) == [(1, "a"), (2, "b")]
    following = Zipped([[1, 2, 3], "ab"], follow_first=True)
    assert list(following) == [(1, "a"), (2, "b"), (3, "a")]
    assert len(following) == 3 and len(Zipped([[1, 2, 3], "ab"])) == 2
    with pytest.raises(ConfigError, match="batches: there are none; pass a list"):  # and does not turn round forever
        list(Zipped([[1, 2], []], follow_first=True))
    with pytest.raises(ConfigError, match="batches: they can be read only once"):
        list(Zipped([[1, 2], iter("a")], follow_first=True))


def test_repeated_reaches_the_steps():
    assert list(Repeated("ab", 3)) == list("abab") and len(Repeated("ab", 3)) == 4
    assert list(Repeated("abc", 3)) == list("abc")
    with pytest.raises(TypeError, match="without a length"):
        lengths([iter("a")])
