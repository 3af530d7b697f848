"""Coefficients predicted from features: the same gradients as by the chain rule, and they learn."""

from __future__ import annotations

import atlas_parts as parts
import pytest
import torch
from torch.nn import functional as tf

import hatcl
from hatcl import ConfigError
from hatcl.atlas import Predicted, accuracy, encoder, learn_predictor


def world():
    base, vectors = parts.world()
    composer = hatcl.compose(base, vectors)
    return base, composer, encoder(base), parts.task("turned").batches


def test_at_first_it_is_the_pretrained_model():
    base, composer, features, batches = world()
    model = Predicted(composer, features, 32)
    with torch.no_grad():
        assert torch.equal(model(batches[0][0]), base(batches[0][0]))


def test_its_gradient_is_the_chain_rules():
    _, _, composer = parts.tiny()
    x, y = parts.tiny_batches(1)[0]
    model = Predicted(composer, lambda x: x, 3)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.weight, std=0.3)
    tf.cross_entropy(model(x), y).backward()
    composer.coefficients.data = model.predict(x).detach()
    tf.cross_entropy(composer(x), y).backward()
    by_lambda = composer.coefficients.grad.reshape(-1)
    torch.testing.assert_close(model.bias.grad, by_lambda)
    torch.testing.assert_close(model.weight.grad, by_lambda[:, None] * x.mean(0))


@pytest.mark.parametrize("objective", ["cross_entropy", "entropy"])
def test_it_learns(objective):
    _, composer, features, batches = world()
    data = batches if objective == "cross_entropy" else [x for x, _ in batches]
    before = composer.coefficients.detach().clone()
    validation = None if objective == "entropy" else batches
    options = {"lr": 5e-3, "epochs": 3}
    model = learn_predictor(composer, features, data, validation, objective=objective, options=options)
    assert torch.equal(composer.coefficients, before)  # the composer's own are not used
    assert model.weight.abs().max() > 0
    if validation is not None:
        assert accuracy(model, batches) > accuracy(composer, batches)
    assert not torch.equal(model.predict(batches[0][0]), model.predict(batches[1][0]))


def test_what_does_not_fit_is_named():
    _, composer, features, batches = world()
    with pytest.raises(ConfigError, match="objective: got 'mse', expected one of cross_entropy, entropy"):
        learn_predictor(composer, features, batches, objective="mse")
    with pytest.raises(ConfigError, match="batches: there are none"):
        learn_predictor(composer, features, [])
    with pytest.raises(ConfigError, match=r"features: gave shape \[100, 1, 8, 8\], expected \[batch, d\]"):
        learn_predictor(composer, lambda x: x, batches)
