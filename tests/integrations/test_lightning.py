"""Lightning 2: a task is learned by a callback, sealed before its last checkpoint, and resumed in a fresh model."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from border_parts import out
from torch import nn
from torch.nn import functional as tf
from torch.utils.data import DataLoader, TensorDataset

import hatcl
from hatcl.functional import same_bits

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer, callbacks  # noqa: E402
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint  # noqa: E402
from timm.utils import ModelEmaV3  # noqa: E402

from hatcl.integrations.lightning import LearnTask  # noqa: E402

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))


def labels(task):
    return (X[:, task] > 0).long() + (X[:, task + 1] > 0).long()


@functools.cache
def made():
    torch.manual_seed(0)
    return hatcl.convert(
        nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)), 3, X[:2]
    )


class Module(LightningModule):
    def __init__(self, model=None, manual=False):
        super().__init__()
        self.model, self.automatic_optimization = model or copy.deepcopy(made()), not manual

    def training_step(self, batch, _):
        loss = tf.cross_entropy(self.model(batch[0]), batch[1])
        if not self.automatic_optimization:
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
        return loss

    def validation_step(self, batch, _):
        self.log("loss", tf.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.1)


def fit(module, task, folder, callbacks=(), resume=None, learn=None, **options):
    checkpoint = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_last=True)
    loader = DataLoader(TensorDataset(X, labels(task)), 8)
    given = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    learn = learn or LearnTask(task)
    trainer = Trainer(**given | options, enable_model_summary=False, callbacks=[checkpoint, learn, *callbacks])
    trainer.fit(module, loader, DataLoader(TensorDataset(X, labels(task)), 32), ckpt_path=resume)
    return trainer


said = functools.partial(out, x=X)


@pytest.fixture(autouse=True)
def sealed_at_full_scale():
    """A task that is sealed after another number of steps than was expected is warned of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")
        warnings.filterwarnings("error", message="task ")
        yield


@functools.cache
def learned():
    module = Module()
    Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[LearnTask(0)],
    ).fit(module, DataLoader(TensorDataset(X, labels(0)), 8))  # fmt: skip
    return module.model, said(module.model, 0)


def with_task_0():
    model, want = learned()
    return copy.deepcopy(model), want


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}, {"max_steps": 7}],
    ids=lambda o: next(iter(o), "default"),
)
def test_two_tasks(tmp_path, options):
    model, want = with_task_0()
    fit(Module(model), 1, tmp_path, **options)
    assert hatcl.tasks(model) == [0, 1] and same_bits(said(model, 0), want) and hatcl.certify(model, X).exact


def test_evaluation_is_of_the_callbacks_own_task(tmp_path):
    model, want = with_task_0()
    module = Module(model)
    fit(module, 1, tmp_path)
    module.predict_step = lambda batch, batch_idx: model(batch[0])

    def evaluating(task):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        return Trainer(accelerator="cpu", callbacks=[LearnTask(task)], **quiet)

    loaders = [DataLoader(TensorDataset(X, labels(t)), 32) for t in (0, 1)]
    for task in (1, 0, 1):  # whatever task is the model's own
        (said_now,) = evaluating(task).predict(module, loaders[task])
        assert same_bits(said_now, want if task == 0 else said(model, 1))
    (first,) = evaluating(0).validate(module, loaders[0], verbose=False)
    assert first["loss"] == pytest.approx(float(tf.cross_entropy(want, labels(0))), rel=1e-5)
    with pytest.raises(hatcl.TaskError, match="task 2 is not sealed"):
        evaluating(2).validate(module, loaders[0], verbose=False)
    with hatcl.task(model, 1):  # nothing of an evaluation stays behind
        assert same_bits(model(X).detach(), said(model, 1))


AVERAGES = {
    "EMAWeightAveraging": lambda kind: kind(decay=0.9),
    "WeightAveraging": lambda kind: kind(),
    "StochasticWeightAveraging": lambda kind: kind(1e-2, swa_epoch_start=1),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_averages_that_would_be_written_over_sealed_tasks_are_refused(tmp_path, name):
    kind = getattr(callbacks, name, None)
    if kind is None:
        pytest.skip(f"this Lightning has no {name}")
    model, want = with_task_0()
    with pytest.raises(hatcl.ConfigError, match=f"{name}: puts averaged weights .* hatcl.seal"):
        fit(Module(model), 1, tmp_path, [AVERAGES[name](kind)])
    assert hatcl.tasks(model) == [0] and same_bits(said(model, 0), want)


def test_twin_without_the_refusal_an_average_moves_what_is_sealed(tmp_path, monkeypatch):
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")
    monkeypatch.setattr("hatcl.integrations.lightning.AVERAGING", ())
    model, want = with_task_0()
    fit(Module(model), 1, tmp_path, [callbacks.EMAWeightAveraging(decay=0.9)])
    assert not same_bits(said(model, 0), want)


class Ema(Callback):
    """As the refusal says."""

    def on_train_start(self, trainer, module):
        self.ema = ModelEmaV3(module.model, decay=0.9)

    def on_train_batch_end(self, trainer, module, *_):
        self.ema.update(module.model)


def test_an_averaged_copy_of_ones_own(tmp_path):
    model, want = with_task_0()
    averaged = Ema()
    fit(Module(model), 1, tmp_path, [averaged])
    copied = averaged.ema.module
    hatcl.seal(copied)
    assert same_bits(said(copied, 0), want) and same_bits(said(model, 0), want) and hatcl.certify(copied, X).exact


def test_the_best_checkpoint_is_loaded_and_sealed(tmp_path):
    model, want = with_task_0()
    module = Module(model)
    ups = iter([3.0, 1.0, 2.0])
    seen = lambda: 9.0 if module.trainer.sanity_checking else next(ups)  # noqa: E731
    module.validation_step = lambda batch, batch_idx: module.log("up", seen())
    best = ModelCheckpoint(tmp_path, filename="best", monitor="up", mode="min")
    fit(module, 1, tmp_path, [best])
    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert best.best_model_score == 1 and not state["model.hat_gates.sealed"][1]
    module.load_state_dict(state)
    hatcl.seal(model, 1)
    assert hatcl.tasks(model) == [0, 1] and same_bits(said(model, 0), want) and hatcl.certify(model, X).exact


def test_manual_optimization(tmp_path):
    model, want = with_task_0()
    fit(Module(model, manual=True), 1, tmp_path)
    assert hatcl.tasks(model) == [0, 1] and same_bits(said(model, 0), want) and hatcl.certify(model, X).exact


def test_the_last_checkpoint_holds_the_sealed_task_and_an_earlier_one_is_resumed(tmp_path):
    model, want = with_task_0()
    fit(Module(model), 1, tmp_path)
    last = Module()
    last.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert hatcl.tasks(last.model) == [0, 1] and same_bits(said(last.model, 1), said(model, 1))
    resumed = Module()  # nothing is sealed in it: the checkpoint brings task 0 along
    fit(resumed, 1, tmp_path / "again", resume=tmp_path / "epoch=0.ckpt")
    assert same_bits(said(resumed.model, 0), want) and same_bits(said(resumed.model, 1), said(model, 1))
    finished = Module()
    fit(finished, 1, tmp_path / "finished", resume=tmp_path / "last.ckpt")
    assert same_bits(said(finished.model, 1), said(model, 1))
    with pytest.raises(hatcl.TaskError, match="task 1 is sealed and cannot be learned again"):
        fit(Module(model), 1, tmp_path / "more")


class Gradients(Callback):
    """The embeddings' gradient in the first step, when all of it is there."""

    seen = None

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if self.seen is None:
            self.seen = module.model.hat_gates.embeddings[0].grad.clone()


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_the_penalty_counts_once_per_step(tmp_path, accumulate):
    """With the task's own loss taken out, the embeddings' gradient is the penalty's, whatever the accumulation."""
    module, seen = Module(), Gradients()
    module.training_step = lambda batch, batch_idx: 0.0 * module.model(batch[0]).sum()
    fit(module, 0, tmp_path, [seen], accumulate_grad_batches=accumulate, limit_val_batches=0)
    fresh = copy.deepcopy(made())
    with (
        pytest.raises(ZeroDivisionError),
        hatcl.learn(fresh, 0, torch.optim.SGD(fresh.parameters(), lr=0.1), 12 // accumulate) as learning,
    ):
        learning.penalty().backward()
        torch.testing.assert_close(seen.seen, fresh.hat_gates.embeddings[0].grad)
        assert seen.seen.abs().sum() > 0
        raise ZeroDivisionError


def test_training_that_is_stopped_early_seals_before_it_saves(tmp_path):
    model, want = with_task_0()
    stop = EarlyStopping("loss", divergence_threshold=0.0)
    with pytest.warns(UserWarning, match="task 1 is sealed after 4 of 12 steps"):
        fit(Module(model), 1, tmp_path, [stop])
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert last["model.hat_gates.sealed"].tolist() == [True, True, False] and same_bits(said(model, 0), want)


class Fails(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if trainer.global_step == 6:
            raise ZeroDivisionError


def test_an_error_seals_nothing(tmp_path):
    model, want = with_task_0()
    with pytest.raises(ZeroDivisionError):
        fit(Module(model), 1, tmp_path, [Fails()])
    assert hatcl.tasks(model) == [0] and model.hat_gates.learning is None and same_bits(said(model, 0), want)
    fit(Module(model), 1, tmp_path)
    assert hatcl.tasks(model) == [0, 1]


def test_a_number_of_steps_that_is_not_known_is_asked_for(tmp_path):
    with pytest.raises(hatcl.ConfigError, match=r"cannot tell how many steps .*pass LearnTask\(task=0, steps=...\)"):
        fit(Module(), 0, tmp_path, max_epochs=-1)
    with pytest.raises(hatcl.ConfigError, match="steps: got 2.5, expected an integer of at least 1"):
        LearnTask(0, steps=2.5)
    module = Module()
    fit(module, 0, tmp_path, learn=LearnTask(0, steps=5), max_epochs=-1, max_steps=5)
    assert hatcl.tasks(module.model) == [0]
    with pytest.raises(hatcl.TaskError, match="task 0 is sealed after 5 steps, and the Trainer takes more"):
        fit(Module(), 0, tmp_path, learn=LearnTask(0, steps=5))


def test_a_stop_that_comes_too_early_seals_nothing_yet(tmp_path):
    """`min_steps` has the Trainer go on after a callback has asked it to stop."""
    module, stop = Module(), EarlyStopping("loss", divergence_threshold=0.0)
    with pytest.warns(UserWarning, match="task 0 is sealed after 8 of 12 steps"):
        trainer = fit(module, 0, tmp_path, [stop], min_epochs=2)
    assert hatcl.tasks(module.model) == [0] and trainer.global_step == 8
    first = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert first["model.hat_gates.sealed"].tolist() == [False] * 3


def test_another_tasks_checkpoint_is_refused(tmp_path):
    module = Module()
    fit(module, 0, tmp_path)
    for name in ("epoch=0.ckpt", "last.ckpt"):  # in the middle, and finished
        with pytest.raises(hatcl.TaskError, match="task: got 1, but the checkpoint to resume from belongs to task 0"):
            fit(Module(copy.deepcopy(module.model)), 1, tmp_path / "other", resume=tmp_path / name)
