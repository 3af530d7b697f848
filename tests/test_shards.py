"""Plain models: what knows shards does nothing to them. Sharded ones are in `tests/hat/test_distributed.py`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hatcl
from hatcl import shards


def test_a_plain_tensor_is_all_of_itself():
    x = torch.randn(3, requires_grad=True)
    assert shards.unsharded(x) is x and not shards.is_shard(x)
    assert shards.part_of(x, x) is x and shards.gathered_part(x, x) is x


def test_a_plain_model_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert shards.sharded_modules(model) == [] and shards.reshard(model) is False
    shards.check_whole(model, "forget_task")


def test_what_cannot_be_done_to_shards_says_what_to_do():
    class Sharded(nn.Linear):
        _get_fsdp_state = None

    model = nn.Sequential(Sharded(3, 4))
    assert shards.sharded_modules(model) == [model[0]]
    with pytest.raises(hatcl.HATError, match="forget_task: .*do it before fully_shard, or with hatcl.gathered"):
        shards.check_whole(model, "forget_task")


def test_a_copy_of_a_plain_model_shares_nothing():
    model = nn.Linear(3, 4)
    made = hatcl.gathered(model)
    assert made is not model and torch.equal(made.weight, model.weight)
    assert made.weight.data_ptr() != model.weight.data_ptr()
