"""Small peft models of all kinds, and how a task is learned over them."""

from __future__ import annotations

import parts
import pytest
import timm
import torch
from torch.nn import functional as tf

import hatcl

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


def made(name):
    """A peft model, its inputs and the HAT model."""
    torch.manual_seed(0)
    source, inputs = MODELS[name]()
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
