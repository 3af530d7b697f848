"""Grafts in sequence: what a task computes stays bit for bit, and the twin in which nothing is held."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import torch  # noqa: E402
from continual_parts import QUICK, adapted, bert, plain, run, same, state, text_tasks, vector_task  # noqa: E402

from hatcl.continual import learn_sequence, make_method  # noqa: E402
from hatcl.continual.methods import graft as module  # noqa: E402
from hatcl.errors import ConfigError, GraftError  # noqa: E402
from hatcl.grafts import Graft, overlaps, union  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(9, 6, generator=torch.Generator().manual_seed(5))


def tasks(count=3):
    return [vector_task(f"task {i}", i, 3) for i in range(count)]


def learned(model=None, count=3, on_progress=None, **options):
    """The method after its run, the model, and what it started from."""
    model = plain() if model is None else model
    start = state(model)
    method = make_method("graft", {"sparsity": 0.1, **options})
    result = learn_sequence(model, tasks(count), method, {**QUICK, "epochs": 3}, on_progress=on_progress)
    return method, model, start, result


def outputs(**options):
    """What the first task computes, after each task, as it is scored."""
    model, seen = plain(), []

    def look(at):
        if at.doing == "scoring" and at.task == "task 0" and at.stage >= 0:
            with torch.no_grad():
                seen.append(model(X).clone())

    learned(model, on_progress=look, **options)
    assert len(seen) == 3
    return seen


def test_what_a_task_computes_stays_bit_for_bit():
    first, *later = outputs()
    assert all(torch.equal(first, x) for x in later)
    first, *later = outputs(scored="all")
    assert not any(torch.equal(first, x) for x in later)


def moves(monkeypatch):
    """After each later task's steps: did elements of the first graft move?"""
    seen, plain_end = [], module.Grafts.end

    def end(self, model, stage):
        if stage:
            first, params = self.grafts[0], dict(model.named_parameters())
            now = {n: params[n].detach().view(-1)[at.long()] for n, at in first.indices.items()}
            seen.append(not same(now, first.values))
        plain_end(self, model, stage)

    with monkeypatch.context() as patch:
        patch.setattr(module.Grafts, "end", end)
        learned()
    return seen


def test_a_task_trains_around_earlier_grafts_and_the_twin_without_hold_moves_them(monkeypatch):
    assert moves(monkeypatch) == [False, False]
    monkeypatch.setattr(module, "hold", lambda *args: contextlib.nullcontext())
    assert moves(monkeypatch) == [True, True]


@pytest.mark.parametrize("by", ["magnitude", "random", "learned"])
def test_grafts_are_disjoint_and_all_else_is_the_pretrained(by):
    method, model, start, result = learned(by=by)
    grafts = method.grafts
    total = sum(p.numel() for p in model.parameters())
    assert [g.numel for g in grafts] == [total] * 3 and total == 99
    assert grafts[0].size == 9 and all(0 < g.size <= 9 for g in grafts)
    if by == "magnitude":
        assert [g.size for g in grafts] == [9, 9, 9]
    assert torch.equal(overlaps(grafts), torch.eye(3, dtype=torch.float64))
    # the model is the start with all grafts, statistics as at the start
    every = union(grafts)
    fresh = plain()
    assert same(state(every.apply_to(fresh)), state(model))
    assert all(torch.equal(t, start[n]) for n, t in state(model).items() if "running" in n or "num_batches" in n)
    # a task's network is the start with the grafts up to its own, whose base is the start for each
    for t in range(3):
        alone = union(grafts[: t + 1]).apply_to(fresh)
        with method.scoring(model, t):
            assert same(state(model), state(alone))
        assert same(state(model), state(every.apply_to(fresh)))
    assert result.backward_transfer == 0


def test_the_largest_changes_are_taken():
    changes = []
    method = make_method("graft", {"sparsity": 0.1})
    plain_end = method.end

    def end(model, stage):
        after = {n: p.detach().clone() for n, p in model.named_parameters()}
        changes.append({n: (after[n] - method.before[n]).abs() for n in after})
        plain_end(model, stage)

    method.end = end
    learn_sequence(plain(), tasks(), method, QUICK)
    for change, graft in zip(changes, method.grafts, strict=True):
        on = graft.masks()
        picked, left = (torch.cat([c[on[n] == inside] for n, c in change.items()]) for inside in (True, False))
        assert picked.min() >= left.max() > 0
    # what earlier tasks hold did not change
    assert all(not bool(changes[2][n].view(-1)[at.long()].any()) for n, at in method.grafts[0].indices.items())


def test_it_learns_more_with_more_elements_and_forgets_nothing():
    final = {}
    for share in (0.02, 0.3):
        *_, result = learned(sparsity=share)
        final[share] = result.average_accuracy
        assert result.backward_transfer == 0
    assert final[0.3] > final[0.02]


def test_patterns_say_what_takes_part():
    method, model, start, _ = learned(only=["0.*", "3.*"], skip="3.bias", sparsity=0.2)
    assert set(method.grafts[0].shapes) == {"0.weight", "0.bias", "3.weight"}
    assert all(torch.equal(t, start[n]) for n, t in state(model).items() if n.startswith("1.") or n == "3.bias")
    with pytest.raises(ConfigError, match="only: 'head.*' matches none of 6 tensors; did you mean"):
        learned(only=["head.*"])


def test_an_adapter_has_grafts_too(tmp_path):
    model, result = run("graft", tmp_path / "run")
    loaded = [Graft.load(p) for p in sorted(tmp_path.glob("run/tasks/*/graft.safetensors"))]
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert [g.numel for g in loaded] == [total] * 3 and all("lora_" in n for n in loaded[0].shapes)
    assert loaded[0].size == int(0.01 * total)
    assert same(state(union(loaded).apply_to(adapted())), state(model))
    assert result.backward_transfer == 0


def test_learned_grafts_are_chosen_by_the_tasks_own_training_loss(monkeypatch):
    grafts, seen = [], []
    inner = module.learn_graft

    def spied(*args, **options):
        seen.clear()
        grafts.append(inner(*args, **options))
        assert seen == [10, 10, 4] * 3  # the start and two steps, and nothing beside
        return grafts[-1]

    def watched(task):
        def loss(model, batch):
            seen.append(len(batch[1]))
            return task.loss(model, batch)

        return dataclasses.replace(task, loss=loss, validate=lambda model: pytest.fail("chosen by validation"))

    monkeypatch.setattr(module, "learn_graft", spied)
    method = make_method("graft", {"by": "learned", "sparsity": 0.1, "learn": {"steps": 2}, "batch_size": 10})
    learn_sequence(plain(), [watched(t) for t in tasks()], method, QUICK)
    assert len(grafts) == 3
    for graft in grafts:
        losses = [h["loss"] for h in graft.history]
        assert graft.step == losses.index(min(losses)) and not any("validation" in h for h in graft.history)
    assert method.to_dict()["options"]["learn"]["steps"] == 2


def test_nothing_learned_is_an_error_that_names_the_way_out():
    with pytest.raises(GraftError, match="sparsity: 0.001 of 99 elements selects none; use at least 1/99"):
        learned(sparsity=0.001)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"sparsity": 0}, "sparsity: got 0, expected a share between 0 and 1"),
        (
            {"by": "magnitud"},
            "by: got 'magnitud', expected one of magnitude, random, learned; did you mean 'magnitude'",
        ),
        ({"scored": "every"}, "scored: got 'every', expected one of own, all"),
        ({"batch_size": 0}, "batch_size: got 0, expected an integer of at least 1"),
        ({"learn": {"step": 3}}, "GraftOptions has no option 'step'; did you mean 'steps'"),
    ],
)
def test_options(options, text):
    with pytest.raises(ConfigError) as caught:
        make_method("graft", options)
    assert text in str(caught.value)


def test_text_tasks_with_a_whole_model():
    model = bert()
    start = state(model)
    method = make_method("graft", {"sparsity": 0.05})
    result = learn_sequence(model, text_tasks(bert()), method, {**QUICK, "lr": 1e-2})
    assert result.backward_transfer == 0
    held = union(method.grafts).masks()
    for n, t in state(model).items():
        if n in held:
            assert torch.equal(t[~held[n]], start[n][~held[n]]) and method.grafts[0].numel > 1000
