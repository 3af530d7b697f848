"""The pieces of timm's own train.py around `hatcl.learn`: layer decay, mixup, gradient scaler, averaged weights, and
the checkpoints of `CheckpointSaver`."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
from border_parts import out
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler

import hatcl
from hatcl.functional import same_bits

X = torch.randn(16, 3, 160, 160, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 4
EPOCHS, STEPS = 2, 8


def network(**options):
    torch.manual_seed(0)
    return timm.create_model("hat_test_vit", num_tasks=3, num_classes=4, **options)


said = functools.partial(out, x=X[:4])


def epoch(model, learning, optimizer, scaler, ema, mixup, start):
    for i in range(start, start + STEPS // EPOCHS):
        at = (4 * i + torch.arange(4)) % 16
        x, y = mixup(X[at], Y[at])
        loss = SoftTargetCrossEntropy()(model(x), y) + learning.penalty()
        optimizer.zero_grad()
        scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
        ema.update(model, step=i)


def train(model, task, folder, resume=False):
    torch.manual_seed(task)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    rates, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=EPOCHS)
    scaler, mixup = NativeScaler(device="cpu"), Mixup(mixup_alpha=0.2, num_classes=4)
    ema = ModelEmaV3(model, decay=0.5)
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(folder), recovery_dir=str(folder), max_history=2)
    with hatcl.learn(model, task, optimizer, steps=STEPS) as learning:
        for number in range(EPOCHS):
            model.train()
            epoch(model, learning, optimizer, scaler, ema, mixup, number * STEPS // EPOCHS)
            rates.step(number + 1)
            saver.save_checkpoint(number, metric=float(number))
    return ema


def test_two_tasks_by_timms_recipe(tmp_path):
    model = network()
    train(model, 0, tmp_path)
    want = said(model, 0)
    ema = train(model, 1, tmp_path)
    assert hatcl.tasks(model) == [0, 1] and same_bits(said(model, 0), want)
    assert hatcl.certify(model, X[:4]).exact
    assert same_bits(said(ema.module, 0), want)  # averaged weights: what is sealed is the same


def test_a_checkpoint_of_timms_is_loaded_into_a_model_that_was_converted_alike(tmp_path):
    model = network()
    train(model, 0, tmp_path)
    want = said(model, 0)
    train(model, 1, tmp_path)
    again = network()
    state = torch.load(tmp_path / "model_best.pth.tar", weights_only=True)["state_dict"]
    again.load_state_dict(state)
    assert hatcl.tasks(again) == [0] and same_bits(said(again, 0), want)
    with pytest.raises(hatcl.TaskError, match="task 1 is not sealed"):
        hatcl.set_task(again, 1)
