"""Every value in what a forward gives is found, whatever holds it; what cannot be looked into is an error."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import random
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from hatcl import ConfigError
from hatcl.calls import (
    OutputError,
    again,
    call,
    cross_entropy,
    endless,
    examples_in,
    moved,
    one_by_one,
    one_pass,
    outputs,
    seeded,
    split_batch,
    tensors_of,
    values_of,
)

ONE, TWO = torch.arange(3.0), torch.tensor([[1.0, -0.0]])
Pair = collections.namedtuple("Pair", "left right")


@dataclasses.dataclass
class Data:
    logits: Any
    note: str = "as it is"


class Plain:
    def __init__(self, **values):
        self.__dict__.update(values)


class Slots:
    __slots__ = ("__private", "empty", "logits")

    def __init__(self, logits, private):
        self.logits, self.__private = logits, private


class Node:
    """Without attributes that could be read; known to torch's pytree alone."""

    __slots__ = ()


pytree.register_pytree_node(Node, lambda x: ([ONE, TWO], None), lambda children, context: Node())


def cyclic():
    x = Plain(logits=ONE, more=[TWO])
    x.more.append(x)
    return x


HOLDERS = {
    "tensor": (lambda: ONE, 1),
    "tuple": (lambda: (ONE, [TWO, None]), 2),
    "the same twice": (lambda: (ONE, ONE), 2),
    "mapping": (lambda: {"a": ONE, 3: {"b": TWO}}, 2),
    "dict with attributes": (lambda: type("More", (dict,), {})(a=ONE), 1),
    "deque": (lambda: collections.deque([ONE, TWO]), 2),
    "set": (lambda: {ONE, TWO}, 2),
    "frozen set": (lambda: frozenset([ONE, TWO]), 2),
    "named tuple": (lambda: Pair(ONE, (TWO,)), 2),
    "dataclass": (lambda: Data([ONE, TWO]), 2),
    "object": (lambda: Plain(logits=ONE, inner=Plain(more=TWO)), 2),
    "slots": (lambda: Slots(ONE, TWO), 2),
    "pytree": (Node, 2),
    "cycle": (cyclic, 2),
    "partial": (lambda: functools.partial(print, ONE, end=TWO), 2),
    "closure": (lambda: (lambda x: lambda: x)(ONE), 1),
    "method": (lambda: Plain(run=Data(ONE).__repr__), 1),
    "distribution": (lambda: torch.distributions.Normal(ONE, ONE + 1), 2),
    "mixture": (
        lambda: torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=ONE), torch.distributions.Normal(ONE, ONE + 1)
        ),
        4,  # one that it computed beside what it was given
    ),
    "packed": (lambda: nn.utils.rnn.pack_sequence([ONE, ONE[:2]]), 2),
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_every_tensor_is_found_wherever_it_is(kind):
    make, count = HOLDERS[kind]
    assert len(tensors_of(make())) == count
    first, second = values_of(make()), values_of(make())
    assert first.keys() == second.keys() and len(first) >= count  # paths are the same each time
    assert all(torch.equal(x, second[path]) for path, x in first.items())


def test_a_weak_reference_is_followed():
    held = Plain(logits=ONE)
    assert len(tensors_of([weakref.ref(held)])) == 1


def test_paths_say_where_a_value_is():
    out = {"a": [Pair(ONE, 2)], "b": Plain(inner=TWO, text="x", nothing=None)}
    assert list(values_of(out)) == [
        "output['a'][0].left", "output['a'][0].right", "output['b'].inner", "output['b'].text",
    ]  # fmt: skip


def test_numbers_texts_and_arrays_are_values_too():
    for a, b in [(1, 2), (0.0, -0.0), (1.0, 1), (True, 1), ("a", "b"), (2**70, 2**70 + 1), (1j, 2j), (b"a", "a"),
                 (np.float32(1), np.float64(1)), (np.zeros(2), np.zeros((1, 2))), (range(3), range(4))]:  # fmt: skip
        x, y = (values_of([ONE, value])["output[1]"] for value in (a, b))
        assert x.dtype != y.dtype or x.shape != y.shape or not torch.equal(x.view(-1).view(torch.uint8),
                                                                            y.view(-1).view(torch.uint8))  # fmt: skip


def test_tensors_of_every_layout_become_dense_ones():
    dense = torch.eye(3)
    for x in (dense.to_sparse(), dense.to_sparse_csr(), dense.to_sparse_csc(), dense.to_sparse_bsr(1)):
        assert all(v.layout == torch.strided for v in values_of(x).values()) and len(values_of(x)) >= 3
    nested = torch.nested.nested_tensor([ONE, ONE[:2]])
    assert [len(v) for v in values_of(nested).values()] == [3, 2]
    conj = torch.complex(ONE, ONE).conj()
    assert not next(iter(values_of(conj).values())).is_conj()


def test_model_outputs_and_caches_of_transformers():
    transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'hatcl[hf]'")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes))
    found = values_of(model(torch.arange(4)[None]))
    assert found["output['logits']"].shape == (1, 4, 50)
    assert sum(path.endswith((".keys", ".values")) for path in found) == 4  # two layers of the cache


@pytest.mark.parametrize(
    ("out", "text"),
    [
        (None, "returns None, which holds no tensor, so there is nothing to compare; return the tens"),
        ({}, "returns a dict, which holds no tensor"),
        (3.0, "returns a float, which holds no tensor"),
        ("done", "returns a str, which holds no tensor"),
        ((x for x in [ONE]), "output is a generator, whose content hatcl cannot read .*; return tensors, or a tuple"),
        ([map(str, [ONE])], r"output\[0\] is a map, whose content hatcl cannot read"),
        ({"a": nn.Linear(2, 2)}, r"output\['a'\] is a module \(Linear\); .*; return what it computes"),
        ([ONE, np.array([ONE], dtype=object)], r"output\[1\] is a numpy array of Python objects"),
    ],
)
def test_what_cannot_be_looked_into_is_an_error(out, text):
    with pytest.raises(OutputError, match=text):
        values_of(out)


def test_any_batch():
    class Any_(nn.Module):
        def forward(self, a, b=2):
            return a, b

    model = Any_()
    assert call(model, ONE)[0] is ONE and call(model, (ONE, 3)) == (ONE, 3) and call(model, [ONE]) == (ONE, 2)
    assert call(model, {"a": ONE, "b": 4}) == (ONE, 4) and call(model, "text") == ("text", 2)


def test_seeded_draws_are_the_same_and_leave_no_trace():
    def draw():
        return float(torch.rand(())), np.random.rand(), random.random()

    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with seeded():
        first = draw()
    with seeded():
        assert draw() == first
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert all(a != b for a, b in zip(draw(), first, strict=True))


# --- batches ---


@pytest.mark.parametrize(
    ("batch", "inputs", "labels"),
    [
        ((ONE, TWO), ONE, TWO), ([ONE], ONE, None), (ONE, ONE, None), (((ONE, ONE), TWO), (ONE, ONE), TWO),
        ({"x": ONE, "labels": TWO}, {"x": ONE}, TWO), ({"x": ONE}, {"x": ONE}, None),
    ],
)  # fmt: skip
def test_a_batch_is_split(batch, inputs, labels):
    assert split_batch(batch) == (inputs, labels)


@pytest.mark.parametrize("batch", [(), [], (ONE, ONE, TWO)])
def test_a_batch_of_other_parts_is_refused(batch):
    with pytest.raises(ConfigError, match=rf"a batch of {len(batch)} parts, expected inputs or \(inputs, labels\)"):
        split_batch(batch)


def test_the_examples_of_a_batch():
    x, y = torch.zeros(5, 2), torch.zeros(5)
    assert [examples_in(b) for b in ((x, y), {"ids": x, "labels": y}, {"ids": x}, x, ({"a": x}, y))] == [5] * 5
    assert examples_in(([x], "text")) == examples_in("text") == 1
    x = torch.arange(6.0).view(3, 2)
    assert [t.tolist() for t in one_by_one(x)] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert [(a.tolist(), b.tolist()) for a, b in one_by_one((x, x[:, 0]))][2] == ([[4, 5]], [4])
    assert [e["b"].tolist() for e in one_by_one({"a": x, "b": x[:, 1]})] == [[1], [3], [5]]


def test_passes_over_batches():
    assert list(one_pass([1, 2], "x")) == [1, 2]
    assert list(itertools.islice(endless([1, 2], "x"), 5)) == [1, 2, 1, 2, 1]
    with pytest.raises(ConfigError, match="x: there are none; pass a list or a DataLoader"):
        next(one_pass([], "x"))
    with pytest.raises(ConfigError, match="x: there are none"):
        next(endless([], "x"))
    with pytest.raises(ConfigError, match="x: they can be read only once; pass a list"):
        list(endless(iter([1]), "x"))


def test_what_is_in_a_batch_is_moved_and_keeps_its_kind():
    packed = nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)])
    batch = {"pair": Pair(ONE, "left alone"), "list": [ONE, (ONE, 3)], "packed": packed}
    there = moved(batch, torch.device("meta"))
    assert [t.device.type for t in tensors_of(there)] == ["meta"] * 4 + ["cpu"]  # of a packed sequence its lengths stay
    assert isinstance(there["pair"], Pair) and there["pair"].right == "left alone" and there["list"][1][1] == 3


def test_an_iterator_is_refused():
    with pytest.raises(ConfigError, match="validation: got list_iterator, expected batches that can be iterated"):
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
    with pytest.raises(
        ConfigError,
        match="the model gives a tuple, expected logits: a tensor or an output with logits; .* hatcl.atlas.encoder",
    ):
        outputs(Takes(lambda t: (t,)), torch.ones(1))


def test_the_loss_of_a_batch():
    x, y = torch.eye(2), torch.tensor([0, 1])
    want = nn.functional.cross_entropy(x, y)
    assert torch.equal(cross_entropy(nn.Identity(), (x, y)), want)
    assert torch.equal(cross_entropy(nn.Identity(), {"input": x, "labels": y}), want)
