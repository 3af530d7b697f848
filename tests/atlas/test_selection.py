"""The most informative blocks: their gradients are the composer's, and a planted block is found."""

from __future__ import annotations

import copy

import atlas_parts as parts
import pytest
import torch
from torch.nn import functional as tf

import hatcl
from hatcl import ConfigError, TaskVector, VectorError
from hatcl.atlas import select_blocks


def many(count=5):
    base, vectors, _ = parts.tiny(count)
    return base, vectors, parts.tiny_batches(3)


def test_scores_are_the_composers_gradients_at_zero():
    base, vectors, batches = many()
    composer = hatcl.compose(base, vectors)
    for x, y in batches:
        tf.cross_entropy(composer(x), y).backward()
    got = select_blocks(base, vectors, batches, 2)
    assert got.blocks == composer.labels
    # float64 sums here, float32 there; measured 1.5e-8
    torch.testing.assert_close(got.scores.float(), composer.coefficients.grad.abs(), rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in base.parameters())


def planted():
    """Five vectors that go nowhere useful, and in two of them one block each that goes down the gradient."""
    base, vectors, batches = many()
    work = copy.deepcopy(base)
    for x, y in batches:
        tf.cross_entropy(work(x), y).backward()
    gradient = {n: p.grad for n, p in work.named_parameters()}
    plain = [{n: 1e-3 * v[n] for n in v} for v in vectors]
    plain[3]["a.weight"] = -gradient["a.weight"]
    plain[1]["b.bias"] = -gradient["b.bias"]
    return base, [TaskVector(v, vectors[0].base) for v in plain], batches


def test_the_planted_blocks_are_found_and_mixed():
    base, vectors, batches = planted()
    got = select_blocks(base, vectors, batches, 2)
    at = {n: j for j, n in enumerate(got.blocks)}
    assert got.chosen[0, at["a.weight"]] == 3 and got.chosen[0, at["b.bias"]] == 1
    assert got.chosen.shape == (2, 4) and len(got.vectors) == 2
    for row, vector in zip(got.chosen.tolist(), got.vectors, strict=True):
        for name, i in zip(got.blocks, row, strict=True):
            assert torch.equal(vector[name], vectors[i][name])
    composer = hatcl.compose(base, got.vectors)  # with the base's digests
    before = sum(float(tf.cross_entropy(base(x), y)) for x, y in batches)
    composer.coefficients.data[0] = 0.5
    with torch.no_grad():
        assert sum(float(tf.cross_entropy(composer(x), y)) for x, y in batches) < before


def test_twin_blocks_at_random_miss_it():
    base, vectors, batches = planted()
    firsts = [select_blocks(base, vectors, budget=1, by="random", seed=s).chosen[0].tolist() for s in range(20)]
    assert len({tuple(f) for f in firsts}) > 10 and any(f[0] != 3 for f in firsts)
    again = select_blocks(base, vectors, budget=1, by="random", seed=7)
    assert again.chosen[0].tolist() == firsts[7] and not again.scores.numel()
    for column in select_blocks(base, vectors, budget=5, by="random").chosen.T:
        assert sorted(column.tolist()) == [0, 1, 2, 3, 4]  # each vector once per block


def test_whole_vectors_by_their_mean():
    base, vectors, batches = planted()
    got = select_blocks(base, vectors, batches, 2, by="vectors")
    assert got.chosen[:, 0].tolist() == got.scores.mean(1).argsort(descending=True)[:2].tolist()
    assert got.vectors[0] is vectors[int(got.chosen[0, 0])]


def test_whole_vectors_by_features():
    base, vectors, _ = many(3)
    centroids = torch.tensor([[1.0, 0], [1, 1], [-1, 0]])
    got = select_blocks(base, vectors, budget=2, by="features", centroids=centroids, target=torch.tensor([2.0, 0.1]))
    assert got.chosen[:, 0].tolist() == [0, 1]


def test_vectors_in_files_stay_there(tmp_path):
    base, vectors, batches = planted()
    for i, v in enumerate(vectors):
        v.save(tmp_path / f"{i}.safetensors")
    lazy = [TaskVector.load(tmp_path / f"{i}.safetensors") for i in range(5)]
    got = select_blocks(base, lazy, batches, 2)
    want = select_blocks(base, vectors, batches, 2)
    assert torch.equal(got.scores, want.scores) and "in files" in repr(got.vectors[0])
    assert all(torch.equal(a[n], b[n]) for a, b in zip(got.vectors, want.vectors, strict=True) for n in got.blocks)


def test_an_adapters_missing_blocks_count_as_zero():
    base, vectors, batches = many(2)
    partial = TaskVector({"a.weight": vectors[0]["a.weight"]}, partial=True)
    got = select_blocks(base, [partial, vectors[1]], batches, 1)
    assert got.scores[0].count_nonzero() == 1
    assert {n: int(i) for n, i in zip(got.blocks, got.chosen[0], strict=True)}["b.bias"] == 1
    both = select_blocks(base, [partial, vectors[1]], batches, 2)
    assert "b.bias" not in both.vectors[1] and "b.bias" in both.vectors[0]
    hatcl.compose(base, both.vectors)


def test_what_does_not_fit_is_named():
    base, vectors, batches = many(2)
    with pytest.raises(ConfigError, match="by: got 'block', expected one of blocks, vectors"):
        select_blocks(base, vectors, batches, by="block")
    for budget in (0, 3):
        with pytest.raises(ConfigError, match=f"budget: got {budget}, expected 1 to 2"):
            select_blocks(base, vectors, batches, budget)
    with pytest.raises(ConfigError, match="batches: missing; choosing by blocks needs examples"):
        select_blocks(base, vectors)
    with pytest.raises(ConfigError, match=r"batches: there are none; pass a list"):
        select_blocks(base, vectors, [])
    with pytest.raises(ConfigError, match=r"centroids and target of shapes \[\[2, 4\], \[3\]\]; expected \[2, d\]"):
        select_blocks(base, vectors, by="features", centroids=torch.ones(2, 4), target=torch.ones(3))
    with pytest.raises(ConfigError, match=r"shapes \[None, None\]"):
        select_blocks(base, vectors, by="features")
    with pytest.raises(VectorError, match="have none of the model's parameters"):
        select_blocks(base, [TaskVector({"x": torch.ones(1)})], batches)
    with pytest.raises(VectorError, match="vector 1 lacks 3 tensors that vector 0 has: a.bias, b.weight"):
        select_blocks(base, [vectors[0], TaskVector({"a.weight": vectors[1]["a.weight"]})], batches)
    with pytest.raises(VectorError, match=r"a.weight is \[2, 2\] in the vectors, \[4, 3\] in the model"):
        select_blocks(base, [TaskVector({"a.weight": torch.ones(2, 2)})], batches)
