"""Learned grafts: the update by hand, what is kept, and that the models come back as they were lent."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from graft_parts import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from vector_parts import Tied, moved, save

from hatcl.errors import ConfigError, GraftError, NonFiniteLossError
from hatcl.grafts import learned
from hatcl.grafts.graft import Graft
from hatcl.grafts.learned import LearnedGraft, learn_graft
from hatcl.grafts.options import PUBLISHED, GraftOptions
from hatcl.grafts.scores import GraftScores, highest, top
from hatcl.grafts.selection import select_graft

EVERY = {
    "default": {},
    "soft": {"gamma": "soft"},
    "free": {"size": "free"},
    "adam": {"optimizer": "adam", "lr": 0.1},
    "momentum": {"momentum": 0.9},
    "published": PUBLISHED,
}


def at(graft):
    return {n: i.tolist() for n, i in graft.indices.items()}


def bits(model):
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def unchanged(model, was):
    return all(
        torch.equal(t.view(-1).view(torch.uint8), was[n].view(-1).view(torch.uint8)) if t.numel() else True
        for n, t in model.state_dict().items()
    )


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def small(seed=0, size=0.3):
    """A net with batch norm, a fine-tuned one, and data that the fine-tuned one labels."""
    torch.manual_seed(seed)
    pre = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    ft = copy.deepcopy(pre)
    with torch.no_grad():
        for p in ft.parameters():
            p += size * torch.randn_like(p)
        x = torch.randn(48, 8)
        y = ft.eval()(x).argmax(1)
    return pre, ft, [(x[i : i + 16], y[i : i + 16]) for i in range(0, 48, 16)]


# --- the update, by hand ---


class Sum(nn.Module):
    """loss = c . w, whose gradient is c whatever the mask is."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))


C = torch.tensor([1.0, 2.0, -4.0, 3.0, -1.0])
DELTA = torch.tensor([5.0, -1.0, 1.0, 0.5, 0.25])  # c * delta = 5, -2, -4, 1.5, -.25: the best two are 2 and 1
START = [9.0, -9.5, -9.0, -9.5, 9.5]  # logits: 0 and 4 are in


def linear(model, batch):
    return (batch * model.w).sum()


def learn_sum(**options):
    pre, ft = Sum([1.0] * 5), Sum((1 + DELTA).tolist())
    return learn_graft(pre, ft, linear, [C], 0.4, start=GraftScores({"w": torch.tensor(START)}), options=options)


def test_the_natural_step_by_hand():
    # the two largest |g * delta| are 5 and 4, the loss at the start 5.75: a step is -lr * 20 * 5.75 / 41 * c * delta
    lr = 0.2 * 41 / 5.75  # which makes that -4 * c * delta
    graft = learn_sum(steps=1, lr=lr)
    want = [9.0 - 20, -9.5 + 8, -9.0 + 16, -9.5 - 6, 9.5 + 1]
    assert graft.scores.values["w"].tolist() == pytest.approx(want, abs=1e-5)  # one float32 rounding near 10: 1e-6
    assert [h["size"] for h in graft.history] == [2, 2] and [h["changed"] for h in graft.history] == [0, 1]
    # c . w: 1 at the start; in are 0 and 4 (5 - .25), then 4 and 2 (-.25 - 4)
    assert [h["loss"] for h in graft.history] == [1 + 4.75, 1 - 4.25]
    assert at(graft) == {"w": [2, 4]} and graft.step == 1
    # the second step moves by the same scale
    again = learn_sum(steps=2, lr=lr)
    want = [9.0 - 40, -9.5 + 16, -9.0 + 32, -9.5 - 12, 9.5 + 2]
    assert again.scores.values["w"].tolist() == pytest.approx(want, abs=1e-5)
    assert at(learn_sum(steps=6, lr=lr)) == {"w": [1, 2]}


@pytest.mark.parametrize("gamma", ["hard", "soft"])
def test_the_plain_step_by_hand(gamma):
    graft = learn_sum(steps=1, lr=1e4, rule="plain", size="free", gamma=gamma)
    slope = [1 / (1 + math.exp(-x)) * (1 - 1 / (1 + math.exp(-x))) for x in START]
    want = [x - 1e4 * float(g) * s for x, g, s in zip(START, C * DELTA, slope, strict=True)]
    # sigmoid(9) is 1 - 1e-4 in float32, whose spacing of 6e-8 is 6e-4 of the slope; measured 3.7e-4
    assert graft.scores.values["w"].tolist() == pytest.approx(want, rel=1e-3)
    start = [1 / (1 + math.exp(-x)) if gamma == "soft" else float(x > 0) for x in START]
    loss = 1 + sum(float(g) * s for g, s in zip(C * DELTA, start, strict=True))
    assert graft.history[0]["loss"] == pytest.approx(loss, abs=1e-5)


def published_logits(pre, ft, loss_fn, batches, base, noise, bias, lr, steps):
    """The paper's procedure as it is written: gamma = b + (1 - 2b) sigmoid(S - bias), the sign-aware step on S."""
    s = {n: x.clone() for n, x in noise.items()}
    delta = {n: ft[n] - pre.get_parameter(n).detach() for n in s}
    for _ in range(steps):
        model = copy.deepcopy(pre).eval()
        with torch.no_grad():
            for n, p in model.named_parameters():
                b = base[n].float()
                p += (b + (1 - 2 * b) * torch.sigmoid(s[n] - bias)) * delta[n]
        torch.stack([loss_fn(model, batch) for batch in batches]).mean().backward()
        for n, p in model.named_parameters():
            b, gate = base[n].float(), torch.sigmoid(s[n] - bias)
            s[n] -= lr * (1 - 2 * b) * p.grad * delta[n] * gate * (1 - gate)
    return {n: (1 - 2 * base[n].float()) * (s[n] - bias) for n in s}


def test_published_is_the_paper_as_it_is_written():
    pre, ft, batches = small()
    base = select_graft(pre, ft, 0.1)
    noise = {n: torch.rand(p.shape, generator=torch.Generator().manual_seed(3)) for n, p in pre.named_parameters()}
    logits = {n: torch.where(base.masks()[n], 10 - x, x - 10) for n, x in noise.items()}
    options = PUBLISHED.changed({"steps": 3, "lr": 1e5, "gamma": "soft"})
    got = learn_graft(pre, ft, loss_of, batches, 0.1, start=GraftScores(logits), options=options)
    want = published_logits(pre, ft.state_dict(), loss_of, batches, base.masks(), noise, 10, 1e5, 3)
    for n in want:
        # sigmoid(10) next to 1 in float32: 6e-8 / 4.5e-5 = 1.3e-3 of the slope, over moves of up to 5; measured 1.6e-2
        assert (got.scores.values[n] - want[n]).abs().max() < 0.05 and (want[n] - logits[n]).abs().max() > 0.05
    gates = {n: torch.round(torch.sigmoid(x)).bool() for n, x in got.scores.values.items()}
    assert got.history[-1]["size"] == sum(int(m.sum()) for m in gates.values())


def test_the_first_logits_are_the_papers():
    pre, ft, batches = small()
    graft = learn_graft(pre, ft, loss_of, batches, 0.1, options={"lr": 1e-12, "steps": 1, "bias": 4.0})
    base = select_graft(pre, ft, 0.1)
    assert at(graft) == at(base)
    for n, m in base.masks().items():
        x = graft.scores.values[n]
        assert bool(((x[m] > 3) & (x[m] <= 4)).all()) and bool(((x[~m] < -3) & (x[~m] >= -4)).all())
    every = torch.cat([x.view(-1) for x in graft.scores.values.values()]).abs()
    assert 3.4 < float(every.mean()) < 3.6 and len(every.unique()) == len(every)


# --- batches ---


@pytest.mark.parametrize("rule", ["natural", "plain"])
def test_many_batches_are_one_large_one(rule):
    """Every example has the same weight, also where batches differ in size."""
    pre, ft, batches = small()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    cut = [0, 20, 27, 48]
    uneven = [(x[a:b], y[a:b]) for a, b in zip(cut, cut[1:], strict=False)]
    options = {"steps": 4, "rule": rule, "lr": 0.5 if rule == "natural" else 1e5}
    whole = learn_graft(pre, ft, loss_of, [(x, y)], 0.1, options=options)
    for split, accumulate in ((batches, None), (uneven, None), (uneven, 3), ([(x, y)], 1)):
        got = learn_graft(pre, ft, loss_of, split, 0.1, options={**options, "accumulate": accumulate})
        assert at(got) == at(whole)
        key = "mask_loss" if accumulate else "loss"
        assert [h[key] for h in got.history] == pytest.approx([h["loss"] for h in whole.history], rel=1e-5)
        worst = max(float((got.scores.values[n] - t).abs().max()) for n, t in whole.scores.values.items())
        assert worst < 2e-4  # logits of up to 60 in float32, summed in another order; measured 4e-5


def test_batches_follow_one_another_and_start_over():
    pre, ft, batches = small()
    seen = []

    def loss(model, batch):
        seen.append(next(i for i, b in enumerate(batches) if b is batch))
        return loss_of(model, batch)

    graft = learn_graft(pre, ft, loss, batches, 0.1, options={"steps": 3, "accumulate": 2})
    # the first two measure each mask, of which there are four; three steps learn from two each
    assert seen == [0, 1, 0, 1, 0, 1, 2, 0, 0, 1, 1, 2, 0, 1] and len(graft.history) == 4
    seen.clear()
    learn_graft(pre, ft, loss, batches, 0.1, options={"steps": 2, "accumulate": 2}, validate=lambda m: 1.0)
    assert seen == [0, 1, 2, 0]


# --- what is kept ---


def test_the_best_by_validation_is_kept_and_the_start_counts():
    pre, ft, batches = small()
    start = select_graft(pre, ft, 0.1)
    told, said = [], iter([0.5, 0.7, 0.6, 0.7, 0.2])
    graft = learn_graft(
        pre, ft, loss_of, batches, 0.1, validate=lambda m: next(said), options={"steps": 4}, on_progress=told.append
    )
    assert graft.step == 1 and [h["validation"] for h in graft.history] == [0.5, 0.7, 0.6, 0.7, 0.2]
    assert told == graft.history and ["loss" in h for h in told] == [True] * 4 + [False]
    assert at(graft) == at(
        learn_graft(pre, ft, loss_of, batches, 0.1, validate=lambda m: 0.0, options={"steps": 1})
    ) or (graft.history[1]["changed"] > 0)
    worse = iter([0.5, 0.4, 0.3])
    kept = learn_graft(pre, ft, loss_of, batches, 0.1, validate=lambda m: next(worse), options={"steps": 2})
    assert kept.step == 0 and at(kept) == at(start)


@pytest.mark.parametrize("kind", EVERY)
def test_validation_sees_the_graft_itself(kind):
    """The model it is given is the pretrained one with the mask applied, hard, and the best mask is what comes back."""
    pre, ft, batches = small()
    seen = []

    def validate(model):
        assert not model.training and not torch.is_grad_enabled()
        seen.append(bits(model))
        return -float(sum(loss_of(model, b) for b in batches))

    plain = copy.deepcopy(pre)
    graft = learn_graft(pre, ft, loss_of, batches, 0.1, validate=validate, options=GraftOptions().changed(EVERY[kind]))
    assert graft.step == max(range(len(graft.history)), key=lambda i: graft.history[i]["validation"])
    applied = graft.apply_to(plain)
    assert unchanged(applied, seen[graft.step])


def test_without_validation_the_lowest_loss_is_kept():
    pre, ft, batches = small()
    graft = learn_graft(pre, ft, loss_of, batches, 0.1, options={"steps": 8, "lr": 2.0})
    losses = [h["loss"] for h in graft.history]
    assert graft.step == losses.index(min(losses)) > 0
    with graft.applied(pre), torch.no_grad():
        assert sum(float(loss_of(pre.eval(), b)) for b in batches) / 3 == pytest.approx(min(losses), rel=1e-6)


@pytest.mark.parametrize("gamma", ["hard", "soft"])
@pytest.mark.parametrize("accumulate", [None, 1])
def test_masks_are_compared_by_their_own_loss_on_the_same_examples(gamma, accumulate):
    pre, ft, batches = small()
    data = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    loader = torch.utils.data.DataLoader(data, 16, shuffle=True)
    calls = []

    def loss(model, batch):
        with torch.no_grad():
            found = float(loss_of(model, batch))
        calls.append((torch.is_grad_enabled(), bits(model), batch, found))
        return loss_of(model, batch)

    options = {"steps": 4, "gamma": gamma, "accumulate": accumulate}
    graft = learn_graft(pre, ft, loss, loader, 0.1, options=options)
    own = gamma == "hard" and accumulate is None
    losses = [h["loss" if own else "mask_loss"] for h in graft.history]
    assert len(losses) == 5 and graft.step == losses.index(min(losses)) > 0
    if own:
        assert all("mask_loss" not in h for h in graft.history) and len(calls) == 5 * 3  # nothing is computed twice
        return
    measured = [call for call in calls if not call[0]]
    size = accumulate or 3
    assert len(measured) == 5 * size
    assert ["loss" in h for h in graft.history] == [True] * 4 + [False]
    for i, value in enumerate(losses):
        part = measured[i * size : (i + 1) * size]
        assert value == pytest.approx(sum(found for *_, found in part) / size, rel=1e-5)  # of float32 sums
        seen = torch.cat([batch[0] for _, _, batch, _ in part])
        first = torch.cat([batch[0] for _, _, batch, _ in measured[:size]])
        assert torch.equal(seen.sort(0).values, first.sort(0).values)
        if i == graft.step:
            assert unchanged(graft.apply_to(pre), part[0][1])


def test_easy_batches_first_do_not_keep_the_start():
    """A first batch of no loss says nothing of the start beside later masks on other batches."""
    pre, ft, batches = small()
    easy = (batches[0][0], 0.05), *((x, 1.0) for x, _ in batches[1:])
    labels = {id(x): y for x, y in batches}

    def loss(model, batch):
        return batch[1] * F.cross_entropy(model(batch[0]), labels[id(batch[0])])

    graft = learn_graft(pre, ft, loss, easy, 0.1, options={"steps": 3, "accumulate": 1})
    steps = [h["loss"] for h in graft.history[:3]]
    assert steps.index(min(steps)) == 0  # the loss on each step's own batch would have kept the start
    assert graft.step > 0 and graft.history[graft.step]["mask_loss"] < graft.history[0]["mask_loss"]


def test_any_seed_and_others_for_each_purpose():
    pre, ft, batches = small()
    still = {"lr": 1e-12, "steps": 1}
    logits = {}
    for seed in (0, 4096, 2**32, 2**45, 2**200):  # to torch's generator 2**32 is 0
        graft = learn_graft(pre, ft, loss_of, batches, 0.1, options={**still, "seed": seed})
        logits[seed] = torch.cat([x.view(-1) for x in graft.scores.values.values()])
    assert len({tuple(x.tolist()) for x in logits.values()}) == 5
    start = learn_graft(pre, ft, loss_of, batches, 0.1, options={**still, "bias": 1.0}).scores.values["0.weight"].abs()
    # S of the start, 1 - |L|, tells nothing of who is among the random ones: correlation of 128, deviation .09
    rule = select_graft(pre, ft, 0.5, "random").masks()["0.weight"].float()
    assert abs(float(torch.corrcoef(torch.stack([1 - start.view(-1), rule.view(-1)]))[0, 1])) < 0.3


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["default", "soft"])
def test_it_learns(kind, seed):
    """At equal size the training loss is far below that of the largest moves; both are below chance's."""
    pre, ft, batches = small(seed)
    loss = {}
    grafts = {by: select_graft(pre, ft, 0.1, by) for by in ("magnitude", "random")}
    grafts["learned"] = learn_graft(pre, ft, loss_of, batches, 0.1, options=EVERY[kind])
    assert len({g.size for g in grafts.values()}) == 1
    for by, graft in grafts.items():
        with torch.no_grad():
            model = graft.apply_to(pre).eval()
            loss[by] = sum(float(loss_of(model, b)) for b in batches) / 3
    assert loss["learned"] < 0.9 * loss["magnitude"] < 0.9 * loss["random"], loss


def test_a_start_of_ones_own():
    pre, ft, batches = small()
    chance = select_graft(pre, ft, 0.1, "random")
    still = {"lr": 1e-12, "steps": 1}
    assert at(learn_graft(pre, ft, loss_of, batches, 0.1, start=chance, options=still)) == at(chance)
    smaller = select_graft(pre, ft, 0.05)
    got = learn_graft(pre, ft, loss_of, batches, 0.1, start=smaller.bits(), options=still)
    assert got.size == 22 and smaller.overlap(got) == smaller.size / 22
    scores = GraftScores({n: torch.randn(p.shape) for n, p in pre.named_parameters()})
    got = learn_graft(pre, ft, loss_of, batches, 0.1, start=scores, options=still)
    assert at(got) == at(scores.graft(0.1))
    free = learn_graft(pre, ft, loss_of, batches, 0.1, start=scores, options={**still, "size": "free"})
    assert at(free) == at(scores.graft(threshold=0.0))


def test_what_comes_back_is_a_graft(tmp_path):
    pre, ft, batches = small()
    graft = learn_graft(pre, ft, loss_of, batches, 0.1, skip="3.*")
    assert isinstance(graft, Graft) and isinstance(graft, LearnedGraft) and "3.weight" not in graft.shapes
    theirs = dict(ft.named_parameters())
    assert all(torch.equal(v, theirs[n].detach().view(-1)[graft.indices[n].long()]) for n, v in graft.values.items())
    assert len(repr(graft)) < 100
    graft.save(tmp_path / "graft.safetensors")
    graft.scores.save(tmp_path / "scores.safetensors")
    assert at(Graft.load(tmp_path / "graft.safetensors")) == at(graft)
    back = GraftScores.load(tmp_path / "scores.safetensors")
    assert all(torch.equal(back.values[n], t) for n, t in graft.scores.values.items())


@pytest.mark.parametrize("kind", EVERY)
def test_a_seed_gives_the_same_bits(kind):
    pre, ft, batches = small()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 16, shuffle=True)
    options = GraftOptions().changed(EVERY[kind]).changed({"accumulate": 2, "steps": 4})
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = learn_graft(pre, ft, loss_of, loader, 0.1, options=options)
    assert torch.equal(state, torch.get_rng_state())  # and the random numbers of the caller are where they were
    torch.manual_seed(6)
    two = learn_graft(pre, ft, loss_of, loader, 0.1, options=options)
    assert at(one) == at(two) and one.history == two.history
    assert all(torch.equal(t, two.scores.values[n]) for n, t in one.scores.values.items())
    other = learn_graft(pre, ft, loss_of, loader, 0.1, options=options.changed({"seed": 1}))
    assert other.history != one.history


# --- the models are lent ---


def resnet():
    return timm.create_model("test_resnet", num_classes=3), (torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))


def bert():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=16, max_position_embeddings=8, num_labels=3)
    tokens = torch.randint(0, 30, (4, 6))
    return transformers.BertForSequenceClassification(config), {
        "input_ids": tokens,
        "labels": torch.tensor([0, 1, 2, 0]),
    }


def tied():
    return Tied(), (torch.randint(0, 7, (6,)), torch.randint(0, 7, (6,)))


def half():
    model, (x, y) = tied()
    return model.bfloat16(), (x, y)


def loss_of_any(model, batch):
    return model(**batch).loss if isinstance(batch, dict) else F.cross_entropy(model(batch[0]).float(), batch[1])


MODELS = {"resnet": resnet, "bert": bert, "tied": tied, "half": half}


@pytest.mark.parametrize(
    ("name", "kind"), [*(("tied", kind) for kind in EVERY), *((m, k) for m in MODELS for k in ("default", "published"))]
)
def test_everything_lent_comes_back(name, kind):
    torch.manual_seed(0)
    pre, batch = MODELS[name]()
    ft = moved(pre, size=0.05)
    pre.train()
    parameters = list(pre.parameters())
    parameters[0].requires_grad_(False)
    kept = parameters[1].grad = torch.ones_like(parameters[1])
    modes, was, theirs = [m.training for m in pre.modules()], bits(pre), bits(ft)

    def loss(model, batch):
        model.train()  # running statistics move, and are put back
        return loss_of_any(model, batch)

    options = GraftOptions().changed(EVERY[kind]).changed({"steps": 1})
    graft = learn_graft(pre, ft, loss, [batch], 0.02, options=options)
    broken = iter([1.0, math.nan])

    def fails(model, batch):
        return loss(model, batch) * next(broken)

    with pytest.raises(NonFiniteLossError):
        learn_graft(pre, ft, fails, [batch], 0.02, options=options)
    assert unchanged(pre, was) and unchanged(ft, theirs)
    assert [m.training for m in pre.modules()] == modes
    assert [p.requires_grad for p in parameters] == [False] + [True] * (len(parameters) - 1)
    assert parameters[1].grad is kept and bool((kept == 1).all())
    assert all(p.grad is None for p in parameters if p is not parameters[1])
    assert not any(p._post_accumulate_grad_hooks for p in parameters)
    with graft.applied(pre):
        pass
    assert unchanged(pre, was)


@pytest.mark.parametrize("gamma", ["hard", "soft"])
def test_without_putting_back_the_bits_are_lost(monkeypatch, gamma):
    """The twin of the test above."""
    pre, ft, batches = small()
    was = bits(pre)
    monkeypatch.setattr(learned.HardWeights if gamma == "hard" else learned.SoftWeights, "close", lambda self: None)
    learn_graft(pre, ft, loss_of, batches, 0.1, options={"gamma": gamma})
    assert not unchanged(pre, was)


def test_gradients_do_not_gather():
    """When a gradient arrives no other one is there: the memory of one tensor's at a time."""
    pre, ft, batches = small()
    alive = []
    inner = learned._Learner._take

    def take(self, name, p):
        alive.append(sum(q.grad is not None for q in pre.parameters()))
        inner(self, name, p)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learned._Learner, "_take", take)
        learn_graft(pre, ft, loss_of, batches, 0.1, options={"steps": 1})
    assert len(alive) == 3 * 6 and set(alive) == {1}


def test_only_what_takes_part_has_gradients():
    pre, ft, batches = small()

    def loss(model, batch):
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["3.weight", "3.bias"]
        return loss_of(model, batch)

    learn_graft(pre, ft, loss, batches, 0.1, only="3.*")


def test_parameters_that_share_memory_count_together():
    """Two parameters over the same elements: both gradients move the logits."""

    class Twice(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.a = nn.Parameter(torch.full((4,), value))
            self.b = nn.Parameter(self.a.data)

    def loss(model, batch):
        return (batch * model.a).sum() + (torch.tensor([0.0, 0.0, 0.0, -9.0]) * model.b).sum()

    graft = learn_graft(Twice(0.0), Twice(1.0), loss, [torch.tensor([0.0, 1.0, -2.0, 4.0])], 0.25, options={"lr": 3.0})
    assert at(graft) == {"a": [3]}  # 4 - 9 is the lowest; without b it would be the highest


def test_the_fine_tuned_one_may_be_a_file(tmp_path):
    pre, ft, batches = small()
    want = learn_graft(pre, ft, loss_of, batches, 0.1)
    options = {"skip": []}
    for source in (save(ft, tmp_path / "ft.safetensors"), ft.state_dict()):
        got = learn_graft(pre, source, loss_of, batches, 0.1, **options)
        assert at(got) == at(want) and got.history == want.history


def test_weights_in_another_memory_order():
    torch.manual_seed(0)
    pre = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    ft = moved(pre, size=0.3)
    batches = [(torch.randn(6, 3, 5, 5), torch.tensor([0, 1, 2, 0, 1, 2]))]
    want = learn_graft(pre, ft, loss_of, batches, 0.1)
    turned = copy.deepcopy(pre).to(memory_format=torch.channels_last)
    assert not turned[0].weight.is_contiguous()
    was = bits(turned)
    for kind in ("default", "soft"):
        got = learn_graft(turned, ft, loss_of, batches, 0.1, options=EVERY[kind])
        assert all(torch.equal(t, was[n]) for n, t in turned.state_dict().items())
        assert kind == "soft" or (at(got) == at(want) and got.history[-1]["loss"] < got.history[0]["loss"])


def test_sparse_gradients():
    class Words(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            self.words = nn.Embedding(7, 4, sparse=sparse)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.words(x))

    torch.manual_seed(0)
    dense, sparse = Words(False), Words(True)
    sparse.load_state_dict(dense.state_dict())
    batches = [(torch.randint(0, 7, (9,)), torch.randint(0, 3, (9,)))]
    one, two = (learn_graft(m, moved(dense), loss_of, batches, 0.2) for m in (dense, sparse))
    assert at(one) == at(two) and one.history == two.history


# --- top ---


@given(st.integers(0, 10**6), st.integers(1, 4000), st.sampled_from(["even", "ties", "steps"]))
@settings(max_examples=40, deadline=None)
def test_top_is_highest(seed, k, kind):
    g = torch.Generator().manual_seed(seed)
    values = {n: torch.randn(s, generator=g) for n, s in {"b": (40, 50), "a": (1999,), "c": (3,), "d": (0,)}.items()}
    if kind == "ties":
        values = {n: x.sign() for n, x in values.items()}
    if kind == "steps":
        values = {n: x + 20 * (x > 2) for n, x in values.items()}
    got, want = top(values, k), highest(values, k)
    assert sum(len(i) for i in got.values()) == k
    for n, m in want.items():
        assert got.get(n, torch.zeros(0)).tolist() == m.view(-1).nonzero().view(-1).tolist()


# --- bad input ---


def test_what_is_refused():
    pre, ft, batches = small()
    was = bits(pre)

    def go(*args, **options):
        full = [pre, ft, loss_of, batches, 0.1]
        full[: len(args)] = args
        return lambda: learn_graft(*full, **options)

    refused(GraftError, go(pre.state_dict()), "pretrained: got OrderedDict", "module to compute with")
    refused(GraftError, go(pre, pre), "equal in all 6 participating tensors")
    refused(GraftError, go(pre, nn.Linear(2, 2)), "differ in")
    refused(GraftError, go(pre, ft, loss_of, batches, 1e-4), "selects none")
    refused(GraftError, go(pre, ft, loss_of, batches, 1.0), "selects all")
    broken = copy.deepcopy(ft)
    broken[0].bias.data[2] = math.nan
    refused(GraftError, go(pre, broken), "0.bias: the difference of 1 of 16")
    other = select_graft(pre, ft, 0.1, only="0.*")
    refused(GraftError, go(start=other), "start: 1.weight is no part of it in the start and [16] among", "only=")
    refused(GraftError, go(start=other, only="3.*"), "start: 3.weight")
    refused(ConfigError, go(pre, ft, loss_of, []), "batches: there are none")
    refused(ConfigError, go(pre, ft, loss_of, iter(batches)), "batches: got list_iterator", "iterated in every epoch")
    refused(ConfigError, go(options={"learning_rate": 1.0}), "GraftOptions has no option 'learning_rate'")
    refused(ConfigError, go(only="4.*"), "only: '4.*' matches none")
    refused(GraftError, go(pre, ft, lambda m, b: 1.0), "loss_fn: returned float", "scalar")
    refused(GraftError, go(pre, ft, lambda m, b: m(b[0])), "loss_fn: returned a tensor of shape [16, 3]")
    refused(GraftError, go(pre, ft, lambda m, b: loss_of(m, b).detach()), "loss_fn: returned a tensor of shape []")
    free = torch.ones((), requires_grad=True)
    refused(
        GraftError, go(pre, ft, lambda m, b: free * 1), "no gradient for any of the 6 participating tensors", "only="
    )
    refused(NonFiniteLossError, go(pre, ft, lambda m, b: loss_of(m, b) * math.inf), "step 0: the loss is inf")
    constant = go(pre, ft, lambda m, b: loss_of(m, b) * 0)
    text = "the squares of the first step's gradients sum up to 0, expected a number above 0"
    refused(NonFiniteLossError, constant, text, "Is the loss constant")
    below = GraftScores({n: -torch.ones_like(p) for n, p in pre.named_parameters()})
    empty = go(start=below, options={"size": "free", "lr": 1e-9})
    refused(GraftError, empty, "every mask has either all 227 elements or none", "size='fixed'")
    refused(NonFiniteLossError, go(validate=lambda m: math.nan), "step 0: the validation is nan")
    assert unchanged(pre, was)


def test_gradients_that_overflow_are_refused():
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * math.inf

    pre, ft, batches = small()
    calls = iter([False, True])

    def loss(model, batch):
        out = loss_of(model, batch)
        return Overflow.apply(out) if next(calls) else out

    was = bits(pre)
    call = lambda: learn_graft(pre, ft, loss, batches[:1], 0.1, options={"steps": 2})  # noqa: E731
    refused(NonFiniteLossError, call, "step 1: the gradient of", "lower lr")
    assert unchanged(pre, was)
