"""Routers of image tasks."""

from __future__ import annotations

import json

import numpy as np
import parts
import timm
import torch

import hatcl
from hatcl.continual.images import ImageOptions
from hatcl.continual.routing import EachPrepared, image_router, routing_measures


def sealed(stream):
    torch.manual_seed(0)
    widths = [data.num_classes for data in stream]
    return parts.pretend(timm.create_model("hat_test_resnet", num_tasks=len(stream), num_classes=widths))


def test_what_is_measured(three_tasks):
    options = ImageOptions(eval_batch_size=16)
    model = sealed(three_tasks)
    router = image_router(model, three_tasks, options, {"width": 32})
    assert router.tasks == [0, 1, 2] and router.options.width == 32
    found = routing_measures(router, model, three_tasks, options)
    tests = [len(data.x_test) for data in three_tasks]
    confusion = np.array(found["confusion"])
    assert confusion.sum(1).tolist() == tests
    assert np.isclose(found["task_accuracy"], confusion.trace() / sum(tests))
    right = told = largest = 0
    for t, data in enumerate(three_tasks):  # the same from the answers alone
        x, y = torch.from_numpy(data.x_test), torch.from_numpy(data.y_test).long()
        p = hatcl.predict(model, x, router=router)
        right += int(((p.task == t) & (p.label == y)).sum())
        z = [parts.logits(model, other, router.prepare(other, x)) for other in range(3)]
        told += int((z[t].argmax(1) == y).sum())
        largest += int((torch.stack([v.max(1).values for v in z], 1).argmax(1) == t).sum())
    for name, count in (("class_incremental", right), ("task_incremental", told), ("largest_logit", largest)):
        # batches of another size may round a tie otherwise
        assert abs(found[name] - count / sum(tests)) <= 1 / sum(tests)


def test_tasks_that_are_not_sealed_take_no_part(three_tasks):
    model = sealed(three_tasks)
    hatcl.forget_task(model, 1)
    router = image_router(model, three_tasks, ImageOptions(), {"width": 8})
    assert router.tasks == [0, 2]
    found = routing_measures(router, model, three_tasks, ImageOptions())
    assert np.array(found["confusion"])[1].sum() == np.array(found["confusion"])[:, 1].sum() == 0


def test_preparations_are_json(three_tasks):
    each = EachPrepared.of(three_tasks, ImageOptions(size=24, fit="pad"))
    again = EachPrepared.from_dict(json.loads(json.dumps(each.to_dict())))
    assert again == each
    x = torch.from_numpy(three_tasks[1].x_test)
    assert torch.equal(again(1, x), each(1, x)) and again(1, x).shape[-1] == 24
