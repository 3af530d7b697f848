"""Adapters on layers that share a tensor: right, or refused by name, on every way in."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from hatcl.errors import VectorError
from hatcl.vectors import adapters
from hatcl.vectors.stream import compose_files
from hatcl.vectors.task_vector import TaskVector
from hatcl.vectors.tensors import Kind
from hatcl.vectors.ties import joined_ties, refuse_unknown_tie

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

LOOKUP, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BOTH = ["embed_tokens", "lm_head"]
ADAPTERS = {
    "lookup": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": BOTH},
    "lookup in full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both in full": {"target_modules": ["q_proj"], "modules_to_save": BOTH},
}
TOGETHER = {
    "both": {"target_modules": BOTH, "ensure_weight_tying": True},
    "both in full": {"target_modules": ["q_proj"], "modules_to_save": BOTH, "ensure_weight_tying": True},
}
WAYS = ["module, model", "module, folder", "folder, model", "folder, folder", "file, folder", "state dict, folder"]
IDS = torch.arange(6).view(1, -1)


def language_model(tied):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=16, max_position_embeddings=8, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def adapted(base, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, **options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def ways(base, model, tmp_path):
    """The base and the adapter from everywhere: `WAYS`."""
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    state = {n: t.clone() for n, t in load_file(tmp_path / "base" / "model.safetensors").items()}
    save_file(state, tmp_path / "alone.safetensors")
    bases = {"module": base, "folder": tmp_path / "base", "file": tmp_path / "alone.safetensors", "state dict": state}
    ends = {"model": model, "folder": tmp_path / "adapter"}
    return {way: (bases[way.split(", ")[0]], ends[way.split(", ")[1]]) for way in WAYS}


def off_by(model, base, vector):
    """How far the base with the vector is from what the adapter computes."""
    with torch.no_grad():
        want = model(IDS).logits
        return float((vector.apply_to(base)(IDS).logits - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_untied_base_is_right_on_every_way_in(tmp_path, name):
    base = language_model(tied=False)
    model = adapted(base, ADAPTERS[name])
    for start, end in ways(base, model, tmp_path).values():
        # one product where the adapter has two: measured 0 to 2.4e-7 of the largest logit
        assert off_by(model, base, TaskVector.between(start, end)) < 2e-6


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_tied_base_is_refused_on_every_way_in(tmp_path, name):
    base = language_model(tied=True)
    model = adapted(base, ADAPTERS[name])
    for way, (start, end) in ways(base, model, tmp_path).items():
        with pytest.raises(VectorError) as caught:
            TaskVector.between(start, end)
        assert "tied" in str(caught.value) and (LOOKUP in str(caught.value) or HEAD in str(caught.value)), way
    with pytest.raises(VectorError, match="tied"):
        compose_files(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", TOGETHER)
def test_an_adapter_that_keeps_the_tie_is_right(tmp_path, name):
    base = language_model(tied=True)
    model = adapted(base, TOGETHER[name])
    for start, end in ways(base, model, tmp_path).values():
        v = TaskVector.between(start, end)
        # measured 4.4e-7
        assert LOOKUP in v and HEAD not in v and off_by(model, base, v) < 4e-6


def test_twin_without_the_check_the_vector_is_wrong(tmp_path, monkeypatch):
    base = language_model(tied=True)
    model = adapted(base, ADAPTERS["lookup"])
    monkeypatch.setattr(adapters, "joined_ties", lambda changed, *_: {n: n for n in changed})
    assert off_by(model, base, TaskVector.between(base, model)) > 0.1


def test_a_live_adapter_on_a_tied_model_fits_an_untied_copy_of_its_base():
    base = language_model(tied=True)
    model = adapted(base, ADAPTERS["lookup"])
    untied = language_model(tied=False)
    untied.load_state_dict(base.state_dict())
    assert off_by(model, untied, TaskVector.between(untied, model)) < 2e-6


def test_copies_that_peft_saves_of_tied_embeddings(tmp_path):
    """`save_embedding_layers` writes the head too, which a tied base has no name for in its files."""
    base = language_model(tied=True)
    model = adapted(base, {"target_modules": ["q_proj"]})
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert any("lm_head" in n for n in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    for start in (base, tmp_path / "base"):
        assert off_by(model, base, TaskVector.between(start, tmp_path / "adapter")) < 2e-6


def test_messages():
    tied = {"a": "a", "b": "a", "c": "c"}
    assert joined_ties(["a", "b"], tied, lambda *_: True, False) == {"a": "a"}
    assert joined_ties(["b", "c"], tied, lambda *_: True, True) == {"a": "b", "c": "c"}
    with pytest.raises(VectorError, match="changes b but not a; in the pretrained model the two are tied, so a"):
        joined_ties(["b"], tied, lambda *_: True, False)
    with pytest.raises(VectorError, match="changes a and b in different ways; in the pretrained model b is tied to a"):
        joined_ties(["a", "b"], tied, lambda *_: False, True)


def test_what_files_tell(tmp_path):
    table, other = Kind((30, 8), torch.float32), Kind((8, 8), torch.float32)
    alone = {"embed.weight": table, "fc.weight": other}
    with pytest.raises(VectorError, match="files hold no head .*; files do not show whether they are tied"):
        refuse_unknown_tie("embed.weight", (30, 8), alone, {})
    with pytest.raises(VectorError, match="no pretrained model is given; files do not show"):
        refuse_unknown_tie("embed.weight", (30, 8), alone, None)
    refuse_unknown_tie("embed.weight", (30, 8), {**alone, "head.weight": table}, None)
    for config, fine in (
        ({"tie_word_embeddings": True}, False), ({"tie_word_embeddings": False}, True),
        ({"text_config": {"tie_word_embeddings": False}}, True), ({"vocab_size": 99}, True),
        ({"architectures": ["BertModel"]}, True), ({"architectures": ["BertForMaskedLM"]}, False),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config))
        for source in (tmp_path, tmp_path / "model.safetensors"):
            if fine:
                refuse_unknown_tie("embed.weight", (30, 8), alone, source)
            else:
                with pytest.raises(VectorError, match="whether they are tied|says that they are tied"):
                    refuse_unknown_tie("embed.weight", (30, 8), alone, source)
