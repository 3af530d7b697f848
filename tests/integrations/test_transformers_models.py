"""Models of transformers are saved with their config, so that they load without a base module."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import parts
import pytest
import torch
from torch import nn

import hatcl
from hatcl.integrations import transformers_models
from hatcl.sources import build_source, source_of

transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'hatcl[hf]'")

ROOT = Path(__file__).parents[2]
SMALL = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 16,
}  # fmt: skip
IDS = torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(8) < torch.tensor([[8], [5], [3]])).long()
INPUTS = {"input_ids": IDS, "attention_mask": MASK}


def classifier(**options):
    config = transformers.BertConfig(**SMALL, num_labels=5, **options)
    return transformers.BertForSequenceClassification(config)


def language_model(**options):
    config = transformers.Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=True, **options)
    return transformers.Qwen2ForCausalLM(config)


MODELS = {"classifier": classifier, "language_model": language_model}


def sealed(make):
    torch.manual_seed(0)
    return parts.pretend(hatcl.convert(make(), 3, INPUTS), tasks=[0, 2])


def logits(model, task):
    with torch.no_grad():
        return parts.outputs_of(model.eval(), INPUTS, task)[0]


def digests(model):
    return [hashlib.sha256(logits(model, t).numpy().tobytes()).hexdigest() for t in hatcl.tasks(model)]


CODE = """
import hashlib, sys, torch, hatcl
from hatcl.hat.certify import named_outputs
inputs = torch.load(sys.argv[1], weights_only=True)
for folder in sys.argv[2:]:
    torch.manual_seed(99)
    model = hatcl.from_pretrained(folder)
    print(type(model).__name__, *hatcl.tasks(model), hatcl.certify(model, inputs).exact)
    for t in hatcl.tasks(model):
        with torch.no_grad():
            print(hashlib.sha256(next(iter(named_outputs(model, inputs, t).values())).numpy().tobytes()).hexdigest())
"""


def test_another_process_loads_them_without_a_base(tmp_path):
    want, folders = [], []
    for name, make in MODELS.items():
        model = sealed(make)
        folders.append(hatcl.save_pretrained(model, tmp_path / name))
        want += [type(model).__name__, "0", "2", "True", *digests(model)]
    torch.save(INPUTS, tmp_path / "inputs.pt")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CODE, str(tmp_path / "inputs.pt"), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.stdout.split() == want, done.stderr
    assert len(set(want)) == len({"0", "2", "True"}) + 2 + 4  # no two tasks alike


@pytest.mark.parametrize("name", MODELS)
def test_twin_without_its_config_a_model_needs_its_base(name, tmp_path):
    model = sealed(MODELS[name])
    model.hat_gates.source = None
    folder = hatcl.save_pretrained(model, tmp_path)
    with pytest.raises(hatcl.IntegrityError, match="its model class is your own; pass base="):
        hatcl.from_pretrained(folder)
    assert digests(hatcl.from_pretrained(folder, base=MODELS[name]())) == digests(model)


def test_twin_the_config_is_what_is_loaded(tmp_path):
    model = sealed(classifier)
    model.hat_gates.source["config"]["hidden_size"] = 36
    with pytest.raises(hatcl.IntegrityError, match="the map says shape .*, it has"):
        hatcl.from_pretrained(hatcl.save_pretrained(model, tmp_path))


@pytest.mark.parametrize("name", MODELS)
def test_the_config_comes_back_whole(name, tmp_path):
    model = sealed(lambda: MODELS[name](initializer_range=0.03))
    again = hatcl.from_pretrained(hatcl.save_pretrained(model, tmp_path))
    assert type(again).__mro__[1:] == type(model).__mro__[1:] and not again.training
    assert again.config.to_dict() == model.config.to_dict() and again.config.initializer_range == 0.03
    assert again.config._attn_implementation == model.config._attn_implementation


def test_tied_embeddings_stay_tied(tmp_path):
    model = sealed(language_model)
    again = hatcl.from_pretrained(hatcl.save_pretrained(model, tmp_path))
    assert again.lm_head._parameters["weight"] is again.model.embed_tokens._parameters["weight"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_computed_the_same_way(attention, tmp_path):
    """Another implementation gives other last bits; the config's JSON does not say which it was."""
    model = sealed(lambda: classifier(attn_implementation=attention))
    again = hatcl.from_pretrained(hatcl.save_pretrained(model, tmp_path))
    assert again.config._attn_implementation == attention and digests(again) == digests(model)


def test_learning_goes_on_after_loading(tmp_path):
    model = sealed(classifier)
    again = hatcl.from_pretrained(hatcl.save_pretrained(model, tmp_path)).train()
    want = digests(again)
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2, weight_decay=0.1)
    with hatcl.learn(again, 1, optimizer, steps=2) as learning:
        for _ in range(2):
            again.train()
            loss = again(**INPUTS, labels=torch.tensor([0, 1, 4])).loss + learning.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert hatcl.tasks(again) == [0, 1, 2] and [digests(again)[i] for i in (0, 2)] == want
    assert hatcl.certify(again, INPUTS, strict=True).exact


# ---- what is recognised ---------------------------------------------------------------------------


class Own(transformers.BertForSequenceClassification):
    """A user's subclass: its name is not to be found in transformers."""


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(2, 2),
        lambda: nn.Sequential(classifier()),
        lambda: nn.TransformerEncoderLayer(8, 2),
        lambda: Own(transformers.BertConfig(**SMALL)),
    ],
    ids=["linear", "wrapped", "encoder", "subclass"],
)
def test_a_module_that_is_not_of_transformers_is_not_recognised(make):
    assert source_of(make()) is None


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_transformers_is_recognised(name):
    source = source_of(MODELS[name]())
    assert source["kind"] == "transformers" and source["class"] == MODELS[name]().__class__.__name__
    assert source["config"]["hidden_size"] == 32
    assert [p.shape for p in build_source(source).parameters()] == [p.shape for p in MODELS[name]().parameters()]


def test_a_subclass_of_ones_own_loads_with_its_base(tmp_path):
    model = sealed(lambda: Own(transformers.BertConfig(**SMALL)))
    folder = hatcl.save_pretrained(model, tmp_path)
    with pytest.raises(hatcl.IntegrityError, match="its model class is your own; pass base="):
        hatcl.from_pretrained(folder)
    assert digests(hatcl.from_pretrained(folder, base=Own(transformers.BertConfig(**SMALL)))) == digests(model)


def test_a_part_without_a_config_converts():
    from transformers.models.bert.modeling_bert import BertPooler

    pooler = BertPooler(transformers.BertConfig(**SMALL))
    assert hatcl.convert(pooler, 2, torch.randn(2, 5, 32))
    assert source_of(pooler) is None


def test_a_part_that_transformers_does_not_export_is_loaded_or_asks_for_its_base(tmp_path):
    from transformers.models.bert.modeling_bert import BertEncoder

    config = transformers.BertConfig(**SMALL, attn_implementation="eager")
    model = parts.pretend(hatcl.convert(BertEncoder(config), 2, torch.randn(2, 5, 32)))
    folder = hatcl.save_pretrained(model, tmp_path)
    if source_of(BertEncoder(config)) is None:
        with pytest.raises(hatcl.IntegrityError, match="its model class is your own; pass base="):
            hatcl.from_pretrained(folder)
    else:
        assert hatcl.tasks(hatcl.from_pretrained(folder)) == [0, 1]


def test_a_config_with_infinity_in_it_is_read_back():
    config = transformers.Mamba2Config(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, state_size=8, num_heads=8, head_dim=8, n_groups=2
    )
    model = transformers.Mamba2ForCausalLM(config)
    assert build_source(source_of(model)).config.time_step_limit[1] == float("inf")


# ---- a saved model's source is not trusted --------------------------------------------------------


def changed(**changes):
    """A classifier's source, of which something was changed in the file."""
    return {**source_of(classifier()), "kind": "transformers", **changes}


@pytest.mark.parametrize("name", [
    "BertConfig", "BertTokenizer", "AutoModel", "pipeline", "nothing_like_it", "__name__", "models", 3, None, ["x"],
], ids=repr)  # fmt: skip
def test_a_class_that_is_no_model_of_transformers_is_refused(name):
    with pytest.raises(hatcl.IntegrityError) as caught:
        build_source(changed(**{"class": name}))
    assert str(caught.value) == (
        f"the plain model is to be transformers' {name!r}, which is no model of it; pass base= an instance of the "
        "plain module"
    )


@pytest.mark.parametrize("attention", ["somebody/kernel", "flash_attention_2", "", ["sdpa"], {"": "somebody/kernel"}])
def test_attention_that_a_hub_would_give_is_refused(attention):
    with pytest.raises(hatcl.IntegrityError) as caught:
        build_source(changed(attention=attention))
    assert str(caught.value) == (
        f"the plain model is to compute its attention by {attention!r}, expected one of None, 'eager', 'sdpa', "
        "'flex_attention': transformers would get another one from a hub where it is not installed; pass base= an "
        "instance of the plain module"
    )


OPENING = {
    "auto_map": {"AutoModel": "somebody/code--model.Model"}, "trust_remote_code": True, "use_pretrained_backbone": True,
    "_name_or_path": "somebody/model", "name_or_path": "/etc", "attn_implementation": "somebody/kernel",
    "quantization_config": {"load_in_4bit": True},
}  # fmt: skip


def test_what_opens_something_in_a_config_is_dropped():
    model = build_source(changed(config={**source_of(classifier())["config"], **OPENING}))
    kept = model.config.to_dict()
    assert not kept.get("_name_or_path") and model.config.name_or_path == "" and model.config._attn_implementation
    assert not kept.keys() & (OPENING.keys() - {"_name_or_path", "use_pretrained_backbone"})
    assert transformers_models._without_files({"vision_config": [OPENING]}) == {"vision_config": [{}]}


def test_twin_the_config_as_it_is(monkeypatch):
    monkeypatch.setattr(transformers_models, "_without_files", lambda config: config)
    with pytest.raises(AssertionError):
        test_what_opens_something_in_a_config_is_dropped()


def wrapper(**changes):
    config = transformers.TimmWrapperConfig(architecture="test_resnet", num_labels=4)
    source = source_of(transformers.TimmWrapperForImageClassification(config))
    return {**source, "kind": "transformers", "config": {**source["config"], **changes}}


def test_a_timm_model_inside_of_transformers(tmp_path, monkeypatch):
    import timm

    assert build_source(wrapper()).config.architecture == "test_resnet"
    real, seen = timm.create_model, []
    monkeypatch.setattr(timm, "create_model", lambda *a, **options: seen.append((a, options)) or real(*a, **options))
    build_source(wrapper(model_args={"drop_rate": 0.1, "checkpoint_path": str(tmp_path / "w.pth")}))
    assert seen and all("checkpoint_path" not in options for _, options in seen)
    assert seen[-1][1]["drop_rate"] == 0.1
    for name in ("hf-hub:somebody/model", f"local-dir:{tmp_path}"):
        with pytest.raises(hatcl.IntegrityError, match=f"the plain model is to be timm's '{name}', expected one of"):
            build_source(wrapper(architecture=name))
        monkeypatch.setattr(transformers_models, "check_name", lambda name: name)  # the twin: timm goes and looks
        with pytest.raises((OSError, RuntimeError, ValueError)) as caught:
            build_source(wrapper(architecture=name))
        assert not isinstance(caught.value, hatcl.HATError)
        monkeypatch.undo()


def test_backbones():
    without = transformers_models._without_files
    inner = {"model_type": "timm_backbone", "backbone": "resnet18"}
    assert without({"backbone_config": inner}) == {"backbone_config": inner}
    with pytest.raises(hatcl.IntegrityError, match="the plain model is to be timm's 'hf-hub:a/b', expected one of"):
        without({"backbone_config": {**inner, "backbone": "hf-hub:a/b"}})
    with pytest.raises(hatcl.IntegrityError, match=(
        "the plain model is to have the backbone 'a/b', which transformers would look for on a hub; pass base= an inst"
    )):  # fmt: skip
        without({"model_type": "detr", "backbone": "a/b"})
