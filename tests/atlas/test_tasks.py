"""Batches of tasks: in step with each other, repeated, moved; what cannot be passed over again is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hatcl import ConfigError
from hatcl.atlas import AtlasTask
from hatcl.calls import outputs
from hatcl.data.batches import Repeated, Zipped, again, lengths


def test_an_epoch_ends_with_the_shortest_or_follows_the_first():
    assert list(Zipped([[1, 2, 3], "ab"])) == [(1, "a"), (2, "b")]
    following = Zipped([[1, 2, 3], "ab"], follow_first=True)
    assert list(following) == [(1, "a"), (2, "b"), (3, "a")]
    assert len(following) == 3 and len(Zipped([[1, 2, 3], "ab"])) == 2
    assert list(Zipped([[1, 2], []], follow_first=True)) == []  # and does not turn round forever


def test_repeated_reaches_the_steps():
    assert list(Repeated("ab", 3)) == list("abab") and len(Repeated("ab", 3)) == 4
    assert list(Repeated("abc", 3)) == list("abc")
    with pytest.raises(TypeError, match="without a length"):
        lengths([iter("a")])


def test_validation_defaults_to_the_batches():
    assert AtlasTask("a", [1]).chosen_by == [1]
    assert AtlasTask("a", [1], [2]).chosen_by == [2]


def test_an_iterator_is_refused():
    with pytest.raises(ConfigError, match="validation: got list_iterator, expected batches that can be passed over"):
        again(iter([1]), "validation")
    with pytest.raises(ConfigError, match="got int"):
        again(3, "batches")


class Takes(nn.Module):
    def __init__(self, give):
        super().__init__()
        self.give = give

    def forward(self, a, b=2.0):
        return self.give(a * b)


def test_inputs_are_one_tensor_several_or_named():
    model, x = Takes(lambda t: t), torch.ones(2, 3)
    assert outputs(model, x).sum() == 12
    assert outputs(model, (x, 3.0)).sum() == 18
    assert outputs(model, {"a": x, "b": 4.0}, head=lambda t: -t).sum() == -24


def test_an_output_without_logits_is_refused():
    with pytest.raises(ConfigError, match="the model gives tuple, expected a tensor or an output with logits"):
        outputs(Takes(lambda t: (t,)), torch.ones(1))
