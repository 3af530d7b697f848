"""Names of an adapter's tensors: peft's, matched by segment; twins where a match by substring would go wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hatcl.errors import SkillError
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
