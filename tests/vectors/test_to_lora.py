"""Adapters out of full fine-tunes, loaded by peft itself."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from hatcl import ConfigError, IntegrityError, VectorError
from hatcl.vectors.task_vector import TaskVector

peft = pytest.importorskip("peft")
# float32 factors of numbers below 1: measured 3e-7 over 20 seeds
SLACK = 3e-6


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 6)
        self.block = nn.ModuleDict({"fc": nn.Linear(6, 3, bias=False)})

    def forward(self, x):
        return self.block["fc"](self.fc(self.norm(self.grouped(self.conv(x))).relu().mean((2, 3))).tanh())


def tuned(base, names=None, size=0.3):
    out = copy.deepcopy(base)
    with torch.no_grad():
        for name, p in out.named_parameters():
            if names is None or name in names:
                p += size * torch.randn(p.shape)
    return out


def outputs_alike(a, b, x):
    with torch.no_grad():
        return float((a.eval()(x) - b.eval()(x)).abs().max()) < SLACK


def test_of_full_rank_it_is_the_fine_tuned_model(tmp_path):
    base = Net()
    model = tuned(base, {"conv.weight", "fc.weight", "block.fc.weight"})
    report = TaskVector.between(base, model).to_lora(6, base, tmp_path / "lora")
    assert report.error < SLACK and not report.left_out and set(report.errors) == {
        "conv.weight", "fc.weight", "block.fc.weight"
    }  # fmt: skip
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    x = torch.randn(3, 2, 5, 5)
    assert outputs_alike(loaded, model, x) and not outputs_alike(base, model, x)
    assert outputs_alike(loaded.merge_and_unload(), model, x)


def test_of_lower_rank_it_is_the_nearest_with_its_error(tmp_path):
    base = Net()
    vector = TaskVector.between(base, tuned(base))
    report = vector.to_lora(2, base, tmp_path)
    kept = TaskVector.between(base, tmp_path)  # peft's format, read by another room
    lost = 0.0
    for name in vector:
        tau = vector[name].double()
        got = kept[name].double() if name in kept else torch.zeros_like(tau)
        if name in kept:
            s = torch.linalg.svdvals(tau.flatten(1))
            want = float(s[2:].norm() / s.norm())
            assert abs(report.errors[name] - want) < SLACK
            assert abs(float((tau - got).norm() / tau.norm()) - want) < SLACK
        else:
            assert report.left_out[name] == pytest.approx(float(tau.norm()) / vector.norm())
        lost += float((tau - got).square().sum())
    assert abs(report.error - math.sqrt(lost) / vector.norm()) < SLACK
    assert set(report.left_out) == {
        "conv.bias", "fc.bias", "grouped.bias", "grouped.weight", "norm.bias", "norm.weight"
    }  # fmt: skip
    assert "rank 2 keeps 3 weights" in str(report) and "6 tensors are left out, such as" in str(report)


def test_a_name_that_ends_another_is_not_mistaken_for_it(tmp_path):
    """`fc` changed and `block.fc` did not: peft takes a listed name for every module that ends in it."""
    base = Net()
    model = tuned(base, {"fc.weight"})
    TaskVector.between(base, model).to_lora(4, base, tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert {n for n, m in loaded.base_model.model.named_modules() if hasattr(m, "lora_A")} == {"fc"}
    assert outputs_alike(loaded, model, torch.randn(2, 2, 5, 5))


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=6)
    return transformers.GPT2LMHeadModel(config).eval()


def test_a_vector_under_another_name_of_a_tied_weight(tmp_path):
    """The vector was taken from files, which hold the tied tensor under the name that stands second in the model."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(6, 4)
            self.body = nn.Linear(4, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.table.weight

    base = Twice()
    vector = TaskVector({"head.weight": torch.ones(6, 4), "body.weight": torch.eye(4)})
    report = vector.to_lora(1, base, tmp_path)
    assert set(report.errors) == {"body.weight"} and set(report.left_out) == {"table.weight"}


def test_gpt2_with_its_turned_layers_and_tied_head(tmp_path):
    base = gpt2()
    names = [n for n, _ in base.named_parameters() if n.endswith("weight") and ("attn" in n or "mlp" in n)]
    model = tuned(base, names)
    report = TaskVector.between(base, model).to_lora(8, base, tmp_path)
    assert set(report.errors) == set(names) and report.error < SLACK
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    ids = torch.randint(0, 11, (2, 5))
    with torch.no_grad():
        gap = (loaded(ids).logits - model(ids).logits).abs().max()
    assert float(gap) < 1e-5  # through two layers; measured 6e-7
    tied = TaskVector.between(base, tuned(base)).to_lora(2, base, tmp_path)
    assert "transformer.wte.weight" in tied.left_out and "lm_head.weight" not in tied.errors


def test_from_files_it_is_the_same(tmp_path):
    base = Net()
    vector = TaskVector.between(base, tuned(base))
    want = vector.to_lora(2, base, tmp_path / "a")
    got = TaskVector.load(vector.save(tmp_path / "v.safetensors")).to_lora(2, base, tmp_path / "b")
    assert got.errors == want.errors and got.error == want.error
    a, b = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "ab")
    assert a == b


def test_what_cannot_be_is_refused_and_writes_nothing(tmp_path):
    base = Net()
    vector = TaskVector.between(base, tuned(base))
    with pytest.raises(ConfigError, match="rank: got 0"):
        vector.to_lora(0, base, tmp_path / "x")
    with pytest.raises(IntegrityError, match="differs from this vector's base; pass its own base"):
        vector.to_lora(2, tuned(base), tmp_path / "x")
    with pytest.raises(VectorError, match="only in the vector.*Pass the model that the vector was taken from"):
        vector.to_lora(2, nn.Linear(2, 2), tmp_path / "x")
    with pytest.raises(VectorError, match="base: got a str, expected the pretrained model as a module"):
        vector.to_lora(2, "base", tmp_path / "x")
    norms = TaskVector.between(base, tuned(base, {"norm.weight", "fc.bias"}))
    with pytest.raises(VectorError, match="changes no weight that LoRA can adapt.*norm.weight"):
        norms.to_lora(2, base, tmp_path / "x")
    assert not (tmp_path / "x").exists()
