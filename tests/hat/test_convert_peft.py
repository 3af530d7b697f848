"""Gates over a peft model: a LoRA pair is a unit, the base belongs to nobody, the guarantee is the same."""

from __future__ import annotations

import contextlib
import copy

import parts
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as tf

import hatcl
from hatcl.hat import guard
from hatcl.hat.certify import outputs_of
from hatcl.hat.gates import gates_of
from hatcl.map.lora import starts_at_zero

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}


def bert(**lora):
    config = transformers.BertConfig(**SMALL, intermediate_size=48, hidden_dropout_prob=0.0)
    lora = {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS", **lora}
    return peft.get_peft_model(transformers.BertForSequenceClassification(config), peft.LoraConfig(**lora)), _words()


def bert_rank_pattern():
    return bert(rank_pattern={"query": 2}, use_rslora=True, lora_dropout=0.1)


def bert_embeddings():
    return bert(target_modules=["word_embeddings", "query"])


def gpt2():
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16)
    lora = peft.LoraConfig(r=8, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    return peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora), _words()


def t5():
    config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    lora = peft.LoraConfig(r=3, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    words = _words()["input_ids"]
    return peft.get_peft_model(transformers.T5ForConditionalGeneration(config), lora), {
        "input_ids": words, "decoder_input_ids": words[:, :4],
    }  # fmt: skip


def vit():
    model = parts.vit(embed_dim=32, num_heads=4)
    lora = peft.LoraConfig(r=4, target_modules=["qkv", "fc1"], modules_to_save=["head"])
    return peft.get_peft_model(model, lora), parts.images("vit", 4)


def resnet():
    model = timm.create_model("test_resnet", num_classes=5)
    lora = peft.LoraConfig(r=4, target_modules=r".*layer[23].*conv\d", modules_to_save=["fc"])
    return peft.get_peft_model(model, lora), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _words():
    return {"input_ids": torch.randint(0, 50, (4, 7), generator=torch.Generator().manual_seed(0))}


MODELS = {f.__name__: f for f in (bert, bert_rank_pattern, bert_embeddings, gpt2, t5, vit, resnet)}


@pytest.fixture(params=MODELS)
def made(request):
    """A peft model, its inputs and the HAT model."""
    torch.manual_seed(0)
    source, inputs = MODELS[request.param]()
    source.eval()
    with torch.no_grad():  # a trained adapter on a trained base: nothing may hide behind zeros
        for p in source.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return source, inputs, hatcl.convert(source, 3, inputs)


def first_output(model, inputs):
    out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return out if isinstance(out, torch.Tensor) else out.logits


def learn(model, task, inputs, steps=4):
    """Towards targets of the task's own, with momentum and weight decay over all parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model.train()
    with hatcl.learn(model, task, optimizer, steps) as learning:
        for _ in range(steps):
            out = first_output(model, inputs)
            target = torch.randn(out.shape, generator=torch.Generator().manual_seed(task))
            optimizer.zero_grad()
            (tf.mse_loss(out, target) + learning.penalty()).backward()
            optimizer.step()
    model.eval()


def outputs(model, inputs, task):
    with torch.no_grad(), hatcl.task(model, task):
        return outputs_of(model, inputs, task)


def test_the_units_are_the_pairs(made):
    source, _, model = made
    ranks = [p.shape[0] for n, p in source.named_parameters() if "lora_A" in n or "lora_embedding_A" in n]
    assert gates_of(model)[0].num_units == sum(ranks)
    for h in guard.held(model):
        if h.task is None and h.plan is not None and h.plan.axes:
            assert "lora_" in h.name
    copied = {h.name for h in guard.held(model) if h.plain}
    assert all("modules_to_save" in n for n in copied), "the base is never copied"
    described = hatcl.describe(model)
    assert described.units == sum(ranks) and str(described)


def test_without_a_task_it_is_the_peft_model(made):
    source, inputs, model = made
    with torch.no_grad():
        assert torch.equal(first_output(source, inputs), first_output(model.eval(), inputs))


def test_what_is_sealed_stays_and_is_certified(made):
    _, inputs, model = made
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    learn(model, 0, inputs)
    before = outputs(model, inputs, 0)
    learn(model, 1, inputs)
    learn(model, 2, inputs)
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
        for h in guard.held(model) if h.task is None and h.plan is not None and h.plan.axes
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
    lora = peft.LoraConfig(r=2, target_modules=["own"], modules_to_save=["head"], bias="lora_only")
    model = hatcl.convert(peft.get_peft_model(Half(), lora), 2, torch.randn(3, 6))
    entries = gates_of(model)[0].unit_map.entries
    copied = {n.removeprefix("base_model.model.") for n, e in entries.items() if e.copied}
    assert gates_of(model)[0].num_units == 2
    assert copied == {
        "own.base_layer.bias", "head.modules_to_save.default.weight", "head.modules_to_save.default.bias",
    }  # fmt: skip
    parts.pretend(model)
    assert hatcl.certify(model, torch.randn(3, 6)).exact


def test_adapters_that_nothing_could_be_learned_in_are_refused():
    source, inputs = bert()
    source.merge_adapter()
    with pytest.raises(hatcl.ConversionError, match=r"query: the adapter is merged into its base; call unmerge_adapte"):
        hatcl.convert(source, 2, inputs)
    source.unmerge_adapter()
    for name, p in source.named_parameters():
        p.requires_grad_("lora_" not in name and p.requires_grad)
    with pytest.raises(hatcl.ConversionError, match="none of its LoRA tensors requires a gradient.*is_trainable=True"):
        hatcl.convert(source, 2, inputs)


def reloaded(source, folder):
    """The adapter in a folder over the base that it was made for."""
    base = copy.deepcopy(source).unload()
    return peft.PeftModel.from_pretrained(base, folder).eval()


def test_a_tasks_adapter_is_an_ordinary_one(made, tmp_path):
    source, inputs, model = made
    learn(model, 0, inputs)
    learn(model, 1, inputs)
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
                inside = first_output(model, inputs)
        assert not any("hat_tasks" in n for n in load_file(tmp_path / str(t) / "adapter_model.safetensors"))
        with torch.no_grad(), hatcl.task(model, t):
            want = first_output(model, inputs)
        assert torch.equal(inside, want)
        with torch.no_grad():
            got = first_output(reloaded(source, tmp_path / str(t)), inputs)
        assert torch.equal(got, want) != norms
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(torch.equal(p, before[n]) for n, p in after.items())
    model.save_pretrained(tmp_path / "bare")  # the twin: what peft writes without it is no task's adapter
    with torch.no_grad():
        bare = first_output(reloaded(source, tmp_path / "bare"), inputs)
    assert (bare - want).abs().max() > 1e-4


def test_as_adapter_refuses():
    model = hatcl.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), 2, torch.randn(3, 4))
    with pytest.raises(hatcl.TaskError, match="task 0 is not sealed, so it has no hard gates yet"):
        hatcl.as_adapter(model, 0).__enter__()
    parts.pretend(model)
    with pytest.raises(hatcl.TaskError, match="0.weight is gated and no LoRA factor, so that no adapter computes what"):
        hatcl.as_adapter(model, 0).__enter__()
