"""Routers of image tasks."""

from __future__ import annotations

import dataclasses
import json

import continual_parts
import numpy as np
import parts
import pytest
import timm
import torch

import hatcl
from hatcl.continual.images import ImageOptions
from hatcl.continual.label_words import label_word_task
from hatcl.continual.routing import (
    EachPrepared,
    image_examples,
    image_router,
    readings,
    routing_measures,
    text_examples,
    text_router,
)
from hatcl.data.texts import TextData
from hatcl.errors import ConfigError


def sealed(stream):
    torch.manual_seed(0)
    widths = [data.num_classes for data in stream]
    return parts.pretend(timm.create_model("hat_test_resnet", num_tasks=len(stream), num_classes=widths))


def test_what_is_measured(three_tasks):
    options = ImageOptions(eval_batch_size=16)
    model = sealed(three_tasks)
    router = image_router(model, three_tasks, options, {"width": 32})
    assert router.tasks == [0, 1, 2] and router.options.width == 32
    found = routing_measures(router, model, image_examples(three_tasks, options.eval_batch_size))
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


def test_a_task_that_is_no_classification_is_refused(three_tasks):
    numbers = dataclasses.replace(
        three_tasks[1], y_train=np.float32(three_tasks[1].y_train)[:, None],
        y_test=np.float32(three_tasks[1].y_test)[:, None],
        problem="regression", num_classes=1,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="router: task 'blobs1' is a regression, but a router needs tasks with one"):
        image_router(sealed(three_tasks), [three_tasks[0], numbers], ImageOptions())


def test_tasks_that_are_not_sealed_take_no_part(three_tasks):
    model = sealed(three_tasks)
    hatcl.forget_task(model, 1)
    router = image_router(model, three_tasks, ImageOptions(), {"width": 8})
    assert router.tasks == [0, 2]
    found = routing_measures(router, model, image_examples(three_tasks, 256))
    assert np.array(found["confusion"])[1].sum() == np.array(found["confusion"])[:, 1].sum() == 0


def test_preparations_are_json(three_tasks):
    each = EachPrepared.of(three_tasks, ImageOptions(size=24, fit="pad"))
    again = EachPrepared.from_dict(json.loads(json.dumps(each.to_dict())))
    assert again == each
    x = torch.from_numpy(three_tasks[1].x_test)
    assert torch.equal(again(1, x), each(1, x)) and again(1, x).shape[-1] == 24


def test_texts_find_their_task():
    """Two tasks whose texts have few words in common; the adapters have not learned anything."""
    peft = pytest.importorskip("peft")
    base = continual_parts.bert()
    encoder = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["query", "value"]))
    some = [continual_parts.texts(t, ("warm", "cold")) for t in range(2)]
    of = some[1]  # in place of its words the labels', which the other task's texts do not have
    some[1] = TextData(
        *[[(" ".join(y for _ in x.split()), y) for x, y in p] for p in (of.train, of.validation, of.test)]
    )
    sequence = [label_word_task(f"{t}", of, base, continual_parts.tokenizer()) for t, of in enumerate(some)]
    model = parts.pretend(hatcl.convert(encoder, 2, sequence[0].inputs()))
    router = text_router(model, sequence, some, {"width": 64})
    found = routing_measures(router, model, text_examples(sequence, some))
    assert np.array(found["confusion"]).sum(1).tolist() == [len(of.test) for of in some]
    assert found["task_accuracy"] > 0.9 and found["at_first_sight"] > 0.9
    scores = []
    for t, of in enumerate(sequence):
        with hatcl.task(model, t):
            scores.append(of.score(model))
    assert abs(found["task_incremental"] - np.mean(scores)) < 1.5 / 48  # a tie may round otherwise in other batches
    with pytest.raises(ConfigError, match="task 0 is not made of texts, or was made by hand; give ContinualTask"):
        readings([dataclasses.replace(sequence[0], reading=None)])
