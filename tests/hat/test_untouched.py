"""Conversion in place: the same model as from a copy, and a source that stays as it was where it fails."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import parts
import pytest
import torch
from torch import nn

import hatcl
from hatcl.functional import same_bits
from hatcl.hat import altered, untouched, verify
from hatcl.hat import convert as converting
from hatcl.hat.altered import Altered
from hatcl.hat.layers.gated import HATLayer
from hatcl.hat.untouched import Structure


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Parameters of some hundred elements are overwritten by their bits, without a copy."""
    monkeypatch.setattr(altered, "LARGE", 64)
    monkeypatch.setattr(altered, "BLOCK", 64)


@pytest.mark.parametrize("name", parts.MODELS)
def test_it_is_the_model_itself_and_equals_one_made_from_a_copy(name):
    source, x = parts.plain(name), parts.images(name)
    torch.manual_seed(3)
    want = hatcl.convert(source, 2, x)
    kept, own = parts.snapshot(source), {n: p for n, p in source.named_parameters()}
    torch.manual_seed(3)
    model = hatcl.convert(source, 2, x, inplace=True)
    assert model is source and all(dict(model.named_parameters())[n] is p for n, p in own.items())
    assert parts.same(parts.snapshot(model), want.state_dict())
    assert all(same_bits(model.state_dict()[n], v) for n, v in kept.items())
    assert hatcl.certify(parts.pretend(model), x, strict=True).exact
    with pytest.raises(hatcl.ConversionError, match="is a HAT model already"):
        hatcl.convert(model, 2, x, inplace=True)


def test_tied_weights_stay_tied():
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4))
    net[3].weight = net[1].weight
    model = hatcl.convert(net, 2, parts.images("mlp"), inplace=True)
    assert model[3]._parameters["weight"] is model[1]._parameters["weight"]
    assert hatcl.certify(parts.pretend(model), parts.images("mlp"), strict=True).exact


def test_an_optimizer_that_was_there_before_trains_the_shared_parameters():
    net, x = parts.plain("mlp"), parts.images("mlp")
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    model = hatcl.convert(net, 2, x, inplace=True)
    with pytest.raises(hatcl.GuardError, match="no optimizer holds task 0's gate embeddings"):
        with hatcl.learn(model, 0, optimizer, steps=2):
            pass
    optimizer.add_param_group({"params": hatcl.task_parameters(model, 0)})
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "hat_" not in n}
    with hatcl.learn(model, 0, optimizer, steps=2):
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert any(not torch.equal(dict(model.named_parameters())[n], v) for n, v in before.items())
    assert hatcl.certify(model, x, strict=True).exact


# ---- failures ---------------------------------------------------------------------------------------------------


def interrupt_at(patch, where, name, count):
    """Let the count-th call of a function be interrupted."""
    plain, calls = getattr(where, name), [0]

    def then(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    patch.setattr(where, name, then)


FAILURES = {
    "while modules are swapped": (HATLayer, "_hat_attach", 2),
    "while it is compared": (converting, "check_plain", 1),
    "while parameters are stirred": (Altered, "turned_over", 2),
    "while blocks are overwritten": (Altered, "_key", 30),
    "between attacks": (verify, "named_outputs", 2),
    "under attack": (verify, "attacked_outputs", 1),
    "just before the attack is undone": (Altered, "undo", 1),
    "just before all is undone": (Altered, "undo", 3),
    "afterwards": (converting, "write_as_hatcl", 1),
}


def everything(model):
    """What a plain model's modules are and hold, by identity."""
    return [
        (type(m), sorted(m.__dict__), [list(v.items()) for v in m.__dict__.values() if isinstance(v, dict)])
        for m in model.modules()
    ]


@pytest.mark.parametrize("when", FAILURES)
def test_an_interruption_leaves_the_source_bit_for_bit(when, monkeypatch):
    source, x = parts.plain("vit"), parts.images("vit")
    source.register_forward_hook(lambda m, args, out: out)
    source.note = [1, 2]
    before = everything(source)
    with monkeypatch.context() as patch:
        interrupt_at(patch, *FAILURES[when])
        parts.unchanged(
            source, lambda: hatcl.convert(source, 2, x, num_classes=[3, 2], inplace=True), KeyboardInterrupt, None
        )
    assert everything(source) == before
    assert hatcl.convert(source, 2, x, inplace=True) is source


@pytest.mark.parametrize("undone", ["structure", "weights"])
def test_twin_without_the_protection_it_is_half_converted(undone, monkeypatch):
    source, x = parts.plain("mlp"), parts.images("mlp")
    before = parts.snapshot(source)
    if undone == "structure":
        monkeypatch.setattr(Structure, "restore", lambda self: None)
    else:
        monkeypatch.setattr(Altered, "undo", lambda self, down_to=0: None)
    interrupt_at(monkeypatch, verify, "attacked_outputs", 1)
    with pytest.raises(KeyboardInterrupt):
        hatcl.convert(source, 2, x, inplace=True)
    whole = not any(isinstance(m, HATLayer) for m in source.modules())
    assert whole == (undone == "weights")
    assert parts.same(before, {n: source.state_dict()[n] for n in before}) == (undone == "structure")


def test_a_leak_that_copies_cannot_close_leaves_the_source_as_it_was(monkeypatch):
    source, x = parts.plain("mlp"), parts.images("mlp")
    monkeypatch.setattr(verify, "_leaks", lambda *args: ["1.weight"])
    text = "other tasks reach a task's output through 1.weight"
    parts.unchanged(source, lambda: hatcl.convert(source, 2, x, inplace=True), hatcl.ConversionError, text)


def test_a_leak_that_copies_close_is_closed_in_place():
    source, x = parts.plain("mlp"), parts.images("mlp")
    holes = converting.map_of(copy.deepcopy(source).eval(), x)
    holes.folds = {key: axes for key, axes in holes.folds.items() if key[1] not in ("1.weight", "1.bias")}
    before = parts.snapshot(source)
    model = hatcl.convert(source, 2, x, unit_map=holes, inplace=True)
    assert {n for n, why in hatcl.describe(model).copies.items() if "attack got out" in why} >= {"1.weight", "1.bias"}
    assert all(same_bits(model.state_dict()[n], v) for n, v in before.items())


def transposed():
    """A model one of whose weights lies in memory as its transpose does."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    net[2].weight = nn.Parameter(torch.randn(12, 12).t())
    return net, torch.randn(4, 8)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_weight_keeps_its_layout_under_a_task(inplace):
    """Kernels are chosen by it, so that otherwise the cut would be 3e-8 from the gates."""
    net, x = transposed()
    model = hatcl.convert(net, 2, x, inplace=inplace)
    weight = parts.pretend(model)[2].weight
    with hatcl.task(model, 0), torch.no_grad():
        assert model[2].weight.stride() == weight.stride() == (1, 12)
    assert hatcl.certify(model, x, strict=True).exact


def test_what_cannot_be_overwritten_and_put_back_is_refused_by_its_name():
    net, x = transposed()
    net[2].weight = nn.Parameter(torch.randn(1, 12).expand(12, 12))
    parts.unchanged(
        net, lambda: hatcl.convert(net, 2, x, inplace=True), hatcl.ConversionError, "2.weight: several of its elements"
    )
    assert hatcl.convert(net, 2, x) is not net  # a copy has memory of its own
    with torch.inference_mode():
        with pytest.raises(hatcl.ConversionError, match="^under torch.inference_mode.. writes to tensors are not"):
            hatcl.convert(transposed()[0], 2, x)
        net[2].weight = nn.Parameter(torch.randn(12, 12))
    text = "2.weight: it was made there, and under torch.inference_mode.. writes"
    parts.unchanged(net, lambda: hatcl.convert(net, 2, x, inplace=True), hatcl.ConversionError, text)
    assert hatcl.convert(net, 2, x) is not net


# ---- forwards that write to parameters -------------------------------------------------------------------------


class Writes(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.body, self.write = parts.mlp(), write

    def forward(self, x):
        self.write(self.body[1].weight)
        return self.body(x)


@torch.no_grad()
def by_data(weight):
    weight.data.mul_(0.5)


@torch.no_grad()
def by_out(weight):
    torch.mul(weight, 0.5, out=weight.data)


@torch.no_grad()
def by_many(weight):
    torch._foreach_mul_([weight.data], 0.5)


@pytest.mark.parametrize("write", [by_data, by_out, by_many])
def test_a_forward_that_writes_to_a_parameter_is_refused_before_it_has(write):
    source = Writes(write)
    text = "body.1.weight: the forward itself writes to this parameter, .* keep what it computes in a variable"
    run = lambda: hatcl.convert(source, 2, parts.images("mlp"), inplace=True)  # noqa: E731
    parts.unchanged(source, run, hatcl.ConversionError, text)


def test_twin_what_writes_past_torch_is_noticed(monkeypatch):
    def by_numpy(weight):
        weight.detach().numpy()[0, 0] += 1

    source = Writes(by_numpy)
    with pytest.raises(hatcl.ConversionError, match="the forward itself writes to this parameter"):
        hatcl.convert(source, 2, parts.images("mlp"))
    monkeypatch.setattr(untouched, "_sums", lambda model: {})
    converting.map_of(source, parts.images("mlp"))


@pytest.mark.parametrize("norm_type", [2.0, 1.0])
def test_an_embedding_that_scales_its_rows_keeps_them(norm_type):
    """The plain model scales what is looked up, as torch does, and writes to no row: sealed tasks use them."""
    table = nn.Embedding(20, 12, padding_idx=3, max_norm=0.5, norm_type=norm_type)
    net = nn.Sequential(table, nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 4))
    was, ids = table.weight.detach().clone(), torch.randint(0, 20, (6, 4))
    model, source = hatcl.convert(net, 2, ids), copy.deepcopy(net)
    assert same_bits(table.weight.detach(), was)
    parts.pretend(model, [0])
    for _ in range(2):
        with hatcl.task(model, None):
            got = model(ids)
        want = source(ids)
        assert same_bits(got.detach(), want.detach())
    assert same_bits(model[0]._parameters["weight"].detach(), was)
    assert not same_bits(source[0].weight.detach(), was)  # torch does write
    for out, of in ((got, model), (want, source)):
        out.sum().backward()
        assert of[0]._parameters["weight"].grad is not None
    assert torch.equal(model[0]._parameters["weight"].grad, source[0].weight.grad)
    assert hatcl.certify(model, ids, strict=True).exact


@pytest.mark.slow
def test_a_language_model_with_lora_is_converted_in_a_fifth_of_its_own_memory():
    """150 M parameters in bfloat16, in a process of its own. Measured: .09 copies of the weights above the model."""
    pytest.importorskip("peft", reason="needs the extra: pip install 'hatcl[hf]'")
    program = Path(__file__).parents[2] / "benchmarks" / "sizes.py"
    options = ["--case=llama", "--layers=12", "--width=768", "--lora", "--rows", "convert inplace"]
    done = subprocess.run([sys.executable, program, *options], capture_output=True, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1].removeprefix("convert inplace "))
    assert row["copies"] < 0.2, row
