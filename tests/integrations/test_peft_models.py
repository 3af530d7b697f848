"""Models with a LoRA adapter are saved with its config, so that they load without a base module."""

from __future__ import annotations

import warnings

import pytest

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import torch  # noqa: E402
from continual_parts import TARGETS, bert, tokenizer  # noqa: E402
from safetensors import safe_open  # noqa: E402

import hatcl  # noqa: E402
from hatcl.errors import IntegrityError  # noqa: E402
from hatcl.sources import build_source, source_of  # noqa: E402


def adapted(**options):
    torch.manual_seed(0)
    return peft.get_peft_model(bert(), peft.LoraConfig(r=4, target_modules=TARGETS, **options))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "modules_to_save": ["pooler"]}])
def test_what_is_loaded_computes_the_same(tmp_path, options):
    tokens = dict(tokenizer()(["w1 w7 w3", "w4 w5"], padding=True, return_tensors="pt"))
    inputs = {n: tokens[n] for n in ("input_ids", "attention_mask")}
    model = hatcl.convert(adapted(**options), 2, inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with hatcl.learn(model, 0, optimizer, steps=2):
        for _ in range(2):
            optimizer.zero_grad()
            model(**inputs).last_hidden_state.square().mean().backward()
            optimizer.step()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*is_gradient_checkpointing")
        again = hatcl.from_pretrained(hatcl.save_pretrained(model, tmp_path / "model"))
    assert type(again).__name__ == type(model).__name__
    for task in (None, 0):
        with torch.no_grad(), hatcl.task(model.eval(), task), hatcl.task(again, task):
            assert torch.equal(model(**inputs).last_hidden_state, again(**inputs).last_hidden_state)
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as f:
        assert "base_model_name_or_path" not in f.metadata()["hatcl"]


def test_other_models_are_not_recognised_and_other_adapters_refused():
    model = adapted()
    source = source_of(model)
    with pytest.raises(IntegrityError, match="the adapter is not a LORA adapter; pass base="):
        build_source({**source, "config": {**source["config"], "peft_type": "LOHA"}})
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["query"]))
    assert source_of(model) is None
    own = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"]))
    assert source_of(own) is None
