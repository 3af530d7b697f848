"""Every error is a `HATError`, and what Python calls it too."""

from __future__ import annotations

import pytest

from hatcl import errors
from hatcl.errors import HATError, nearest

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HATError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_kind_says_when_it_is_raised_and_is_one_of_pythons_own(kind):
    assert kind.__doc__ and issubclass(kind, HATError)
    assert kind is HATError or issubclass(kind, (ValueError, RuntimeError))


@pytest.mark.parametrize("name, choices, near", [
    ("cosin", ["linear", "cosine", "none"], "cosine"), (7, ["seven", "7b"], "7b"), ("zzz", ["only"], "only"),
])  # fmt: skip
def test_the_nearest_name(name, choices, near):
    assert nearest(name, choices) == near
