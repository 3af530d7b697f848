"""A second adapter, and computing with it: nothing else notices, also not by an exception."""

from __future__ import annotations

import copy

import pytest
import torch
from ilora_parts import adapted, batch_of, bert, disturb, plain_bert, same, state, texts
from torch import nn

from hatcl.errors import SkillError
from hatcl.skills.switch import adapter_tensors, add_copy, check_peft, of_adapters, pairs, using

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


def flags(model):
    return {n: p.requires_grad for n, p in model.named_parameters()}


def modes(model):
    return {n: m.training for n, m in model.named_modules()}


def mixed() -> nn.Module:
    """In training, but for one layer; one factor of the adapter is not trained."""
    model = bert(dropout=0.1).train()
    model.base_model.model.bert.encoder.layer[0].eval()
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)
    return model


def test_an_added_copy_changes_nothing_that_was_there():
    model = mixed()
    before, was, ran, rng = state(model), flags(model), modes(model), torch.get_rng_state()
    add_copy(model, "default", "stable")
    assert torch.equal(rng, torch.get_rng_state()) and model.active_adapter == "default"
    after, now, runs = state(model), flags(model), modes(model)
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert all(now[n] == flag for n, flag in was.items()) and all(runs[n] == mode for n, mode in ran.items())
    assert not any(flag for n, flag in now.items() if n not in was)
    ours, theirs = pairs(model, "default", "stable")
    assert len(ours) == 8 + 2  # A and B of four layers, and the classifier's weight and bias
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(ours, theirs, strict=True))


def test_peft_alone_draws_numbers_and_starts_anew():
    model = bert()
    rng = torch.get_rng_state()
    model.add_adapter("stable", copy.deepcopy(model.peft_config["default"]))
    assert not torch.equal(rng, torch.get_rng_state())
    ours, theirs = pairs(model, "default", "stable")
    assert not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_what_was_is_put_back(evaluate, fails):
    model = mixed()
    add_copy(model, "default", "stable")
    disturb(model, "stable")
    batch = batch_of(texts())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(**batch).loss.backward()
    optimizer.step()
    kept = copy.deepcopy(optimizer.state_dict())
    before, was, ran = state(model), flags(model), modes(model)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    try:
        with using(model, "stable", evaluate=evaluate):
            assert model.active_adapter == "stable" and model.base_model.active_adapters == ["stable"]
            assert flags(model) == was
            assert not any(modes(model).values()) if evaluate else modes(model) == ran
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert model.active_adapter == "default" and model.base_model.active_adapters == ["default"]
    assert flags(model) == was and modes(model) == ran and same(state(model), before)
    assert str(optimizer.state_dict()) == str(kept)
    assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters() if p.grad is not None)


def test_pefts_own_switch_would_leave_the_stable_adapter_trainable():
    model = mixed()
    add_copy(model, "default", "stable")
    was = flags(model)
    model.set_adapter("stable")
    assert flags(model) != was
    model.set_adapter("default")
    assert flags(model) != was  # the factor that was not trained is now


def test_the_gradient_survives_a_switch_between_forward_and_backward():
    model = bert()
    add_copy(model, "default", "stable")
    disturb(model, "stable")
    batch = batch_of(texts())
    model(**batch).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = model(**batch).loss
    with torch.no_grad(), using(model, "stable", evaluate=True):
        model(**batch)
    loss.backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert same(got, expected) and not any("stable" in n for n in got)


def test_it_computes_what_a_model_with_that_adapter_alone_computes():
    model = bert()
    alone = copy.deepcopy(model).eval()
    add_copy(model, "default", "stable")
    disturb(model, "stable")
    ours = dict(adapter_tensors(model, "stable"))
    with torch.no_grad():
        for name, p in adapter_tensors(alone, "default").items():
            p.copy_(ours[name])
    batch = batch_of(texts())
    with using(model, "stable", evaluate=True):
        assert torch.equal(model(**batch).logits, alone(**batch).logits)
    assert not torch.equal(model.eval()(**batch).logits, alone(**batch).logits)


@pytest.mark.parametrize("option", [{"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "pissa"}])
def test_other_variants_are_copied_whole(option):
    model = bert(**option)
    base = {n: t for n, t in state(model).items() if not of_adapters(n)}
    add_copy(model, "default", "stable")
    assert same(base, {n: t for n, t in state(model).items() if not of_adapters(n)})
    batch = batch_of(texts())
    plastic = model.eval()(**batch).logits
    with using(model, "stable"):
        assert torch.equal(model(**batch).logits, plastic)


# --- refused ---


def test_what_is_no_peft_model_or_is_merged():
    with pytest.raises(SkillError, match="Linear is not a peft model; wrap it with peft.get_peft_model"):
        check_peft(nn.Linear(2, 2))
    native = plain_bert()
    native.add_adapter(peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(SkillError, match="were added by transformers' own add_adapter.* wrap the base instead, with"):
        check_peft(native)
    model = bert()
    model.merge_adapter()
    with pytest.raises(SkillError, match=r"query: the adapter is merged into its base; call unmerge_adapter\(\) first"):
        check_peft(model)


def test_another_kind_and_options_that_two_adapters_would_share():
    for option, value in (("bias", "all"), ("bias", "lora_only")):
        model = bert(**{option: value})
        before, names = state(model), list(model.peft_config)
        with pytest.raises(
            SkillError, match=f"adapter 'default' has {option}='{value}', which two adapters of one model"
        ):
            add_copy(model, "default", "stable")
        assert same(state(model), before) and list(model.peft_config) == names
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    ia3 = peft.get_peft_model(base, peft.IA3Config(target_modules=["0"], feedforward_modules=[]))
    with pytest.raises(SkillError, match="adapter 'default' is IA3, expected LORA"):
        add_copy(ia3, "default", "stable")
    with pytest.raises(SkillError, match="no adapter 'defalt'; the model has default; did you mean 'default'"):
        add_copy(bert(), "defalt", "stable")


def test_an_adapter_that_was_deleted():
    model = bert()
    add_copy(model, "default", "stable")
    model.delete_adapter("stable")
    with pytest.raises(SkillError, match="no adapter 'stable'; the model has default"), using(model, "stable"):
        pass


def test_what_peft_itself_cannot_hold_twice(monkeypatch):
    model = bert()

    def refuse(*args, **kwargs):
        raise ValueError("only one")

    monkeypatch.setattr(model, "add_adapter", refuse, raising=False)
    with pytest.raises(SkillError, match="peft cannot hold a second adapter in addition to 'default': only one"):
        add_copy(model, "default", "stable")


def test_adapters_of_other_rank_targets_or_scaling():
    def two(**options):
        model = adapted(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), {"target_modules": ["0"]})
        model.add_adapter("stable", peft.LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["0"], **options}))
        return model

    assert len(pairs(two(), "default", "stable")[0]) == 2
    a = "base_model.model.0.lora_A.weight"
    with pytest.raises(SkillError, match=rf"{a} is \[2, 4\] in the adapter 'default', \[3, 4\] in 'stable'; both need"):
        pairs(two(r=3), "default", "stable")
    with pytest.raises(
        SkillError, match=r"model.1.lora_A.weight is lacking in the adapter 'default', \[2, 4\] in 'stable'"
    ):
        pairs(two(target_modules=["0", "1"]), "default", "stable")
    with pytest.raises(SkillError, match=r"'default' is scaled by 2.0, 'stable' by 4.0; both need the same lora_alpha"):
        pairs(two(lora_alpha=8), "default", "stable")
    with pytest.raises(SkillError, match="adapter 'none' matches no LoRA tensor"):
        pairs(two(), "default", "none")
