"""One vector, a mask and a number per task: the tasks' models, in memory and from files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from hatcl import ConfigError, IntegrityError
from hatcl.errors import GraftError
from hatcl.grafts import Graft, TaskGrafts, files, task_grafts
from hatcl.vectors.merging import emr_parts
from hatcl.vectors.merging.tall_masks import tall_masks
from hatcl.vectors.task_vector import TaskVector


@pytest.fixture
def world():
    base = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    state = {n: p.detach().clone() for n, p in base.named_parameters()}
    vectors = [
        TaskVector.between(state, {n: p + 0.1 * torch.randn(p.shape) for n, p in state.items()}) for _ in range(3)
    ]
    return base, vectors


@pytest.mark.parametrize("by", ["emr", "tall_masks"])
def test_each_task_is_base_plus_its_scaled_part(by, world, tmp_path):
    base, vectors = world
    made = task_grafts(base, vectors, by)
    own = emr_parts(vectors) if by == "emr" else [(1.0, v) for v in tall_masks(vectors)]
    for task, (scale, part) in enumerate(own):
        want = (scale * part).apply_to(base)
        path = made.graft(task, base).save(tmp_path / f"{task}.safetensors")
        for graft in (made.graft(task, base), Graft.load(path)):
            got = graft.apply_to(base)
            for name, p in want.named_parameters():
                # the scaled part of `want` is rounded before the sum as well: an ulp of numbers below 1
                torch.testing.assert_close(got.get_parameter(name), p, rtol=0, atol=6e-8)
                outside = ~made.masks[task].masks()[name]
                assert torch.equal(got.get_parameter(name)[outside], base.get_parameter(name)[outside])


def test_a_single_task_is_its_model_bit_for_bit(world):
    base, vectors = world
    model = vectors[0].apply_to(base)
    for by in ("emr", "tall_masks"):
        got = task_grafts(base, vectors[:1], by).graft(0, base).apply_to(base)
        assert all(torch.equal(a, b) for a, b in zip(got.parameters(), model.parameters(), strict=True))


def test_saved_and_loaded_it_is_the_same(world, tmp_path):
    base, vectors = world
    made = task_grafts(base, vectors)
    loaded = TaskGrafts.load(made.save(tmp_path / "tasks"))
    assert loaded.scales == made.scales and len(loaded) == 3
    for task in range(3):
        a, b = (g.graft(task, base) for g in (made, loaded))
        assert all(torch.equal(a.indices[n], b.indices[n]) for n in a.shapes)
        assert all(torch.equal(a.values[n], b.values[n]) for n in a.shapes)


def test_dense_masks_cost_a_bit_per_element(tmp_path):
    mask = torch.rand(400, 500) < 0.5
    path = Graft.from_masks({"w": mask}).save(tmp_path / "dense.safetensors")
    assert path.stat().st_size < mask.numel() / 8 + 2000
    assert torch.equal(Graft.load(path).masks()["w"], mask)
    sparse = torch.zeros(400, 500, dtype=torch.bool)
    sparse[3, 4:9] = True
    path = Graft.from_masks({"w": sparse}).save(tmp_path / "sparse.safetensors")
    assert path.stat().st_size < 2000 and torch.equal(Graft.load(path).masks()["w"], sparse)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 1001])
def test_bits_are_the_indices(size):
    at = torch.from_numpy(np.flatnonzero(np.random.default_rng(size).random(size) < 0.5))
    bits = files.packed(at, size)
    assert bits.dtype == torch.uint8 and len(bits) == -(-size // 8)
    assert torch.equal(files.unpacked(bits, size), at)
    with pytest.raises(IntegrityError, match="bytes of bits for .* elements; save the graft again"):
        files.unpacked(bits, size + 8)


def test_what_cannot_be_is_refused(world, tmp_path):
    base, vectors = world
    made = task_grafts(base, vectors)
    with pytest.raises(ConfigError, match="by: got 'elect', expected one of emr, tall_masks"):
        task_grafts(base, vectors, "elect")
    with pytest.raises(ConfigError, match="threshold: got 0.3 for emr, which has none"):
        task_grafts(base, vectors, "emr", threshold=0.3)
    with pytest.raises(GraftError, match="task: got 3, expected 0 to 2"):
        made.graft(3, base)
    with pytest.raises(GraftError, match="got 3 masks and 2 scales, expected one of each per task"):
        TaskGrafts(made.vector, made.masks, made.scales[:2])
    with pytest.raises(IntegrityError, match="differs from this vector's base"):
        made.graft(0, vectors[0].apply_to(base))
    folder = made.save(tmp_path / "tasks")
    (folder / "task_grafts.json").write_text(json.dumps({"scales": "one"}))
    with pytest.raises(IntegrityError, match="got scales 'one', expected a number per task"):
        TaskGrafts.load(folder)
