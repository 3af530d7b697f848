"""Unsupervised FixMatch: its parts by hand, and that no label is used."""

from __future__ import annotations

import atlas_parts as parts
import pytest
import torch
from torch.nn import functional as tf
from torch.utils.data import TensorDataset

import hatcl
from hatcl import ConfigError
from hatcl.atlas import adapt, random_crops
from hatcl.atlas.adaptation import Unlabelled, trusted, two_streams, ufm_loss

FAST = {"epochs": 2}


def noise(x):
    return x + 0.2 * torch.randn_like(x)


def composer():
    base, vectors = parts.world()
    return hatcl.compose(base, vectors[:2])


# ---- its parts -------------------------------------------------------------------------------------------------


def test_trusted_are_the_likeliest_of_each_class_among_all():
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.55, 0.45], [0.7, 0.3]])
    ids, labels, rest = trusted(p)  # k = max(1, min(5 / 20, 100)) = 1; nothing is put into the second class
    assert (ids.tolist(), labels.tolist(), rest.tolist()) == ([0, 3], [0, 0], [1, 2, 4])
    ids, labels, rest = trusted(p, per_class=3)  # 0, 2, 4 and 3, 1, 4: one of them twice, kept once
    assert (ids.tolist(), labels.tolist(), rest.tolist()) == ([0, 1, 2, 3, 4], [0] * 5, [])
    many = torch.rand(4000, 2).softmax(-1)
    assert len(trusted(many)[0]) == 200  # k = 100 of the likeliest of each, which are other examples
    assert len(trusted(many[:100])[0]) == 10  # k = 5
    assert len(trusted(torch.eye(3)[:1])[0]) == 1  # fewer examples than classes


def test_a_quarter_of_each_batch_is_trusted_and_the_others_come_once():
    ids, labels, rest = torch.arange(5), torch.tensor([0, 1, 2, 3, 4]), torch.arange(5, 41)
    steps = two_streams(ids, labels, rest, 16, 0.9)
    assert len(steps) == 3
    for step in steps:
        of_trusted = step.labels >= 0
        assert int(of_trusted.sum()) == 4 and len(step.ids) == 16
        assert torch.equal(labels[step.ids[of_trusted]], step.labels[of_trusted])
    others = torch.cat([s.ids[s.labels < 0] for s in steps])
    assert sorted(others.tolist()) == rest.tolist()
    all_trusted = two_streams(ids, labels, torch.arange(0), 4, 0.9)
    assert sorted(torch.cat([s.ids for s in all_trusted]).tolist()) == ids.tolist()


def test_the_loss_by_hand():
    logits = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
    weak = torch.tensor([[0.5, 0.5], [0.01, 0.99], [0.2, 0.8]])
    labels = torch.tensor([1, -1, -1])
    # first: trusted, hard label 1. second: q = sqrt(p) / sum = [0.1, 0.99499] / 1.09499, above 0.9.
    # third: max q = sqrt(0.8) / (sqrt(0.2) + sqrt(0.8)) = 2/3: left out.
    q = torch.tensor([0.1, 0.99**0.5])
    q = q / q.sum()
    log = logits.log_softmax(-1)
    want = (-log[0, 1] - (q * log[1]).sum()) / 2
    torch.testing.assert_close(ufm_loss(logits, weak, labels, 0.9), want)
    assert ufm_loss(logits, weak, torch.full((3,), -1), 0.99) == 0  # nothing counts


def test_crops_keep_shape_and_values_and_mirror_half():
    torch.manual_seed(0)
    x = torch.arange(64.0).view(1, 1, 8, 8).expand(200, 1, 8, 8)
    out = random_crops(x)
    assert out.shape == x.shape and out.min() >= 0 and out.max() <= 63
    mirrored = (out[:, 0, 4, 0] > out[:, 0, 4, -1]).float().mean()
    assert 0.35 < mirrored < 0.65
    straight = random_crops(x, flip=False)
    assert bool((straight[:, 0, 4, 0] < straight[:, 0, 4, -1]).all())
    whole = random_crops(x[:2], smallest=1.0, flip=False)
    torch.testing.assert_close(whole, x[:2], rtol=0, atol=1e-4)  # bilinear at the pixels; measured 0


def test_examples_come_from_tensors_mappings_and_data_sets_without_their_labels():
    x, y = torch.randn(6, 3), torch.arange(6)
    at = torch.tensor([4, 1])
    for source in (x, TensorDataset(x, y), [(row, "label") for row in x], list(x)):
        assert torch.equal(Unlabelled(source).take(at), x[at]) and len(Unlabelled(source)) == 6
    assert torch.equal(Unlabelled({"a": x, "b": y}).take(at)["b"], y[at])
    for wrong in (iter(x), [], {}, 3):
        with pytest.raises(ConfigError, match="examples: got .*expected a tensor, a mapping of tensors or a data set"):
            Unlabelled(wrong)


# ---- adapt -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["ufm", "entropy"])
def test_labels_are_not_used(objective):
    """Labels replaced by garbage, and no labels at all, give the same coefficients, bit for bit."""
    x, y = parts.view("turned", "test")
    out = []
    for examples in (TensorDataset(x, y), TensorDataset(x, torch.randint(-99, 99, y.shape)), x):
        which = composer()
        adapt(which, examples, strong=noise if objective == "ufm" else None, objective=objective, options=FAST)
        out.append(which.coefficients.detach())
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2]) and bool(out[0].any())


def test_the_weak_view_teaches_the_strong_one():
    """The gradient goes through the strong view alone, with targets and threshold of the first epoch: one step of
    everything by hand."""
    x = parts.view("turned", "test")[0][:80]
    which = composer()
    fitted = adapt(which, x, weak=lambda x: x + 0.1, strong=lambda x: x * 0.9, options={"epochs": 1, "lr": 1e-9},
                   batch_size=400)  # fmt: skip
    base, _ = parts.world()
    with torch.no_grad():
        p = base(x + 0.1).softmax(-1)
    ids, labels, rest = trusted(p)
    torch.manual_seed(0)
    [step] = two_streams(ids, labels, rest, 400, 0.9)
    want = ufm_loss(base(x[step.ids] * 0.9), p[step.ids], step.labels, 0.9)
    assert fitted.history[0]["loss"] == pytest.approx(float(want), abs=1e-5)  # float32; measured 0


def test_the_threshold_goes_from_09_towards_1(monkeypatch):
    seen = []

    def watched(logits, weak, labels, threshold):
        seen.append(threshold)
        return tf.cross_entropy(logits, labels.clamp(min=0))

    monkeypatch.setattr("hatcl.atlas.adaptation.ufm_loss", watched)
    adapt(composer(), parts.view("turned", "test")[0][:100], options={"epochs": 4}, batch_size=400)
    assert seen == pytest.approx([0.9, 0.925, 0.95, 0.975])


def test_the_trusted_set_is_estimated_again_in_each_epoch(monkeypatch):
    seen = []

    def watched(p, per_class=None):
        seen.append(p.clone())
        return trusted(p, per_class)

    monkeypatch.setattr("hatcl.atlas.adaptation.trusted", watched)
    adapt(composer(), parts.view("turned", "test")[0][:100], options={"epochs": 2, "lr": 0.1})
    assert len(seen) == 2 and not torch.equal(*seen)


def test_the_last_epoch_is_kept_as_nothing_may_choose():
    which = composer()
    fitted = adapt(which, parts.view("turned", "test")[0], options=FAST)
    assert fitted.epoch == 2 and torch.equal(fitted.coefficients, which.coefficients) and not fitted.pretrained


def test_it_resumes(tmp_path):
    class Stop(Exception):
        pass

    def stop(at):
        if at.doing == "epoch":
            raise Stop

    x = parts.view("turned", "test")[0][:200]
    want = adapt(composer(), x, strong=noise, options=FAST).coefficients
    path = tmp_path / "a.pt"
    with pytest.raises(Stop):
        adapt(composer(), x, strong=noise, options=FAST, checkpoint=path, on_progress=stop)
    assert torch.equal(adapt(composer(), x, strong=noise, options=FAST, checkpoint=path).coefficients, want)


def test_what_is_missing_is_named():
    which, x = composer(), parts.view("turned", "test")[0]
    with pytest.raises(ConfigError, match="objective: got 'ufn', expected one of ufm, entropy"):
        adapt(which, x, objective="ufn")
    with pytest.raises(ConfigError, match="batch_size: got 3, expected at least 4"):
        adapt(which, x, batch_size=3)
    with pytest.raises(ConfigError, match="per_class: got 0"):
        adapt(which, x, per_class=0)
    with pytest.raises(ConfigError, match="strong: the inputs are not images"):
        adapt(which, torch.randn(5, 3))


@pytest.mark.parametrize("given", [{"strong": noise}, {"weak": noise}, {"per_class": 1}], ids=lambda given: [*given][0])
def test_what_has_no_effect_is_refused(given):
    with pytest.raises(
        ConfigError, match=f"{[*given][0]}: has no effect with objective='entropy'; pass 'ufm', or leave"
    ):
        adapt(composer(), torch.zeros(4, 3), objective="entropy", options=FAST, **given)
