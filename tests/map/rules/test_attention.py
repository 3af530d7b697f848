"""Attention: which channels of queries, keys and values are one unit, in every form in which torch computes it."""

from __future__ import annotations

import contextlib
import math

import parts
import pytest
import torch
from map_parts import units
from torch import nn
from torch.nn import functional as tf

import hatcl
from hatcl.hat.convert import map_of
from hatcl.map.rules import contractions

LENGTH, WIDTH, SIZE = 5, 8, 4
TOKENS = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
MASK = torch.zeros(2, 1, LENGTH, LENGTH).masked_fill_(torch.ones(LENGTH, LENGTH).triu(1) > 0, -math.inf)


def eager(q, k, v):
    """As transformers repeats keys and values, with softmax and matmuls."""
    runs = q.shape[1] // k.shape[1]
    k, v = (x[:, :, None].expand(-1, -1, runs, -1, -1).flatten(1, 2) for x in (k, v))
    return ((q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def kernel(q, k, v):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


FORMS = {
    "plain": lambda q, k, v: tf.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "causal": lambda q, k, v: tf.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    "mask": lambda q, k, v: tf.scaled_dot_product_attention(q, k, v, attn_mask=MASK, enable_gqa=True),
    "bool mask": lambda q, k, v: tf.scaled_dot_product_attention(q, k, v, attn_mask=MASK == 0, enable_gqa=True),
    "mask of another rank": lambda q, k, v: tf.scaled_dot_product_attention(q, k, v, MASK[0], enable_gqa=True),
    "scale": lambda q, k, v: tf.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True),
    "3-D": lambda q, k, v: torch.stack(
        [tf.scaled_dot_product_attention(*x, enable_gqa=True) for x in zip(q, k, v, strict=True)]
    ),
    "5-D": lambda q, k, v: tf.scaled_dot_product_attention(q[None], k[None], v[None], enable_gqa=True)[0],
    "fewer positions": lambda q, k, v: tf.scaled_dot_product_attention(q, k[:, :, :3], v[:, :, :3], enable_gqa=True),
    "one set of keys for the batch": lambda q, k, v: tf.scaled_dot_product_attention(
        q, k[:1], v[:1], enable_gqa=True
    ),
    "double": lambda q, k, v: tf.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), enable_gqa=True
    ).float(),
    "math": lambda q, k, v: _with_math(q, k, v),
    "kernel": kernel,
    "eager": eager,
}  # fmt: skip


def _with_math(q, k, v):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return tf.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class Attention(nn.Module):
    """heads: of queries, of keys, of values. size: channels of a head of queries and keys, and of values."""

    def __init__(self, form, heads=(4, 2, 2), size=(SIZE, SIZE)):
        super().__init__()
        self.form, self.heads = form, heads
        self.first = nn.Linear(WIDTH, 6)
        self.q, self.k = nn.Linear(6, heads[0] * size[0]), nn.Linear(6, heads[1] * size[0])
        self.v, self.out = nn.Linear(6, heads[2] * size[1]), nn.Linear(heads[0] * size[1], 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        q, k, v = (
            f(x).unflatten(-1, (n, -1)).transpose(1, 2)
            for f, n in zip((self.q, self.k, self.v), self.heads, strict=True)
        )
        return self.head(x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))).mean(1)

    def attend(self, q, k, v):
        return self.form(q, k, v)


def by_head(numbers, heads):
    """Each head's units, one after another."""
    size = len(numbers) // heads
    return [numbers[i * size : (i + 1) * size] for i in range(heads)]


def check(source, heads, x=TOKENS):
    """Channel d of a query head is one unit with channel d of the key head that serves it; what a query head gives
    are its value head's units; every unit is known, and no one gets in."""
    found = map_of(source, x)
    q, k, v = (by_head(units(found, f"{n}.weight", True), h) for n, h in zip("qkv", heads, strict=True))
    assert len({u for head in k for u in head}) == len(k) * len(k[0])
    assert q == [k[i * heads[1] // heads[0]] for i in range(heads[0])]
    given = by_head(units(found, "out.weight", False), heads[0])
    assert given == [v[i * heads[2] // heads[0]] for i in range(heads[0])]
    assert len({u for head in v for u in head}) == len(v) * len(v[0])
    assert not {u for head in q for u in head} & {u for head in v for u in head}
    assert found.known == 1 and found.notes == {}
    model = parts.pretend(hatcl.convert(source, 3, x))
    assert [parts.leaks(model, x, t) for t in range(3)] == [None] * 3
    assert torch.equal(parts.logits(model, None, x), source(x))


@pytest.mark.parametrize("few", [1, 2, 4], ids=["multi-query", "grouped", "as many"])
@pytest.mark.parametrize("form", FORMS)
def test_a_head_of_keys_and_values_serves_query_heads_in_a_row(form, few):
    torch.manual_seed(0)
    check(Attention(FORMS[form], (4, few, few)).eval(), (4, few, few))


@pytest.mark.parametrize("few", [1, 2, 4])
@pytest.mark.parametrize("size", [(4, 3), (3, 5)], ids=["narrower", "wider"])
def test_values_of_another_size_than_queries(size, few):
    torch.manual_seed(0)
    check(Attention(FORMS["plain"], (4, few, few), size).eval(), (4, few, few))


def test_keys_and_values_of_other_numbers_of_heads():
    torch.manual_seed(0)
    check(Attention(FORMS["plain"], (4, 2, 4)).eval(), (4, 2, 4))


def test_one_head_for_all_by_broadcasting():
    torch.manual_seed(0)
    form = lambda q, k, v: tf.scaled_dot_product_attention(q, k, v)  # noqa: E731
    check(Attention(form, (4, 1, 1)).eval(), (4, 1, 1))


@pytest.mark.parametrize("dims", [2, 3])
def test_without_heads(dims):
    """`[N, L, E]` and `[L, E]`: one head."""

    def one(*qkv):
        return tf.scaled_dot_product_attention(*(x[:, 0] if dims == 3 else x[0, 0] for x in qkv))

    def form(q, k, v):
        return torch.cat([one(q[i : i + 1], k[i : i + 1], v[i : i + 1])[None] for i in range(2)]).view(2, 1, LENGTH, -1)

    torch.manual_seed(0)
    check(Attention(form, (1, 1, 1)).eval(), (1, 1, 1))


def test_keys_that_the_forward_also_gives_out_are_units():
    """As a cache does: the output sees them, and so do the queries."""

    class Cached(Attention):
        def forward(self, x):
            kept = []
            with self.keeping(kept):
                return {"logits": super().forward(x), "kept": kept}

        @contextlib.contextmanager
        def keeping(self, kept):
            handle = self.k.register_forward_hook(lambda module, args, out: kept.append(out))
            try:
                yield
            finally:
                handle.remove()

    torch.manual_seed(0)
    source = Cached(FORMS["plain"]).eval()
    found = map_of(source, TOKENS)
    assert all(0 not in units(found, f"{n}.weight", True) for n in "qkv")
    model = parts.pretend(hatcl.convert(source, 3, TOKENS))
    assert [parts.leaks(model, TOKENS, t) for t in range(3)] == [None] * 3


def test_twin_heads_that_are_paired_by_another_order_leak(monkeypatch):
    """In turns instead of in rows: query head 1 would be served by key head 1."""
    torch.manual_seed(0)
    source = Attention(FORMS["kernel"]).eval()
    right = map_of(source, TOKENS)

    def in_turns(ids, pattern, runs):
        return plain(ids, pattern.replace("(head runs)", "(runs head)"), runs=runs)

    plain = contractions.repeat
    with monkeypatch.context() as patch:
        patch.setattr(contractions, "repeat", in_turns)
        found = map_of(source, TOKENS)
    assert units(found, "out.weight", False) != units(right, "out.weight", False)
    model = parts.pretend(hatcl.convert(source, 3, TOKENS, unit_map=found, verify=False))
    model.hat_gates.cut = False  # a sealed task would be cut off from what the map misses
    assert any(parts.leaks(model, TOKENS, t) is not None for t in range(3))


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 5}, {"batch_first": False}, {"bias": False}])
@pytest.mark.parametrize("weights", [False, True], ids=["fused", "with weights"])
@pytest.mark.parametrize("unbatched", [False, True], ids=["batch", "one"])
def test_multihead_attention(options, weights, unbatched):
    torch.manual_seed(0)
    options = {"batch_first": True, **options}

    class Multihead(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
            self.k, self.v = nn.Linear(WIDTH, options.get("kdim", WIDTH)), nn.Linear(WIDTH, options.get("vdim", WIDTH))
            self.attention = nn.MultiheadAttention(WIDTH, 2, **options)

        def forward(self, x):
            x = torch.relu(self.first(x[0] if unbatched else x))
            return self.head(self.attention(x, self.k(x), self.v(x), need_weights=weights)[0])

    source = Multihead().eval()
    found = map_of(source, TOKENS)
    if "kdim" in options:
        q, k, v = (units(found, f"attention.{n}_proj_weight", True) for n in "qkv")
    else:
        whole = units(found, "attention.in_proj_weight", True)
        q, k, v = whole[:WIDTH], whole[WIDTH : 2 * WIDTH], whole[2 * WIDTH :]
    assert q == k and len({*q, *v} - {0}) == 2 * WIDTH
    assert units(found, "attention.out_proj.weight", False) == v
    model = parts.pretend(hatcl.convert(source, 3, TOKENS))
    assert [parts.leaks(model, TOKENS, t) for t in range(3)] == [None] * 3
