"""AdaMerging: which way the coefficients go, and that labels are not looked at."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hatcl import ConfigError, IntegrityError
from hatcl.vectors.merging import merge
from hatcl.vectors.merging.adamerging import entropy
from hatcl.vectors.task_vector import TaskVector


def line(*rows):
    model = nn.Linear(len(rows[0]), len(rows), bias=False)
    model.weight.data = torch.tensor(rows)
    return model


X = torch.tensor([[1.0]])


def test_entropy():
    assert entropy(torch.zeros(3, 4)).item() == pytest.approx(math.log(4))
    assert entropy(torch.tensor([[math.log(3.0), 0.0]])).item() == pytest.approx(2 * math.log(2) - 0.75 * math.log(3))


def test_without_steps_it_is_task_arithmetic_with_the_first_coefficients(base, vectors, batches):
    got = merge(vectors, "adamerging", model=base, batches=batches, steps=0, start=0.25)
    want = merge(vectors, "arithmetic", scale=0.25)
    assert all(torch.equal(got[n], want[n]) for n in want)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_first_step_goes_where_the_model_is_surer_by_the_learning_rate(sign):
    base, tuned = line([1.0], [-1.0]), line([1.0 + sign], [-1.0 - sign])
    vector = TaskVector.between(base, tuned)
    got = merge([vector], "adamerging", model=base, batches=[[X]], steps=1, lr=0.125, start=0.25)
    # Adam's first step is the rate itself, up to its epsilon of 1e-8
    assert torch.allclose(got["weight"], (0.25 + sign * 0.125) * vector["weight"], rtol=0, atol=1e-6)


def test_coefficients_stay_between_0_and_1():
    base = line([1.0], [-1.0])
    up, down = (TaskVector.between(base, line([1.0 + s], [-1.0 - s])) for s in (1.0, -1.0))
    got = merge([up, down], "adamerging", model=base, batches=[[X], [X]], steps=5, lr=1.0)
    assert torch.equal(got["weight"], up["weight"])


def test_it_makes_the_merged_model_surer(base, vectors, batches):
    def uncertainty(vector):
        model = vector.apply_to(base).eval()
        return sum(float(entropy(model(x).detach())) for task in batches for x, _ in task)

    start = merge(vectors, "adamerging", model=base, batches=batches, steps=0)
    results = {g: merge(vectors, "adamerging", model=base, batches=batches, steps=40, lr=0.02, grain=g) for g in GRAINS}
    assert uncertainty(results["block"]) < uncertainty(results["global"]) < uncertainty(start)


GRAINS = ("block", "global")


def test_global_has_one_coefficient_per_task(base, vectors, batches):
    got = merge(vectors[:1], "adamerging", model=base, batches=batches[:1], steps=5, lr=0.05, grain="global")
    ratios = [float((got[n].double() / vectors[0][n].double()).median()) for n in got]
    assert max(ratios) - min(ratios) < 1e-6 and abs(ratios[0] - 0.3) > 0.05


def test_labels_are_not_looked_at(base, vectors, batches):
    without = [[x for x, _ in task] for task in batches]
    wrong = [[(x, torch.full_like(y, -7)) for x, y in task] for task in batches]
    a, b, c = (merge(vectors, "adamerging", model=base, batches=d, steps=4) for d in (batches, without, wrong))
    assert all(torch.equal(a[n], b[n]) and torch.equal(a[n], c[n]) for n in a)


def test_each_tasks_own_forward_is_told_the_task(base, vectors, batches):
    seen = []

    def forward(model, inputs, task):
        seen.append(task)
        return model(inputs) * (task + 1)

    merge(vectors, "adamerging", model=base, batches=batches, steps=2, forward=forward)
    assert seen == [0, 1, 2, 0, 1, 2]


def test_the_model_stays_as_it_was(base, vectors, batches):
    base.train()
    before = {n: t.clone() for n, t in base.state_dict().items()}
    with torch.no_grad():
        merge(vectors, "adamerging", model=base, batches=batches, steps=2)
    assert all(torch.equal(before[n], t) for n, t in base.state_dict().items())
    assert base.training and all(p.grad is None and p.requires_grad for p in base.parameters())


def test_buffers_in_the_vectors_are_averaged(base, models, batches):
    vectors = [TaskVector.between(base, m, buffers=True) for m in models]
    shifted = [v.map(lambda n, t, i=i: t + i if "running" in n else t) for i, v in enumerate(vectors)]
    merged = merge(shifted, "adamerging", model=base, batches=batches, steps=1)
    assert torch.equal(merged["norm.running_var"], torch.ones(4))


def test_refused(base, vectors, batches):
    def run(**options):
        return merge(vectors, "adamerging", **{"model": base, "batches": batches, "steps": 5, **options})

    with pytest.raises(ConfigError, match="grain: got 'unit', expected block or global; hatcl.compose has the others"):
        run(grain="unit")
    with pytest.raises(ConfigError, match="steps: got -1, expected an integer of at least 0"):
        run(steps=-1)
    with pytest.raises(ConfigError, match="lr: got -1, expected a number of at least 0"):
        run(lr=-1)
    with pytest.raises(ConfigError, match="start: got 2, expected a number between 0 and 1"):
        run(start=2)
    with pytest.raises(ConfigError, match="batches: got 2, expected a list of 3: one iterable of batches per vector"):
        run(batches=batches[:2])
    with pytest.raises(ConfigError, match="batches of task 1: there are none; pass a list or a DataLoader"):
        run(batches=[batches[0], [], batches[2]])
    with pytest.raises(ConfigError, match="batches of task 2: they can be read only once"):
        run(batches=[batches[0], batches[1], iter(batches[2])])
    with pytest.raises(IntegrityError, match="conv.weight|temperature"):
        run(model=type(base)())
