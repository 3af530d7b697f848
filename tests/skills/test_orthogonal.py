"""TaSL's orthogonality regulariser: by hand, its gradient and its minimum."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import nn

from hatcl.errors import SkillError
from hatcl.skills import orthogonal as module
from hatcl.skills.orthogonal import orthogonality
from hatcl.skills.tensors import skill_tensors

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc, self.conv = nn.Embedding(11, 6), nn.Linear(3, 4), nn.Conv2d(3, 6, 3)


def adapted(*targets: str, rank: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=rank, target_modules=list(targets))
    return peft.get_peft_model(Net(), config)


def filled(model: nn.Module, adapter: str = "default", **values: list) -> nn.Module:
    with torch.no_grad():
        for name, p in skill_tensors(model, adapter).items():
            p.copy_(torch.tensor(values["a" if "lora_A" in name else "b"]))
    return model


A, B = [[1.0, 2, 0], [0, 1, 0]], [[1.0, 0], [0, 2], [0, 0], [0, 0]]


def test_by_hand():
    """A A^T - I = [[4, 2], [2, 0]] of norm sqrt(24), B^T B - I = [[0, 0], [0, 3]] of norm 3."""
    model = filled(adapted("fc"), a=A, b=B)
    assert orthogonality(model).item() == pytest.approx((math.sqrt(24) + 3) / 2)
    assert orthogonality(model, squared=True).item() == pytest.approx((24 + 9) / 2)


def test_the_gradient_by_hand():
    """The gradient of || X X^T - I ||^2 is 4 (X X^T - I) X; here halved by the mean of A's and B's."""
    model = filled(adapted("fc"), a=A, b=B)
    orthogonality(model, squared=True).backward()
    a, b = (p.grad.tolist() for p in skill_tensors(model).values())
    assert a == [[8.0, 20.0, 0], [4.0, 8.0, 0]] and b == [[0, 0], [0, 12.0], [0, 0], [0, 0]]


@pytest.mark.parametrize("squared", [False, True])
def test_zero_and_without_a_gradient_where_all_are_orthonormal(squared):
    model = adapted("words", "fc", "conv")
    with torch.no_grad():
        for name, p in skill_tensors(model).items():
            rows = p.flatten(1) if "_A" in name else p.flatten(1).T
            p.copy_((torch.eye(*rows.shape) if "_A" in name else torch.eye(*rows.shape).T).view(p.shape))
    loss = orthogonality(model, squared=squared)
    loss.backward()
    assert loss.item() == 0 and not any(p.grad.any() for p in skill_tensors(model).values())


@pytest.mark.parametrize("squared", [False, True])
def test_descent_ends_at_orthonormal_rows_and_columns(squared):
    model = adapted("words", "fc", "conv")
    for p in skill_tensors(model).values():
        nn.init.normal_(p)
    start = orthogonality(model, squared=squared).item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 600)  # the norm's gradient never fades
    for _ in range(600):
        optimizer.zero_grad()
        orthogonality(model, squared=squared).backward()
        optimizer.step()
        schedule.step()
    assert start > 5
    for name, p in skill_tensors(model).items():
        rows = p.flatten(1) if "_A" in name else p.flatten(1).T
        # as large as the last steps: measured 5.4e-5
        assert torch.allclose(rows @ rows.T, torch.eye(2), atol=2e-4), name


def test_it_does_not_start_what_the_task_has_not_started():
    """At LoRA's start B is zero, and the gradient there is zero: || 0 - I || = sqrt(2)."""
    model = adapted("fc")
    loss = orthogonality(filled(model, a=[[1.0, 0, 0], [0, 1, 0]], b=[[0.0, 0]] * 4))
    loss.backward()
    assert loss.item() == pytest.approx(math.sqrt(2) / 2)
    assert not any(p.grad.any() for p in skill_tensors(model).values())


def test_of_one_adapter_among_several():
    model = adapted("fc")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["fc"]))
    filled(model, a=A, b=B)
    filled(model, "other", a=[[1.0, 0, 0], [0, 1, 0]], b=B)
    assert orthogonality(model, "other").item() == pytest.approx(1.5)
    assert orthogonality(model).item() == orthogonality(model, "default").item() > 3


def test_a_bias_trained_beside_b_takes_no_part():
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["fc"], lora_bias=True))
    named = dict(model.named_parameters())
    with torch.no_grad():
        named["base_model.model.fc.lora_A.default.weight"].copy_(torch.tensor(A))
        named["base_model.model.fc.lora_B.default.weight"].copy_(torch.tensor(B))
        named["base_model.model.fc.lora_B.default.bias"].fill_(7.0)
    assert orthogonality(model).item() == pytest.approx((math.sqrt(24) + 3) / 2)


def test_in_float32_under_autocast(monkeypatch):
    model = filled(adapted("fc"), a=[[1.0, 0.01, 0], [0, 1, 0]], b=B)
    want = orthogonality(model).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert orthogonality(model).item() == want
        # the twin: where autocast is left on, a square of 1.0001 is 1
        monkeypatch.setattr(module.torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        assert orthogonality(model).item() != want


def test_half_precision_factors():
    model = filled(adapted("fc"), a=A, b=B)
    assert orthogonality(model.bfloat16()).item() == pytest.approx((math.sqrt(24) + 3) / 2)
    assert orthogonality(model).dtype == torch.float32


def test_nothing_to_regularise():
    with pytest.raises(SkillError, match="Net has no LoRA adapter, .* leave the regulariser out in full fine-tuning"):
        orthogonality(Net())
    with pytest.raises(SkillError, match="adapter 'defalt' matches no LoRA tensor of PeftModel; it has default"):
        orthogonality(adapted("fc"), "defalt")
