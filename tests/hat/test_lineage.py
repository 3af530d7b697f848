"""Which task carries what was transplanted from which, and what forgetting says of it (DESIGN M13)."""

from __future__ import annotations

import copy
import json

import parts
import pytest
import torch

import hatcl
from hatcl.hat import forget as forgetting
from hatcl.hat.digests import record
from hatcl.hat.gates import gates_of
from hatcl.hat.held import held
from hatcl.hat.lineage import descendants_of, disinherit, forgotten_lineage, inherit, lineage
from hatcl.hat.transplant import fork, transplant


def family(name="mlp", num_tasks=6, chain=((1, 0), (2, 1), (3, None), (4, 3))):
    """Task 0, then tasks that start from others."""
    model = parts.pretend(parts.converted(name, num_tasks), [0], share=0.4)
    for t, source in chain:
        if source is None:
            parts.pretend(model, [t], share=0.3, seed=t)
            continue
        plan = fork(model, t, source, hatcl.tasks(model))
        transplant(model, t, plan, hatcl.tasks(model))
        inherit(model, t, source)
        g = gates_of(model)[0]
        with torch.no_grad():
            g.embeddings[t].copy_(torch.where(plan.masks[0], 1.0, -1.0))
        g.seal(t)
        record(model, t)
    return model


def test_ancestors_are_all_of_the_line():
    model = family()
    assert lineage(model) == {1: [0], 2: [0, 1], 4: [3]} and forgotten_lineage(model) == {}
    assert descendants_of(model, 0) == [1, 2] and descendants_of(model, 4) == []


def test_describe_shows_it():
    model = family()
    said = hatcl.describe(model)
    assert said.lineage == {1: [0], 2: [0, 1], 4: [3]}
    assert "lineage: task 2 carries what was transplanted from tasks 0, 1" in str(said)
    assert json.loads(json.dumps(said.to_dict()))["lineage"]["2"] == [0, 1]
    with pytest.warns(UserWarning, match="keep what was transplanted"):
        hatcl.forget_task(model, 0)
    assert "task 2 carries what was transplanted from task 1 and from task 0, since forgotten" in str(
        hatcl.describe(model)
    )


def test_it_is_saved_loaded_and_copied(tmp_path):
    model = family()
    want = lineage(model)
    assert lineage(copy.deepcopy(model)) == want
    other = parts.converted("mlp", 6)
    other.load_state_dict(model.state_dict())
    assert lineage(other) == want
    hatcl.save_pretrained(model, tmp_path)
    assert lineage(hatcl.from_pretrained(tmp_path, base=parts.plain("mlp"))) == want


def test_added_tasks_have_none_and_leave_it():
    model = family()
    hatcl.add_tasks(model, 2)
    assert lineage(model) == {1: [0], 2: [0, 1], 4: [3]} and gates_of(model)[0].lineage.shape == (8, 8)


def test_a_task_that_begins_carries_what_an_unfinished_one_was_given():
    """Its elements are free for whoever comes."""
    model = family(chain=((1, 0),))
    inherit(model, 2, 1)  # begins, and is not sealed
    inherit(model, 3, None)
    assert lineage(model)[3] == [0, 1]


# ---- forgetting -----------------------------------------------------------------------------------


def test_keep_warns_and_reports():
    model = family()
    with pytest.warns(UserWarning, match=r"tasks 1, 2 started from task 0 and keep .* forgotten in part only"):
        report = hatcl.forget_task(model, 0)
    assert report.descendants == (1, 2) and report.forgotten == (0,)
    assert "tasks 1, 2 started from it and still know what was transplanted" in str(report)
    assert hatcl.tasks(model) == [1, 2, 3, 4]
    assert lineage(model) == {2: [1], 4: [3]} and forgotten_lineage(model) == {1: [0], 2: [0]}


def test_a_number_that_is_taken_again_is_another_task():
    model = family()
    with pytest.warns(UserWarning, match="keep what was transplanted"):
        hatcl.forget_task(model, 0)
    parts.pretend(model, [0], share=0.3)
    assert descendants_of(model, 0) == []
    report = hatcl.forget_task(model, 0)
    assert report.descendants == ()


def test_refuse_forgets_nothing():
    model = family()
    before = parts.snapshot(model)
    with pytest.raises(hatcl.TaskError, match=r"tasks 1, 2 started from task 0 .* descendants='forget'"):
        hatcl.forget_task(model, 0, descendants="refuse")
    assert parts.same(before, parts.snapshot(model))
    assert hatcl.forget_task(model, 2, descendants="refuse").descendants == ()


def test_another_word_is_refused():
    with pytest.raises(hatcl.ConfigError, match=r"descendants: got 'forgot', expected one of .* 'forget'"):
        hatcl.forget_task(family(), 0, descendants="forgot")


def test_forget_takes_the_line_along_and_nothing_else():
    model, x = family("resnet"), parts.images("resnet", 2)
    before = {t: parts.outputs_of(model.eval(), x, t) for t in (3, 4)}
    dry = hatcl.forget_task(model, 0, descendants="forget", dry_run=True)
    gone = {h.name: h.live(0) | h.live(1) | h.live(2) for h in held(model) if h.task is None and not h.plain}
    stays = {h.name: h.live(3) | h.live(4) for h in held(model) if h.task is None and not h.plain}
    old = parts.snapshot(model)
    report = hatcl.forget_task(model, 0, descendants="forget")
    assert report.forgotten == (0, 1, 2) and report.descendants == (1, 2)
    assert report.erased == dry.erased and (report.kept, report.own) == (dry.kept, dry.own)
    new = parts.snapshot(model)
    for name, live in gone.items():
        if name in old:
            changed = old[name] != new[name]
            assert not bool((changed & (~live | stays[name])).any()), name
    assert any(bool((old[n] != new[n])[gone[n] & ~stays[n]].any()) for n in gone if n in old)
    assert hatcl.tasks(model) == [3, 4] and lineage(model) == {4: [3]} and forgotten_lineage(model) == {}
    for t in (3, 4):
        assert all(torch.equal(a, b) for a, b in zip(before[t], parts.outputs_of(model, x, t), strict=True))
    assert hatcl.certify(model, x, strict=True).exact


def test_twin_without_lineage_forgetting_says_nothing_and_leaves_the_copies(monkeypatch):
    monkeypatch.setattr(forgetting, "descendants_of", lambda model, task: [])
    monkeypatch.setattr(forgetting, "to_forget", lambda model, task, descendants: [task])
    model = family()
    report = hatcl.forget_task(model, 0, descendants="refuse")
    assert report.descendants == () and hatcl.tasks(model) == [1, 2, 3, 4]


def test_disinheriting_two_at_once():
    model = family()
    disinherit(model, [0, 1])
    assert lineage(model) == {4: [3]} and forgotten_lineage(model) == {2: [0, 1]}


def test_an_active_descendant_is_not_forgotten_under_a_block():
    model = family()
    with hatcl.task(model, 2), pytest.raises(hatcl.TaskError, match="task 2 is active"):
        hatcl.forget_task(model, 0, descendants="forget")
