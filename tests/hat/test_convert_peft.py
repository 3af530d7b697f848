"""Gates over a peft model: a LoRA pair is a unit, the base belongs to nobody, the guarantee is the same."""

from __future__ import annotations

import parts
import peft_parts
import pytest
import torch
from torch import nn

import hatcl
from hatcl.hat.gates import gates_of
from hatcl.hat.held import held
from hatcl.map.lora import starts_at_zero


@pytest.fixture(params=peft_parts.MODELS)
def made(request):
    return peft_parts.made(request.param)


def outputs(model, inputs, task):
    with torch.no_grad(), hatcl.task(model, task):
        return parts.outputs_of(model, inputs, task)


def test_the_units_are_the_pairs(made):
    source, _, model = made
    ranks = [p.shape[0] for n, p in source.named_parameters() if "lora_A" in n or "lora_embedding_A" in n]
    assert gates_of(model)[0].num_units == sum(ranks)
    for h in held(model):
        if h.task is None and h.plan is not None and h.plan.axes:
            assert "lora_" in h.name
    copied = {h.name for h in held(model) if h.plain}
    assert all("modules_to_save" in n for n in copied), "the base is never copied"
    described = hatcl.describe(model)
    assert described.units == sum(ranks) and str(described)


def test_without_a_task_it_is_the_peft_model(made):
    source, inputs, model = made
    with torch.no_grad():
        assert torch.equal(peft_parts.first_output(source, inputs), peft_parts.first_output(model.eval(), inputs))


def test_what_is_sealed_stays_and_is_certified(made):
    _, inputs, model = made
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    peft_parts.learn(model, 0, inputs)
    before = outputs(model, inputs, 0)
    peft_parts.learn(model, 1, inputs)
    peft_parts.learn(model, 2, inputs)
    after = outputs(model, inputs, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    parts.pretend(model, own=False)  # sealed by random gates: pairs of each kind of use
    assert hatcl.certify(model, inputs, strict=True).exact


def test_twin_without_the_gates_the_attack_gets_in(made, monkeypatch):
    _, inputs, model = made
    parts.pretend(model, own=False)
    monkeypatch.setattr("hatcl.hat.layers.gated.HATLayer._hat_folded", lambda self, name, raw, task: raw)
    monkeypatch.setattr("hatcl.hat.layers.gated.HATLayer._hat_gate_output", lambda self, out: out)
    assert not hatcl.certify(model, inputs).exact


def test_a_forgotten_pair_starts_as_peft_starts_one(made):
    _, inputs, model = made
    parts.pretend(model, share=0.4, own=False)
    mine = {
        h.name: (h, h.live(1) & ~h.live(0) & ~h.live(2))
        for h in held(model) if h.task is None and h.plan is not None and h.plan.axes
    }  # fmt: skip
    before = {t: outputs(model, inputs, t) for t in (0, 2)}
    old = {n: h.param.detach().clone() for n, (h, _) in mine.items()}
    report = hatcl.forget_task(model, 1)
    assert report.total_erased == sum(int(m.sum()) for _, m in mine.values()) > 0
    for name, (h, erased) in mine.items():
        if starts_at_zero(name):
            assert not h.param[erased].any()
        else:
            assert not (h.param[erased] == old[name][erased]).any()
        assert torch.equal(h.param[~erased], old[name][~erased])
    for t, was in before.items():
        assert all(torch.equal(a, b) for a, b in zip(was, outputs(model, inputs, t), strict=True))


def test_saved_and_loaded_over_the_peft_model(made, tmp_path):
    source, inputs, model = made
    parts.pretend(model)
    hatcl.save_pretrained(model, tmp_path)
    loaded = hatcl.from_pretrained(tmp_path, base=source)
    for t in range(3):
        assert all(
            torch.equal(a, b) for a, b in zip(outputs(model, inputs, t), outputs(loaded, inputs, t), strict=True)
        )


class Half(nn.Module):
    """A frozen layer beside one that is trained, without LoRA."""

    def __init__(self):
        super().__init__()
        self.frozen, self.own, self.head = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.head(self.own(self.frozen(x).relu()).relu())


def test_without_lora_what_is_not_trained_has_gates_like_the_rest():
    model = hatcl.convert(Half(), 2, torch.randn(3, 6))
    assert gates_of(model)[0].num_units == 8 + 5


def test_what_lora_trains_in_full_is_copied_where_no_pair_says_whose_it_is():
    lora = peft_parts.peft.LoraConfig(r=2, target_modules=["own"], modules_to_save=["head"], bias="lora_only")
    model = hatcl.convert(peft_parts.peft.get_peft_model(Half(), lora), 2, torch.randn(3, 6))
    entries = gates_of(model)[0].unit_map.entries
    copied = {n.removeprefix("base_model.model.") for n, e in entries.items() if e.copied}
    assert gates_of(model)[0].num_units == 2
    assert copied == {
        "own.base_layer.bias", "head.modules_to_save.default.weight", "head.modules_to_save.default.bias",
    }  # fmt: skip
    parts.pretend(model)
    assert hatcl.certify(model, torch.randn(3, 6)).exact


def test_adapters_that_nothing_could_be_learned_in_are_refused():
    source, inputs = peft_parts.bert()
    source.merge_adapter()
    with pytest.raises(hatcl.ConversionError, match=r"query: the adapter is merged into its base; call unmerge_adapte"):
        hatcl.convert(source, 2, inputs)
    source.unmerge_adapter()
    for name, p in source.named_parameters():
        p.requires_grad_("lora_" not in name and p.requires_grad)
    with pytest.raises(hatcl.ConversionError, match="none of its LoRA tensors requires a gradient.*is_trainable=True"):
        hatcl.convert(source, 2, inputs)


@pytest.fixture
def merged():
    """A model with a sealed task, inputs, what it said, and its adapter merged into its base since then."""
    source, inputs = peft_parts.bert()
    for name, p in source.named_parameters():
        if "lora_" in name:  # peft starts one factor of a pair at zero
            nn.init.normal_(p, std=0.3)
    model = parts.pretend(hatcl.convert(source, 2, inputs, verify=False), [0]).eval()
    with hatcl.task(model, 0), torch.no_grad():
        said = model(**inputs).logits
    with hatcl.task(model, None):
        model.merge_adapter()
    return model, inputs, said


def test_a_merged_adapter_is_refused_under_a_task(merged):
    model, inputs, said = merged
    with hatcl.task(model, 0), torch.no_grad():
        with pytest.raises(
            hatcl.TaskError, match=r"query: the adapter is merged .* task 0's gates .* unmerge_adapter\(\)"
        ):
            model(**inputs)
    with hatcl.task(model, None), torch.no_grad():
        model(**inputs)
        model.unmerge_adapter()
    with hatcl.task(model, 0), torch.no_grad():
        assert torch.allclose(model(**inputs).logits, said, atol=1e-5)  # W + BA - BA rounds


def test_twin_without_the_refusal_it_computes_with_all_pairs(merged):
    model, inputs, said = merged
    model._forward_pre_hooks.clear()
    with hatcl.task(model, 0), torch.no_grad():
        assert not torch.allclose(model(**inputs).logits, said, atol=1e-3)
