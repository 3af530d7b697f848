"""What transformers, peft and huggingface_hub would write of a converted model is what hatcl reads, and nobody else."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import re
import weakref

import parts
import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

import hatcl
from hatcl.config import HATConfig
from hatcl.hat.saving import pretrained, writers
from hatcl.hat.saving.pretrained import load_pretrained_
from hatcl.hat.saving.writers import READ_BY_HATCL, give_back, take_over

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = {"input_ids": torch.randint(50, (4, 6), generator=torch.Generator().manual_seed(0))}
IMAGES = {"pixel_values": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def bert():
    config = transformers.BertConfig(vocab_size=50, intermediate_size=64, **SMALL)
    return transformers.BertForSequenceClassification(config), WORDS


class OwnBert(transformers.BertForSequenceClassification):
    """A class of one's own, which hatcl cannot make again by itself."""


def own_bert():
    return OwnBert(transformers.BertConfig(vocab_size=50, intermediate_size=64, **SMALL)), WORDS


def vit():
    config = transformers.ViTConfig(intermediate_size=64, image_size=32, patch_size=8, **SMALL)
    return transformers.ViTForImageClassification(config), IMAGES


def resnet():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    return transformers.ResNetForImageClassification(config), IMAGES


def adapted_bert():
    plain, inputs = bert()
    return peft.get_peft_model(plain, peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")), inputs


MAKES = {"bert": bert, "own_bert": own_bert, "vit": vit, "resnet": resnet, "adapted_bert": adapted_bert}


def sealed(name):
    torch.manual_seed(0)
    plain, inputs = MAKES[name]()
    return parts.pretend(hatcl.convert(plain, 2, inputs, verify=False)), inputs


def said(model, inputs, task=1):
    with torch.no_grad():
        return parts.outputs_of(model.eval(), inputs, task)[0]


@pytest.fixture(scope="module", params=MAKES)
def made(request, tmp_path_factory):
    """A model, its inputs, and the folder that its own `save_pretrained` wrote."""
    model, inputs = sealed(request.param)
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    return request.param, model, inputs, folder


def readers(name):
    """Everything of transformers that could make a model of a folder."""
    cls = type(MAKES[name]()[0])
    if name == "adapted_bert":
        cls = transformers.BertForSequenceClassification
    return [cls, transformers.AutoModel] if name != "own_bert" else [cls]


def test_hatcl_reads_what_the_model_itself_wrote(made):
    name, model, inputs, folder = made
    base = MAKES[name]()[0] if name == "own_bert" else None
    again = hatcl.from_pretrained(folder, base=base)
    assert torch.equal(said(again, inputs), said(model, inputs))


@pytest.mark.parametrize("options", [{}, {"attn_implementation": "eager"}], ids=str)
def test_transformers_refuses_it_in_hatcls_words(made, options):
    name, _, _, folder = made
    for reader in readers(name):
        with pytest.raises(ValueError, match=READ_BY_HATCL):
            reader.from_pretrained(folder, **options)


def test_peft_refuses_it(made):
    name, _, _, folder = made
    with pytest.raises(ValueError, match="adapter_config.json"):
        peft.PeftModel.from_pretrained(bert()[0], folder)


def test_twin_what_the_class_itself_writes_loads_as_another_network(tmp_path):
    model, inputs = sealed("bert")
    type(model).save_pretrained(model, tmp_path)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert not torch.equal(plain(**inputs).logits, said(model, inputs))


def test_twin_without_the_mark(tmp_path):
    model, _ = sealed("bert")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("quantization_config") == writers.MARK["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    transformers.AutoModel.from_pretrained(tmp_path)  # another network, and no error


def test_the_config_is_still_transformers_own(made):
    name, model, _, folder = made
    if name == "own_bert":
        pytest.skip("of a class of one's own the config is not known")
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.model_type == model.config.model_type
    sizes = [k for k in ("hidden_size", "hidden_sizes", "vocab_size") if hasattr(model.config, k)]
    assert sizes and all(getattr(config, k) == getattr(model.config, k) for k in sizes)


def test_a_part_of_a_model_is_not_saved_alone(tmp_path):
    model, _ = sealed("bert")
    for act in (model.bert.save_pretrained, model.bert.push_to_hub):
        with pytest.raises(hatcl.HATError, match="save_pretrained: this BertModel is a part of a converted model"):
            act(tmp_path / "part")
    assert not (tmp_path / "part").exists()


class Mixed(nn.Module, PyTorchModelHubMixin):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.first(x).relu())


def test_huggingface_hubs_mixin_is_told_what_to_call(tmp_path):
    x = torch.randn(2, 4)
    model = parts.pretend(hatcl.convert(Mixed(), 2, x))
    for act in (model.save_pretrained, model.push_to_hub):
        with pytest.raises(hatcl.HATError, match="Mixed.from_pretrained, .* cannot read a model with tasks"):
            act(tmp_path / "m")
    assert not (tmp_path / "m").exists()
    again = hatcl.from_pretrained(hatcl.save_pretrained(model, tmp_path / "m"), base=Mixed())
    assert torch.equal(parts.logits(again, 1, x), parts.logits(model, 1, x))
    with pytest.raises(RuntimeError, match="size mismatch for first.weight"):  # and not a network with other numbers
        Mixed.from_pretrained(tmp_path / "m")


def test_twin_without_the_other_shapes_huggingface_hubs_mixin_makes_a_plain_network(tmp_path, monkeypatch):
    monkeypatch.setattr("hatcl.hat.saving.pretrained.is_mixed", lambda model: False)
    x = torch.randn(2, 4)
    model = parts.pretend(hatcl.convert(Mixed(), 2, x))
    again = Mixed.from_pretrained(hatcl.save_pretrained(model, tmp_path / "m"))
    assert not torch.equal(again(x), parts.logits(model, 1, x))


@pytest.mark.parametrize("before", [True, False], ids=["a mask before it", "a layer behind it"])
def test_what_lies_around_a_converted_model_is_not_lost_in_silence(tmp_path, before):
    model = hatcl.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), 2, torch.randn(2, 4))
    whole = nn.Sequential(hatcl.HATMask(4, 2), model) if before else nn.Sequential(model, nn.Linear(3, 3))
    with pytest.raises(hatcl.HATError, match=r"lies outside of the converted HATSequential \(\d such parameters\)"):
        hatcl.save_pretrained(whole, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    hatcl.save_pretrained(nn.Sequential(nn.Flatten(), model), tmp_path / "m")


def test_a_mask_before_a_converted_model_is_kept_by_the_state_as_the_refusal_says():
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(16, 4)
    whole, again = (nn.Sequential(hatcl.HATMask(4, 2), hatcl.convert(net, 2, x)) for _ in range(2))
    optimizer = torch.optim.AdamW(whole.parameters(), 1e-2)
    with hatcl.learn(whole, 0, optimizer, 20) as learning:
        for _ in range(20):
            optimizer.zero_grad()
            (whole(x).pow(2).mean() + learning.penalty()).backward()
            optimizer.step()
    again.load_state_dict(whole.state_dict())
    assert hatcl.tasks(again) == [0] and torch.equal(parts.logits(again, 0, x), parts.logits(whole, 0, x))
    assert hatcl.certify(again, x).exact


def test_a_checkpoint_that_is_older_than_an_option_is_loaded(tmp_path, monkeypatch):
    """An option that is not in the file is what it was without it: its default."""
    x = torch.randn(2, 4)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    model = parts.pretend(hatcl.convert(net, 2, x))
    whole = HATConfig.to_dict
    with monkeypatch.context() as m:
        m.setattr(HATConfig, "to_dict", lambda self: {k: v for k, v in whole(self).items() if k != "protection"})
        hatcl.save_pretrained(model, tmp_path / "old")
    same = hatcl.convert(net, 2, x)
    load_pretrained_(same, tmp_path / "old")
    assert torch.equal(parts.logits(same, 1, x), parts.logits(model, 1, x))
    other = hatcl.convert(net, 2, x, config={"protection": "adahat"})
    with pytest.raises(hatcl.IntegrityError, match=r"\(config: protection differ\)"):
        load_pretrained_(other, tmp_path / "old")


def test_a_copy_writes_itself_and_so_does_a_pickled_one(tmp_path):
    model, inputs = sealed("bert")
    torch.save(model, tmp_path / "whole.pt")
    for n, other in enumerate(
        (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(tmp_path / "whole.pt", weights_only=False))
    ):
        with torch.no_grad():
            other.get_submodule("classifier").hat_tasks[1]._parameters["bias"].add_(1)
        hatcl.hat.digests.record(other, 1)
        other.save_pretrained(tmp_path / str(n))
        assert torch.equal(said(hatcl.from_pretrained(tmp_path / str(n)), inputs), said(other, inputs))
        assert not torch.equal(said(other, inputs), said(model, inputs))


def test_a_model_is_freed_as_soon_as_nobody_has_it():
    model, _ = sealed("bert")
    here = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert here() is None
    finally:
        gc.enable()


def test_a_model_without_such_methods_gets_none():
    model = parts.converted("mlp")
    assert not hasattr(model, "save_pretrained") and not hasattr(model, "push_to_hub")


def test_what_is_taken_over_is_given_back(tmp_path):
    model, _ = sealed("bert")
    give_back(model)
    assert model.save_pretrained.__func__ is transformers.PreTrainedModel.save_pretrained
    assert not any(isinstance(v, writers.Writer) for m in model.modules() for v in vars(m).values())
    take_over(model, {"save_pretrained": lambda m, folder: folder})
    assert model.save_pretrained("x") == "x"


def test_an_extracted_task_writes_as_its_class_does(tmp_path):
    model, inputs = sealed("bert")
    small = hatcl.extract_task(model, 1, inputs).model
    assert not any(isinstance(v, writers.Writer) for m in small.modules() for v in vars(m).values())


@pytest.mark.parametrize("options, text", [
    ({"safe_serialization": False}, "safe_serialization=False, which a converted model does not have"),
    ({"variant": "fp16"}, "variant='fp16', which"), ({"token": "x"}, "token='x', which"),
])  # fmt: skip
def test_options_that_would_have_no_effect(tmp_path, options, text):
    model, _ = sealed("bert")
    with pytest.raises(hatcl.ConfigError, match=f"save_pretrained: got {re.escape(text)}"):
        model.save_pretrained(tmp_path / "m", **options)
    assert not (tmp_path / "m").exists()


def test_options_that_hosts_give(tmp_path):
    model, inputs = sealed("bert")
    model.save_pretrained(tmp_path / "no", is_main_process=False)
    assert not (tmp_path / "no").exists()
    model.save_pretrained(tmp_path / "m", state_dict=model.state_dict(), safe_serialization=True, max_shard_size="1GB")
    assert torch.equal(said(hatcl.from_pretrained(tmp_path / "m"), inputs), said(model, inputs))
    with pytest.raises(hatcl.ConfigError, match="got a state_dict whose .* is not the model's own; load it into the"):
        model.save_pretrained(tmp_path / "n", state_dict={k: v.clone() for k, v in model.state_dict().items()})


def test_push_to_hub_as_an_option_of_saving(tmp_path, monkeypatch):
    model, _ = sealed("bert")
    asked = []
    monkeypatch.setattr(pretrained, "push_to_hub", lambda *args, **options: asked.append((args, options)))
    model.save_pretrained(tmp_path / "m", push_to_hub=True)
    model.save_pretrained(tmp_path / "m", push_to_hub=True, repo_id="a/b", private=True)
    assert asked == [((model, "m"), {"card": None}), ((model, "a/b"), {"card": None, "private": True})]


def test_a_plain_trainers_checkpoints_load(tmp_path):
    pytest.importorskip("accelerate")
    from hatcl.integrations.trainer import HATCallback

    data = [{"input_ids": row, "labels": int(row[0]) % 2} for row in torch.randint(50, (16, 6))]
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True
    )
    for name in ("bert", "adapted_bert"):
        plain, inputs = MAKES[name]()
        model = hatcl.convert(plain, 2, inputs, verify=False)
        with HATCallback(task=0) as callback:
            transformers.Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
        again = hatcl.from_pretrained(tmp_path / "checkpoint-2")
        assert hatcl.tasks(again) == [0] and torch.equal(said(again, inputs, 0), said(model, inputs, 0))
    with pytest.raises(hatcl.IntegrityError, match="There is one in checkpoint-2: give that folder"):
        hatcl.from_pretrained(tmp_path)
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, eval_steps=2, eval_strategy="steps", load_best_model_at_end=True,
        report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=[HATCallback(task=1)])
    with pytest.raises(hatcl.ConfigError, match="load_best_model_at_end: for a peft model .* use HATTrainer"):
        trainer.train()


def test_the_state_of_a_module_alone_says_how_it_is_loaded(tmp_path):
    """As a Trainer saves a model that is none of transformers."""
    from safetensors.torch import load_file, save_file

    model, x = parts.pretend(parts.converted("mlp")), parts.images("mlp")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(hatcl.IntegrityError, match="convert the same model with the same options, and give") as told:
        hatcl.from_pretrained(tmp_path)
    path = re.search(r"load_file\('(.*)'\)", str(told.value)).group(1)
    again = parts.converted("mlp")
    again.load_state_dict(load_file(path))
    assert torch.equal(parts.logits(again, 1, x), parts.logits(model, 1, x))


@pytest.mark.parametrize("stored, ours, remedy", [
    (3, 2, r"call hatcl.add_tasks\(model, 1\), and load it then"),
    (2, 3, r"converted with num_tasks=2, and call hatcl.add_tasks\(model, 1\) then"),
])  # fmt: skip
def test_a_state_with_another_number_of_tasks_says_what_to_do(stored, ours, remedy):
    x = parts.images("mlp")
    a, b = (hatcl.convert(parts.plain("mlp"), n, x, verify=False) for n in (stored, ours))
    parts.pretend(a)
    with pytest.raises(RuntimeError, match=f"room for {stored} tasks, this one has room for {ours}; .*{remedy}"):
        b.load_state_dict(a.state_dict())
    if stored > ours:  # as the text says
        hatcl.add_tasks(b, stored - ours)
        b.load_state_dict(a.state_dict())
        assert torch.equal(parts.logits(b, 2, x), parts.logits(a, 2, x))
    wrapped = nn.Sequential(parts.converted("mlp"))
    with pytest.raises(RuntimeError, match="room for"):
        wrapped.load_state_dict({f"0.{n}": t for n, t in hatcl.convert(parts.mlp(), 2, x).state_dict().items()})
