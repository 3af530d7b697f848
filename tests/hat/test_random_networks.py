"""What must hold for every model, on random networks: without a task it is the source; two tasks are learned, the
certificate is exact and the first task stays as it was."""

from __future__ import annotations

import dataclasses
import functools
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from random_networks import IMAGE_BLOCKS, NORMS_1D, NORMS_2D, TOKEN_BLOCKS, Network, specs
from torch.nn import functional as tf

import hatcl
from hatcl.hat.layers.gated import HATLayer
from hatcl.map.coupling import Coupling
from hatcl.map.rules import pointwise
from hatcl.zoo.proof import PROOF_CONFIG

EXAMPLES = int(os.environ.get("HATCL_EXAMPLES", "120"))


def hold(spec):
    source = Network(spec)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(4) % 3
    model = hatcl.convert(source, None, x, config=PROOF_CONFIG)
    for training in (True, False):
        assert torch.equal(source.train(training)(x), model.train(training)(x))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    sealed = []
    for t in range(2):
        with hatcl.learn(model, t, optimizer, steps=3) as learning:
            model.train()
            for _ in range(3):
                optimizer.zero_grad()
                (tf.cross_entropy(model(x), y) + learning.penalty()).backward()
                optimizer.step()
        with hatcl.task(model, t), torch.no_grad():
            sealed.append(model.eval()(x))
    with hatcl.task(model, 0), torch.no_grad():
        assert torch.equal(sealed[0], model(x))
    certificate = hatcl.certify(model, x)
    assert certificate.exact, certificate
    return model


@pytest.mark.filterwarnings("ignore:task . uses no unit")
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(spec=specs())
def test_random_networks(spec):
    hold(spec)


def block(name, norm="none", act="gelu"):
    return (name, 8, norm, act)


@pytest.mark.filterwarnings("ignore:task . uses no unit")
@pytest.mark.parametrize(
    ("images", "tokens"),
    [
        *(([block(name, "batch")], []) for name in IMAGE_BLOCKS),
        *(([block(name, "none", "sigmoid")], []) for name in IMAGE_BLOCKS),
        *(([], [block(name, "layer")]) for name in TOKEN_BLOCKS),
        *(([], [block(name, "none", "softplus"), block("linear", "rms")]) for name in TOKEN_BLOCKS),
        *(([block("residual", norm)], []) for norm in NORMS_2D),
        *(([], [block("mlp", norm)]) for norm in NORMS_1D),
    ],
    ids=lambda part: "-".join(f"{name}:{norm}:{act}" for name, _, norm, act in part) or "none",
)
def test_every_block(images, tokens):
    model = hold({"width": 8, "images": images, "tokens": tokens, "pool": "mean", "seed": 0})
    copies = hatcl.describe(model).copies
    assert "the attack got out through it" not in copies.values(), copies  # the trace itself has to follow these


# ---- twins: a trace that is wrong, and nobody who looks -----------------------------------------------


def spec(images=(), tokens=()):
    return {"width": 8, "images": list(images), "tokens": list(tokens), "pool": "mean", "seed": 0}


def read_backwards(self, p, inputs, plain=Coupling.read):
    plain(self, p, [dataclasses.replace(x, ids=x.ids.flip(-1)) for x in inputs])


WRONG = {
    "no gate acts": (Coupling, "commit", lambda self, shadow: None, spec([block("conv")])),
    "whatever was zero stays zero": (
        pointwise, "_stays_zero", lambda *args: True, spec([block("conv", "none", "sigmoid"), block("conv")]),
    ),
    "units are read in the wrong order": (Coupling, "read", read_backwards, spec([block("conv")])),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:task . uses no unit")
@pytest.mark.parametrize("name", WRONG)
def test_twin_a_wrong_trace_that_nobody_verifies_fails(name, monkeypatch):
    where, verb, wrong, network = WRONG[name]
    hold(network)
    monkeypatch.setattr(where, verb, wrong)
    hold(network)  # the attack at conversion turns what leaks into copies
    monkeypatch.setattr(hatcl, "convert", functools.partial(hatcl.convert, verify=False))
    monkeypatch.setattr(HATLayer, "_hat_cut", HATLayer._hat_by_folds)  # or nothing foreign is ever computed with
    with pytest.raises(AssertionError):
        hold(network)
