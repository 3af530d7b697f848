"""Names of an adapter's tensors: peft's, matched by segment; twins where a match by substring would go wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hatcl
from hatcl.errors import GraftError, SkillError, VectorError
from hatcl.skills.orthogonal import orthogonality
from hatcl.skills.switch import adapter_tensors, add_copy
from hatcl.skills.tensors import active_adapter, adapters_of, skill_tensors

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.fc(self.words(ids)).mean(1))


def adapted(**options) -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["words", "fc"], **options)
    return peft.get_peft_model(Net(), config)


def test_the_names_are_those_of_pefts_own_file():
    model = adapted()
    got = skill_tensors(model)
    assert set(got) == set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    assert got["base_model.model.fc.lora_A.weight"] is model.base_model.model.fc.lora_A["default"].weight


def test_two_adapters_have_the_same_names_and_other_tensors():
    model = adapted()
    model.add_adapter("default_2", peft.LoraConfig(r=2, target_modules=["words", "fc"]))
    one, two = skill_tensors(model, "default"), skill_tensors(model, "default_2")
    assert list(one) == list(two) and not {id(p) for p in one.values()} & {id(p) for p in two.values()}
    assert adapters_of(model) == ["default", "default_2"] and active_adapter(model) == "default"


def test_a_compiled_model_has_the_same_names():
    for model in (adapted(), Net()):
        assert list(skill_tensors(torch.compile(model, backend="eager"))) == list(skill_tensors(model))


def test_an_adapter_that_matches_nothing_raises_and_names_those_there():
    with pytest.raises(SkillError, match=r"adapter 'defalt' matches no LoRA .* it has default; did you mean 'default'"):
        skill_tensors(adapted(), "defalt")
    with pytest.raises(SkillError, match=r"adapter 'a' matches no LoRA tensor of Net; it has none"):
        skill_tensors(Net(), "a")


def test_several_active_adapters_raise():
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["words", "fc"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(SkillError, match=r"2 adapters are active \(default, other\), expected one; activate one"):
        skill_tensors(model)


def test_full_fine_tuning_takes_what_is_trained():
    model = Net()
    model.words.requires_grad_(False)
    assert list(skill_tensors(model)) == ["fc.weight", "fc.bias", "head.weight", "head.bias"]
    with pytest.raises(SkillError, match="has no LoRA adapter and no parameter that requires a gradient"):
        skill_tensors(model.requires_grad_(False))


def experts():
    """A small mixture of experts, whose experts lie in one parameter, with LoRA on it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=16, num_local_experts=3, max_position_embeddings=8,
    )  # fmt: skip
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return peft.get_peft_model(transformers.MixtralForCausalLM(config), peft.LoraConfig(r=2, target_parameters=targets))


def test_factors_of_stacked_experts_are_no_pairs():
    """peft has A expert by expert and B rank by rank: the twin is its own product, which is not that of the pairs."""
    model = experts()
    layer = next(m for m in model.modules() if getattr(m, "parameter_name", "") == "down_proj")
    a, b = (torch.randn_like(f["default"].weight) for f in (layer.lora_A, layer.lora_B))
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)
    peft_says, pairs_say = layer.get_delta_weight("default").sum(0), layer.scaling["default"] * b @ a
    assert not torch.allclose(peft_says.squeeze(), pairs_say, atol=1e-2)
    text = (
        r"experts: its LoRA \(target_parameters\) covers 3 experts in one parameter, where rows of A and columns of B"
    )
    vector = hatcl.TaskVector({n: torch.ones_like(p) for n, p in model.named_parameters() if "lora_" in n})
    for error, call in (
        (SkillError, lambda: skill_tensors(model)), (SkillError, lambda: hatcl.SkillScorer(model)),
        (SkillError, lambda: orthogonality(model)), (SkillError, lambda: adapter_tensors(model, "default")),
        (SkillError, lambda: add_copy(model, "default", "stable")), (SkillError, lambda: hatcl.ILoRA(model)),
        (VectorError, lambda: hatcl.compose(model, [vector], "lora_pair")),
        (GraftError, lambda: hatcl.select_graft(model, model, 0.1, grain="lora_pair")),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            call()
    assert list(model.peft_config) == ["default"]
    with pytest.raises(VectorError, match="target_parameters: it changes parameters instead of layers"):
        hatcl.TaskVector.between(None, model)


def test_a_parameter_that_is_one_matrix_has_pairs():
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_parameters=["fc.weight"], target_modules=[]))
    assert len(skill_tensors(model)) == 2
