"""A task of a model with LoRA as an ordinary adapter."""

from __future__ import annotations

import contextlib
import copy

import parts
import peft_parts
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import hatcl


@pytest.fixture(params=peft_parts.MODELS)
def made(request):
    return peft_parts.made(request.param)


def reloaded(source, folder):
    """The adapter in a folder over the base that it was made for."""
    base = copy.deepcopy(source).unload()
    return peft_parts.peft.PeftModel.from_pretrained(base, folder).eval()


def test_a_tasks_adapter_is_an_ordinary_one(made, tmp_path):
    source, inputs, model = made
    peft_parts.learn(model, 0, inputs)
    peft_parts.learn(model, 1, inputs)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    norms = any(isinstance(m, nn.BatchNorm2d) for m in source.modules())
    for t in (0, 1):
        with (
            (
                pytest.warns(
                    UserWarning, match="the running statistics of 15 layers are each task's own, and peft writes"
                )
                if norms
                else contextlib.nullcontext()
            ),
            hatcl.as_adapter(model, t),
        ):
            model.save_pretrained(tmp_path / str(t))
            with torch.no_grad():
                inside = peft_parts.first_output(model, inputs)
        assert not any("hat_tasks" in n for n in load_file(tmp_path / str(t) / "adapter_model.safetensors"))
        with torch.no_grad(), hatcl.task(model, t):
            want = peft_parts.first_output(model, inputs)
        assert torch.equal(inside, want)
        with torch.no_grad():
            got = peft_parts.first_output(reloaded(source, tmp_path / str(t)), inputs)
        assert torch.equal(got, want) != norms
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(torch.equal(p, before[n]) for n, p in after.items())
    type(model).save_pretrained(model, tmp_path / "bare")  # the twin: what peft writes without it is no task's adapter
    with torch.no_grad():
        bare = peft_parts.first_output(reloaded(source, tmp_path / "bare"), inputs)
    assert (bare - want).abs().max() > 1e-4


def test_as_adapter_refuses():
    model = hatcl.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), 2, torch.randn(3, 4))
    with pytest.raises(hatcl.TaskError, match="task 0 is not sealed, so it has no hard gates yet"):
        hatcl.as_adapter(model, 0).__enter__()
    parts.pretend(model)
    with pytest.raises(hatcl.TaskError, match="0.weight is gated and no LoRA factor, so that no adapter computes what"):
        hatcl.as_adapter(model, 0).__enter__()
