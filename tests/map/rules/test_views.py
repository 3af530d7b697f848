"""What moves values, and what computes with each by itself, keeps units."""

from __future__ import annotations

import parts
import pytest
import torch
from map_parts import Between
from torch.nn import functional as tf

import hatcl
from hatcl.hat.convert import map_of

UNITS_STAY = {
    "view": lambda h: h.view(-1, 3, 4).reshape(len(h), 12),
    "permute": lambda h: h.view(-1, 3, 4).permute(0, 2, 1).reshape(len(h), 12),
    "flip_roll": lambda h: h.flip(-1).roll(5, -1),
    "split_cat": lambda h: torch.cat(h.split([2, 7, 3], -1)[::-1], -1),
    "chunk_stack": lambda h: torch.stack(h.chunk(3, -1), 1).flatten(1),
    "index": lambda h: h[:, torch.tensor([3, 1, 0, 2, 11, 10, 9, 8, 7, 6, 5, 4])],
    "gather": lambda h: h.index_select(-1, torch.arange(11, -1, -1)),
    "in_place": lambda h: h.clone().mul_(2).add_(1),
    "write_into_zeros": lambda h: torch.zeros(len(h), 12).copy_(h),
    "write_a_slice": lambda h: _write(h),
    "cast": lambda h: h.double().float(),
    "pixel_shuffle": lambda h: tf.pixel_unshuffle(tf.pixel_shuffle(h.view(-1, 12, 1, 1), 2), 2).flatten(1),
    "einsum": lambda h: torch.einsum("bi->ib", h).t(),
    "unbind": lambda h: torch.cat(h.unbind(-1)).view(12, len(h)).t(),
    "gelu": tf.gelu,
    "sigmoid": torch.sigmoid,
    "gate": lambda h: h * torch.sigmoid(h),
    "where": lambda h: torch.where(h > 0, h, 0.1 * h),
    "maximum": lambda h: torch.maximum(h, -h),
    "checkpoint": lambda h: torch.utils.checkpoint.checkpoint(torch.tanh, h, use_reentrant=False),
    "dropout": lambda h: tf.dropout(h, 0.5, training=False),
    "pad_and_cut": lambda h: tf.pad(h.view(-1, 12, 1), (2, 2))[..., 2:3].flatten(1),
}


def _write(h):
    out = torch.zeros(len(h), 12)
    out[:, 6:] = h[:, :6]
    out[:, :6] = h[:, 6:]
    return out


@pytest.mark.parametrize("name", UNITS_STAY)
def test_both_ends_are_known_through(name):
    """The second layer's weight has owner and reader, its readers are the first's units, and no one gets in."""
    torch.manual_seed(0)
    source = Between(UNITS_STAY[name]).eval()
    x = torch.randn(4, 5)
    found = map_of(source, x)
    first = next(f.units for f in found.entries["first.weight"].factors if f.owner)
    reader = next(f.units for f in found.entries["second.weight"].factors if not f.owner)
    assert sorted(reader.tolist()) == sorted(first.tolist()) == list(range(1, 13))
    model = parts.pretend(hatcl.convert(source, 2, x))
    assert [parts.leaks(model, x, t) for t in range(2)] == [None, None]


def test_what_an_index_without_values_picks_is_not_known():
    """Nobody knows what a tensor on the meta device picks, so its units are forgotten."""
    where = torch.tensor([1, 0], device="meta")
    with torch.device("meta"):
        source, x = Between(lambda h: h.index_select(-1, where).repeat(1, 6)).eval(), torch.randn(4, 5)
        found = map_of(source, x)
    assert found.notes == {"": "aten::index_select is not known to the trace: it forgets which units it carries"}
