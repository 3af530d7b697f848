"""Tasks that are added later, with heads of their own widths."""

from __future__ import annotations

import parts
import pytest
import torch
from head_parts import Scored, TwoHeads
from torch import nn
from torch.nn import functional as tf

import hatcl


def widths(model):
    """Of every module with copies whose output are classes: how many each task has."""
    return {path: [len(own.weight) for own in m.hat_tasks] for path, m in model.named_modules() if path in HEADS}


HEADS = ("7", "fc", "head", "cls", "box", "more")


@pytest.mark.parametrize("name", parts.MODELS)
def test_a_task_that_is_added_has_its_own_number_of_classes(tmp_path, name):
    model, x = parts.converted(name, 1), parts.images(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
    parts.train(model, 0, optimizer, parts.problem(parts.shape_of(name), 0), 4)
    want = {0: parts.logits(model, 0, x)}
    report = hatcl.add_tasks(model, 2, num_classes=[7, 2])
    assert report.tasks == [1, 2] and list(report.classes.values()) == [[7, 2]]
    assert report.elements == {t: sum(p.numel() for p in hatcl.task_parameters(model, t)) for t in (1, 2)}
    assert str(report).splitlines()[0] == "new tasks: 1, 2" and "classes 7, 2" in str(report)
    assert report.to_dict()["tasks"] == [1, 2]
    for t, n in ((1, 7), (2, 2)):
        optimizer.add_param_group({"params": hatcl.task_parameters(model, t)})
        parts.train(model, t, optimizer, parts.problem(parts.shape_of(name), t, classes=n), 4)
        want[t] = parts.logits(model, t, x)
        assert want[t].shape == (8, n)
    assert hatcl.certify(model, x, strict=True).exact
    rows = hatcl.forward(model, x, tasks=[0, 1, 2, 0, 1, 2, 0, 1])
    assert [len(row) for row in rows] == [parts.CLASSES, 7, 2, parts.CLASSES, 7, 2, parts.CLASSES, 7]
    small = hatcl.extract_task(model, 1, x)
    assert small.model(x).shape == (8, 7)
    hatcl.save_pretrained(model.eval(), tmp_path)
    again = hatcl.from_pretrained(tmp_path, base=parts.plain(name))
    hatcl.forget_task(model, 2)
    for t in (0, 1):
        assert torch.equal(parts.logits(model, t, x), want[t])
    for t, y in want.items():
        assert torch.equal(parts.logits(again, t, x), y)


def test_the_plain_number_of_classes_one_for_all_and_heads_by_name():
    x = torch.randn(4, 8)
    model = hatcl.convert(TwoHeads(), 1, x)
    assert hatcl.add_tasks(model, 1).classes == {}
    assert hatcl.add_tasks(model, 2, num_classes={"cls": 7}).classes == {"cls": [7, 7]}
    assert widths(model) == {"cls": [3, 3, 7, 7], "box": [4, 4, 4, 4]}
    tied = hatcl.convert(Scored(True), 1, x)
    hatcl.add_tasks(tied, 1, num_classes={"more": 7})
    assert [len(own.factor) for own in tied.hat_tasks] == [3, 7]
    assert torch.equal(tied.cls.hat_tasks[1].weight, tied.more.hat_tasks[1].weight)
    wrapped = nn.Sequential(hatcl.convert(TwoHeads(), 1, x))
    hatcl.add_tasks(wrapped, 1, num_classes={"box": [9]})
    assert widths(wrapped[0]) == {"cls": [3, 3], "box": [4, 9]}


def refused(model, text, *args, **options):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(hatcl.HATError, match=text):
        hatcl.add_tasks(model, *args, **options)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(x, after[name]) for name, x in before.items())


def test_numbers_of_classes_that_do_not_fit():
    model = hatcl.convert(TwoHeads(), 1, torch.randn(4, 8))
    refused(model, "count: got True, expected at least 1", True)
    refused(model, "num_classes: got 2 numbers for 3 new tasks; pass one per new task", 3, [2, 3])
    refused(model, r"num_classes\['cls'\]: got 0; expected a whole number of 1 or more", 1, {"cls": 0})
    refused(model, "num_classes: got 'clss', which is no head; the model has cls, box", 1, {"clss": 3})
    refused(model, r"several heads of different widths, cls \(3\), box \(4\)", 1, num_classes=3)
    by_hand = nn.Sequential(hatcl.HATLinear(4, 4, num_tasks=1))
    refused(by_hand, "num_classes: got 3 for a model that was put together by hand, where nothing says", 1, 3)


def test_a_head_that_was_widened_learns_what_the_plain_width_cannot():
    """The twin of the widths: with the plain model's head there is no seventh class to say."""
    x, y = parts.problem(parts.shape_of("mlp"), 1, classes=7)
    model = parts.converted("mlp", 1)
    hatcl.add_tasks(model, 2, num_classes=[7, parts.CLASSES])
    parts.pretend(model, [1, 2])
    assert tf.cross_entropy(parts.logits(model, 1, x), y).isfinite()
    with pytest.raises(IndexError):
        tf.cross_entropy(parts.logits(model, 2, x), y)
