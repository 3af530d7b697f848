"""Tiny peft models with random weights, and batches for them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WORDS = 40


def bert(dropout: float = 0.0, seed: int = 0, **lora: Any) -> Any:
    """A BERT classifier, whose head peft trains in full beside the adapter."""
    options = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", **lora}
    return adapted(plain_bert(dropout, seed), options)


def plain_bert(dropout: float = 0.0, seed: int = 0) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForSequenceClassification(BertConfig(vocab_size=WORDS, num_labels=2, **SIZE, **rates))


def gpt2(**lora: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    base = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, **sizes, **rates))
    return adapted(base, {"target_modules": ["c_attn"], "task_type": "CAUSAL_LM", "fan_in_fan_out": True, **lora})


def t5(**lora: Any) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    base = T5ForConditionalGeneration(T5Config(vocab_size=WORDS, dropout_rate=0.0, **sizes))
    return adapted(base, {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM", **lora})


def adapted(base: nn.Module, options: dict[str, Any]) -> Any:
    """A peft model whose B is not zero, as after some learning."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 2, "lora_alpha": 4, **options}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return model


def texts(count: int = 6, length: int = 7, classes: bool = True, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Examples of one length; the last two positions of every second one are padding."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(count):
        ids = torch.randint(1, WORDS, (length,), generator=g)
        mask = torch.ones(length, dtype=torch.long)
        if i % 2:
            ids[-2:], mask[-2:] = 0, 0
        labels = ids[0] % 2 if classes else torch.where(mask.bool(), ids, -100)
        out.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return out


def batch_of(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {k: torch.stack([e[k] for e in examples]) for k in examples[0]}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def disturb(model: Any, adapter: str, by: float = 0.1, seed: int = 3) -> None:
    """Move an adapter's tensors, so that two copies differ."""
    from hatcl.skills.switch import adapter_tensors

    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter_tensors(model, adapter).values():
            p.add_(torch.randn(p.shape, generator=g).to(p.dtype) * by)
