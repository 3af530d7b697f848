"""Tip-Adapter and LP++ against their formulas, and what they add."""

from __future__ import annotations

import atlas_parts as parts
import pytest
import torch
from torch import nn
from torch.nn import functional as tf

import hatcl
from hatcl import ConfigError
from hatcl.atlas import TipAdapter, accuracy, encoder, lp_plus_plus, prototypes, sample_shots, tip_adapter
from hatcl.atlas.caches import LPPlusPlus, gather


def world():
    """A composer over embeddings, a frozen head, shots of the turned view, and its validation."""
    base, vectors = parts.world()
    net = encoder(base)
    composer = hatcl.compose(net, [vectors[0], vectors[2]])
    x, y = parts.view("turned", "train")
    ids = sample_shots(y, 8)
    shots = parts.batches(x[ids], y[ids], 40)
    return composer, prototypes(net, shots, scale=10.0), shots, parts.batches(*parts.view("turned", "val"))


def test_the_cache_by_hand():
    features = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    adapter = TipAdapter(features, torch.tensor([1, 0]), 3, alpha=2.0, beta=0.5)
    f = torch.tensor([[5.0, 0.0]])
    # affinities 1 and 0: 2 exp(0) for class 1, 2 exp(-0.5) for class 0
    want = torch.tensor([[10 + 2 * 0.6065306597, 2.0, 0.0]])
    torch.testing.assert_close(adapter(f, torch.tensor([[10.0, 0.0, 0.0]])).detach(), want)
    assert {n for n, _ in adapter.named_parameters()} == {"keys", "alpha", "beta"}


def test_coefficients_and_cache_are_learned_together():
    composer, head, shots, validation = world()
    start = tip_adapter(composer, shots, head=head, options={"epochs": 1, "lr": 1e-9}, keys_lr=1e-12, steps=1)[1]
    before = {n: p.detach().clone() for n, p in start.adapter.named_parameters()}
    composer.coefficients.data.zero_()
    fitted, cached = tip_adapter(composer, shots, validation, head=head, options={"epochs": 3})
    assert fitted.coefficients.abs().max() > 0 and fitted.epoch > 0
    for name, p in cached.adapter.named_parameters():
        assert (p - before[name]).abs().max() > 1e-4 and torch.equal(fitted.others[name], p)
    assert accuracy(composer, validation, cached) == fitted.score > accuracy(composer.merge(), validation, head)
    assert not any(p.requires_grad for p in cached.parameters())


def test_the_gradient_reaches_the_coefficients_through_the_cache_too():
    composer, _, shots, _ = world()
    features, labels = gather(composer, shots)
    adapter = TipAdapter(features, labels, 10)
    x, y = shots[0]
    tf.cross_entropy(adapter(composer(x), torch.zeros(len(x), 10)), y).backward()
    assert composer.coefficients.grad.abs().max() > 0


def test_an_interrupted_tip_adapter_goes_on(tmp_path):
    class Stop(Exception):
        pass

    def stop(at):
        if at.doing == "epoch":
            raise Stop

    out = []
    for path in (None, tmp_path / "a.pt"):
        composer, head, shots, _ = world()
        with pytest.MonkeyPatch.context():
            if path is not None:
                with pytest.raises(Stop):
                    tip_adapter(composer, shots, head=head, options={"epochs": 2}, checkpoint=path, on_progress=stop)
        composer, head, shots, _ = world()
        fitted, cached = tip_adapter(composer, shots, head=head, options={"epochs": 2}, checkpoint=path)
        out.append([fitted.coefficients, *(p.detach() for p in cached.adapter.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*out, strict=True))


class Shuffled:
    """Batches in an order that torch's generator draws for each pass, as a DataLoader's."""

    def __init__(self, batches):
        self.x, self.y = (torch.cat(t) for t in zip(*batches, strict=True))

    def __len__(self):
        return 2

    def __iter__(self):
        for ids in torch.randperm(len(self.y)).chunk(2):
            yield self.x[ids], self.y[ids]


def test_keys_of_a_checkpoint_meet_their_own_labels_again(tmp_path):
    composer, head, shots, validation = world()
    path = tmp_path / "tip.pt"
    options = {"epochs": 2}
    before = torch.get_rng_state()
    _, cached = tip_adapter(composer, Shuffled(shots), validation, head=head, options=options, checkpoint=path)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)  # another process stands elsewhere in its random numbers
    again = tip_adapter(world()[0], Shuffled(shots), validation, head=head, options=options, checkpoint=path)[1]
    assert torch.equal(again.adapter.keys, cached.adapter.keys)
    assert torch.equal(again.adapter.values, cached.adapter.values)


def test_a_warm_start_makes_the_cache():
    composer, head, shots, _ = world()
    warm = torch.tensor([0.5, 0.25])
    options = {"epochs": 1, "lr": 1e-12, "weight_decay": 0.0}
    fitted, cached = tip_adapter(composer, shots, head=head, options=options, keys_lr=1e-12, steps=1, warm_start=warm)
    other, *_ = world()
    other.coefficients.data.copy_(fitted.coefficients)
    # the learning rate is too small to move anything that float32 can tell
    assert torch.equal(cached.adapter.keys, tf.normalize(gather(other, shots)[0], dim=-1))


def blobs(scale=1.0):
    """Features around three directions, six of each."""
    torch.manual_seed(0)
    y = torch.arange(3).repeat(6)
    return torch.eye(3, 5)[y] + scale * torch.randn(18, 5), y


class Give(nn.Module):
    def forward(self, x):
        return x


def test_lp_plus_plus_starts_as_its_paper_says():
    f, y = blobs()
    t = tf.normalize(torch.randn(3, 5), dim=-1)
    head = lp_plus_plus(Give(), [(f, y)], 3 * t, iterations=0)
    f = tf.normalize(f, dim=-1)
    for c in range(3):
        torch.testing.assert_close(head.weight[c], f[y == c].sum(0))
    want = 250 * torch.stack([(f[y == c] @ t[c]).mean() for c in range(3)]).mean()
    torch.testing.assert_close(head.alpha, want.expand(3))
    torch.testing.assert_close(head(f), f @ (head.weight + head.alpha[:, None] * t).T)


def test_lp_plus_plus_steps_are_autograds_with_the_step_sizes_of_the_data():
    f, y = blobs()
    t = tf.normalize(torch.randn(3, 5), dim=-1)
    start = lp_plus_plus(Give(), [(f, y)], t, iterations=0)
    unit = tf.normalize(f, dim=-1)
    w, a = start.weight.clone().requires_grad_(True), start.alpha.clone().requires_grad_(True)
    size = 4 * 18 / torch.linalg.eigvalsh(unit.T @ unit).max()
    moved = torch.zeros_like(w)
    for k in range(10):
        w.grad = a.grad = None
        tf.cross_entropy(unit @ w.T + a * (unit @ t.T), y).backward()
        moved = 0.9 * moved + w.grad
        w.data -= size * moved
        if k == 9:
            a.data -= 18 / (4 * (unit @ t.T).square().sum(0).max()) * a.grad
    got = lp_plus_plus(Give(), [(f, y)], t, iterations=10)
    torch.testing.assert_close(got.weight, w.detach(), rtol=1e-4, atol=1e-4)  # measured 5e-6 of 37
    torch.testing.assert_close(got.alpha, a.detach(), rtol=1e-5, atol=1e-5)


def test_lp_plus_plus_learns_and_keeps_the_best_of_validation():
    composer, head, shots, validation = world()
    weights = head.get_buffer("weight")
    learned = lp_plus_plus(composer, shots, weights, validation)
    plain = accuracy(composer, validation, head)
    assert accuracy(composer, validation, learned) >= plain
    assert accuracy(composer, shots, learned) > accuracy(composer, shots, head)
    assert accuracy(composer, validation, learned) >= accuracy(
        composer, validation, lp_plus_plus(composer, shots, weights)
    )
    assert isinstance(learned, LPPlusPlus) and not list(learned.parameters())


def test_what_does_not_fit_is_named():
    composer, head, shots, _ = world()
    with pytest.raises(ConfigError, match="labels: up to 10, the head gives 10 classes"):
        tip_adapter(composer, [(shots[0][0], shots[0][1] + 1 + 0 * (9 - shots[0][1].max()))], head=head)
    with pytest.raises(ConfigError, match=r"embeddings: got \[10, 3\], expected \[classes, 32\]"):
        lp_plus_plus(composer, shots, torch.ones(10, 3))
    with pytest.raises(ConfigError, match="class 10 has no shots; LP"):
        lp_plus_plus(composer, shots, torch.ones(11, 32))
    with pytest.raises(ConfigError, match=r"batches: there are none; pass a list"):
        gather(composer, [])
    with pytest.raises(ConfigError, match=r"the model gives shape \[2, 3, 4\], expected embeddings \[batch, d\]"):
        gather(Give(), [(torch.ones(2, 3, 4), torch.ones(2))])
    assert not composer.coefficients.any()
