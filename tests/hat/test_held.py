"""What a model consists of: to whom it belongs, and that it is still what was converted."""

from __future__ import annotations

import parts
import pytest
import torch
from border_parts import X, adamw, learned, out, train
from torch import nn

import hatcl
from hatcl.functional import same_bits
from hatcl.hat.held import check_structure


def test_a_replaced_module_is_refused_by_name():
    x = torch.randn(2, 3, 16, 16)
    model = hatcl.convert(parts.vit(), 2, x)
    model.reset_classifier(2)
    with pytest.raises(hatcl.HATError, match="head: the module that hatcl.convert bound to its gates is no longer"):
        with hatcl.learn(model, 0, adamw(model), steps=1):
            pass


def test_a_module_replaced_inside_the_block_or_after_it():
    model, want = learned()
    optimizer = adamw(model)
    with pytest.raises(hatcl.HATError, match="3: the module that hatcl.convert bound"):
        with hatcl.learn(model, 1, optimizer, steps=1):
            model[3] = nn.Linear(24, 24)
    assert hatcl.tasks(model) == [0] and model.hat_gates.learning is None
    with pytest.raises(hatcl.HATError, match="3: the module that hatcl.convert bound"):
        hatcl.certify(model, X)


def test_another_shape_is_refused_by_name():
    model, _ = learned()
    model[0]._parameters["weight"] = nn.Parameter(torch.randn(24, 9))
    with pytest.raises(hatcl.HATError, match=r"0.weight: it has shape \[24, 9\], hatcl.convert mapped \[24, 8\]"):
        check_structure(model)


def test_a_parametrized_weight_is_refused_by_name():
    model, _ = learned()
    hatcl.set_task(model, None)
    del model[3]._parameters["weight"]
    with pytest.raises(hatcl.HATError, match="3.weight: the parameter that hatcl.convert mapped is no longer there"):
        check_structure(model)


def test_wrapping_is_allowed():
    model, want = learned()
    train(nn.Sequential(torch.compile(model, backend="eager")), 1, adamw(model), steps=3)
    assert same_bits(out(model, 0), want) and hatcl.tasks(model) == [0, 1]
