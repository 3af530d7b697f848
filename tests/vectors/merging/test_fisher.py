"""Fisher averaging: the formula on literal numbers, and the diagonal against derivatives worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hatcl import ConfigError, VectorError
from hatcl.vectors.merging import merge
from hatcl.vectors.merging.fisher import diagonal_fisher
from hatcl.vectors.task_vector import TaskVector


@pytest.fixture
def two():
    return [TaskVector({"w": torch.tensor([1.0, 2.0])}), TaskVector({"w": torch.tensor([3.0, -2.0])})]


def diagonals(*rows):
    return [{"w": torch.tensor(r)} for r in rows]


def test_the_weighted_mean(two):
    got = merge(two, "fisher", fishers=diagonals([1.0, 2.0], [3.0, 2.0]), normalise=False)
    assert got["w"].tolist() == [2.5, 0.0]  # (1 * 1 + 3 * 3) / 4
    got = merge(two, "fisher", fishers=diagonals([1.0, 2.0], [3.0, 2.0]), normalise=False, weights=[3, 1.0])
    assert got["w"].tolist() == [2.0, 1.0]  # (3 * 1 + 3 * 3) / 6, (6 * 2 - 2 * 2) / 8


def test_normalised_no_task_is_louder(two):
    # norms 5 and 50: shares .6 .8 and .8 .6
    got = merge(two, "fisher", fishers=diagonals([3.0, 4.0], [40.0, 30.0]))["w"]
    want = torch.tensor([(0.6 * 1 + 0.8 * 3) / 1.4, (0.8 * 2 - 0.6 * 2) / 1.4], dtype=torch.float64)
    assert torch.equal(got, want.float())


def test_where_nobody_knows_anything_it_is_the_mean(two):
    assert merge(two, "fisher", fishers=diagonals([0.0, 0.0], [0.0, 1.0]))["w"].tolist()[0] == 2.0
    sure = merge(two, "fisher", fishers=diagonals([0.0, 0.0], [0.0, 1.0]))["w"].tolist()[1]
    assert abs(sure + 2.0) < 1e-5  # all but the floor of 1e-6


def test_tensors_of_which_no_diagonal_speaks_are_averaged(base, models, batches):
    vectors = [TaskVector.between(base, m, buffers=True) for m in models]
    shifted = [v.map(lambda n, t, i=i: t + i if "running" in n else t) for i, v in enumerate(vectors)]
    merged = merge(shifted, "fisher", model=base, batches=batches)
    assert torch.equal(merged["norm.running_mean"], torch.ones(4))


def line(*rows):
    model = nn.Linear(len(rows[0]), len(rows), bias=False)
    model.weight.data = torch.tensor(rows)
    return model


X = torch.tensor([[1.0]])


def test_the_diagonal_of_a_logistic_regression():
    """p = (3/4, 1/4): (d log p_y / d w_0)^2 = (1[y = 0] - 3/4)^2, expected 3/16; w_1 the same."""
    model = line([math.log(3.0)], [0.0])

    def diagonal(batch, **options):
        return diagonal_fisher(model, [batch], **options)["weight"].flatten()

    # one float32 softmax: measured 3e-8
    assert torch.allclose(diagonal(X, labels="expected"), torch.tensor([3 / 16] * 2), rtol=0, atol=1e-6)
    assert torch.allclose(
        diagonal((X, torch.tensor([1])), labels="given"), torch.tensor([9 / 16] * 2), rtol=0, atol=1e-6
    )
    assert torch.allclose(
        diagonal((X, torch.tensor([0])), labels="given"), torch.tensor([1 / 16] * 2), rtol=0, atol=1e-6
    )
    drawn = diagonal(X.expand(800, 1), labels="sampled")
    spread = 0.5 * (3 / 16) ** 0.5 / 800**0.5  # of 9/16 with chance 1/4 and 1/16 with 3/4
    assert float((drawn - 3 / 16).abs().max()) < 5 * spread
    assert not torch.equal(drawn, diagonal(X.expand(800, 1), labels="sampled", seed=1))
    assert torch.equal(drawn, diagonal(X.expand(800, 1), labels="sampled"))


def test_squares_are_of_examples_not_of_batches():
    """Two examples whose gradients cancel: their batch's gradient is zero, their Fisher information is not."""
    model, x, y = line([0.0], [0.0]), torch.tensor([[2.0], [-2.0]]), torch.tensor([0, 0])
    assert diagonal_fisher(model, [(x, y)], labels="given")["weight"].flatten().tolist() == [1.0, 1.0]
    loss = nn.functional.cross_entropy(model(x), y)
    assert torch.autograd.grad(loss, model.weight)[0].square().flatten().tolist() == [0.0, 0.0]  # the twin


def test_batches_are_as_good_as_examples_one_by_one(base, batches):
    x = torch.cat([b[0] for b in batches[0]])
    whole = diagonal_fisher(base, [x], labels="expected")
    split = diagonal_fisher(base, x.split(3), labels="expected")
    assert all(torch.equal(whole[n], split[n]) for n in whole)
    assert set(whole) == dict(base.named_parameters()).keys()


def test_the_model_stays_as_it_was(base, batches):
    base.train()
    base.norm.eval()
    base.head.requires_grad_(False)
    before = {n: t.clone() for n, t in base.state_dict().items()}
    diagonal_fisher(base, batches[0])
    assert all(torch.equal(before[n], t) for n, t in base.state_dict().items())
    assert base.training and not base.norm.training and not base.head.weight.requires_grad
    assert all(p.grad is None for p in base.parameters())


def test_inside_no_grad(base, batches):
    want = diagonal_fisher(base, batches[0])
    with torch.no_grad():
        got = diagonal_fisher(base, batches[0])
    assert all(torch.equal(want[n], got[n]) for n in want)


class Text(nn.Module):
    """Takes keyword arguments and gives an output with `logits`, as transformers' models."""

    def __init__(self):
        super().__init__()
        self.head = line([1.0, 0.5], [0.0, 2.0])

    def forward(self, input_values, attention_mask):
        return SimpleNamespace(logits=self.head(input_values * attention_mask))


def test_batches_of_keyword_arguments():
    model, x, y = Text(), torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    batch = {"input_values": x, "attention_mask": torch.ones(4, 2), "labels": y}
    got = diagonal_fisher(model, [batch], labels="given")
    assert torch.equal(got["head.weight"], diagonal_fisher(model.head, [(x, y)], labels="given")["weight"])


def test_diagonals_given_or_estimated_are_the_same(base, vectors, batches):
    fishers = [diagonal_fisher(v.apply_to(base), b) for v, b in zip(vectors, batches, strict=True)]
    given = merge(vectors, "fisher", fishers=fishers)
    estimated = merge(vectors, "fisher", model=base, batches=batches)
    assert all(torch.equal(given[n], estimated[n]) for n in given)
    mean = merge(vectors, "mean")
    assert any(not torch.equal(given[n], mean[n]) for n in given)


def test_refused(two, base, vectors, batches):
    good = diagonals([1.0, 1.0], [1.0, 1.0])
    with pytest.raises(ConfigError, match="fisher needs model: .*, or fishers= instead"):
        merge(two, "fisher")
    with pytest.raises(ConfigError, match="fishers: got 1, expected a list of 2: one diagonal per vector"):
        merge(two, "fisher", fishers=good[:1])
    with pytest.raises(ConfigError, match="fishers: diagonal 1 is a list, expected tensors by name|a mapping"):
        merge(two, "fisher", fishers=[good[0], []])
    with pytest.raises(ConfigError, match="batches: got a dict, expected a list of 3: one iterable of batches per"):
        merge(vectors, "fisher", model=base, batches={})
    with pytest.raises(ConfigError, match="weights: got 3, expected a list of 2"):
        merge(two, "fisher", fishers=good, weights=[1, 1, 1])
    with pytest.raises(ConfigError, match="weights: got -1, expected a number of at least 0"):
        merge(two, "fisher", fishers=good, weights=[1, -1])
    with pytest.raises(ConfigError, match=r"weights: got \[0, 0\], expected more than 0"):
        merge(two, "fisher", fishers=good, weights=[0, 0])
    with pytest.raises(ConfigError, match="floor: got 0, expected more than 0"):
        merge(two, "fisher", fishers=good, floor=0)
    with pytest.raises(VectorError, match="diagonal 1 has none of the vectors' tensors; they start with w"):
        merge(two, "fisher", fishers=[good[0], {"v": torch.ones(2)}])
    with pytest.raises(VectorError, match=r"w: diagonal 1 is \[3\], the vectors have \[2\]"):
        merge(two, "fisher", fishers=[good[0], {"w": torch.ones(3)}])
    for bad in (-1.0, float("nan")):
        with pytest.raises(VectorError, match="w: diagonal 1 .*negative or not finite"):
            merge(two, "fisher", fishers=diagonals([1.0, 1.0], [1.0, bad]))
    more = [v.map(lambda _, t: t) for v in vectors]
    some = [{"hidden.bias": torch.ones(6)}, {"hidden.bias": torch.ones(6), "temperature": torch.ones(())}]
    with pytest.raises(VectorError, match="temperature only in diagonal 1"):
        merge(more[:2], "fisher", fishers=some)


def test_refused_by_the_diagonal(base, batches):
    with pytest.raises(ConfigError, match="labels: got 'true', expected one of expected, sampled, given"):
        diagonal_fisher(base, batches[0], labels="true")
    x, y = batches[0][0]
    for batch, got in ((x, "NoneType"), ((x, 3), "int"), ((x, torch.eye(5)), r"a tensor of shape \[5, 5\]")):
        with pytest.raises(ConfigError, match=f"labels='given' needs .*, one class per example, got {got} for labels"):
            diagonal_fisher(base, [batch], labels="given")
    with pytest.raises(ConfigError, match="batches: got class 9, the model has 3, from 0"):
        diagonal_fisher(base, [(x, y + 9 - y)], labels="given")
    with pytest.raises(ConfigError, match="batches of task 2: there are none"):
        diagonal_fisher(base, [], task=2)
    with pytest.raises(ConfigError, match="seed: got -1"):
        diagonal_fisher(base, batches[0], seed=-1)
    with pytest.raises(ConfigError, match=r"forward: gives \[3\] for one example, expected logits"):
        diagonal_fisher(base, batches[0], forward=lambda m, x, t: m(x)[0])
    with pytest.raises(ConfigError, match="batches: got a batch of 0 parts"):
        diagonal_fisher(base, [()])
    with pytest.raises(ConfigError, match="the model gives a tuple, expected logits: .* pass forward="):
        diagonal_fisher(Pair(), [torch.ones(1, 1)])


class Pair(nn.Linear):
    def __init__(self):
        super().__init__(1, 2)

    def forward(self, x):
        return super().forward(x), None
