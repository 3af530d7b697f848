"""Task vectors of peft's LoRA adapters, against peft's own merge."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from vector_parts import same

from hatcl.errors import ConfigError, IntegrityError, VectorError
from hatcl.vectors import adapters
from hatcl.vectors.adapters import is_adapter, lora_deltas
from hatcl.vectors.task_vector import TaskVector

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

SIZE = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
GPT2 = {
    "vocab_size": 30,
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


class Convs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.one = nn.Conv2d(6, 6, 1)
        self.series = nn.Conv1d(2, 5, 3)
        self.groups = nn.Conv2d(6, 6, 3, groups=2)
        self.square = nn.Linear(4, 4)

    def forward(self, x):
        return x


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZE, max_position_embeddings=8))


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, tie_word_embeddings=False))


def vit():
    return timm.create_model("test_vit", num_classes=3)


ATTENTION = ["query", "value"]
CASES = {
    "bert": (bert, {"target_modules": ATTENTION}),
    "rslora": (bert, {"target_modules": ATTENTION, "use_rslora": True, "lora_alpha": 3}),
    "patterns": (
        bert,
        {
            "target_modules": [*ATTENTION, "dense"], "lora_alpha": 5,
            "alpha_pattern": {"layer.0.attention.self.query": 32},
            "rank_pattern": {"query": 2, r"layer\.1\.output\.dense": 3},
        },
    ),
    "patterns and rslora": (bert, {"target_modules": ATTENTION, "rank_pattern": {"query": 2}, "use_rslora": True}),
    "head in full": (bert, {"target_modules": ATTENTION, "modules_to_save": ["classifier"]}),
    "embedding": (bert, {"target_modules": ["word_embeddings", "query"]}),
    "vit": (vit, {"target_modules": ["qkv", "proj", "fc1"], "modules_to_save": ["head"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "convolutions": (Convs, {"target_modules": ["conv", "one", "series", "square"]}),
    "eva": (bert, {"target_modules": ATTENTION, "init_lora_weights": "gaussian"}),
}  # fmt: skip


def trained(model, seed=1):
    """Random values in place of the start, where B is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def adapted(make, options, seed=1):
    """The base and a peft model of a copy of it."""
    torch.manual_seed(0)
    base = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**{"r": 4, **options}))
    return base, trained(model, seed)


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    base, model = adapted(*CASES[request.param])
    return base, model, saved(model, tmp_path / "adapter")


def refused(error, call, *texts):
    with pytest.raises(error) as caught:
        call()
    for text in texts:
        assert text in str(caught.value), str(caught.value)


# --- exact ---


def test_as_peft_merges(case):
    base, model, folder = case
    want = copy.deepcopy(model).merge_and_unload().state_dict()
    changed = {n for n, t in want.items() if not torch.equal(t, base.state_dict()[n])}
    for source in (model, folder, str(folder)):
        v = TaskVector.between(base, source)
        assert v.partial and set(v) == changed == set(v.base)
        got = v.apply_to(base).state_dict()
        # measured 0 for all but convolutions, whose product peft computes by a convolution, in another order: 1.5e-8
        worst = max(float((got[n] - want[n]).abs().max()) for n in want)
        assert worst <= (6e-8 if isinstance(base, Convs) else 0)
        # a module that was trained in full comes back bit for bit
        full = [n for n in changed if n.startswith(("classifier", "head"))]
        assert all(torch.equal(got[n], want[n]) for n in full)


def test_folder_and_model_agree_bit_for_bit(case, reads):
    base, model, folder = case
    live, stored = TaskVector.between(base, model), TaskVector.between(base, folder)
    assert {n: k.shape for n, k in stored.kinds.items()} == {n: k.shape for n, k in live.kinds.items()}
    assert reads == [] and "in files" in repr(stored)
    assert same(live, stored) and reads
    assert {n: k.dtype for n, k in stored.kinds.items()} == {n: t.dtype for n, t in stored.items()}


def test_the_exact_product_of_rank_4():
    base, model = adapted(*CASES["bert"])
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    v = TaskVector.between(None, model)
    got = v["bert.encoder.layer.0.attention.self.query.weight"]
    want = 8 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.equal(got, want.detach()) and torch.linalg.matrix_rank(got) == 4 and v.base is None


def test_a_sum_of_adapters_has_no_cross_terms():
    base, model = adapted(*CASES["bert"])
    model.add_adapter("second", peft.LoraConfig(r=4, target_modules=ATTENTION))
    trained(model, seed=2)
    vectors = []
    for name in ("default", "second"):
        model.set_adapter(name)
        vectors.append(TaskVector.between(base, model))
    got = 0.7 * vectors[0] + 0.3 * vectors[1]
    name = "bert.encoder.layer.0.attention.self.query.weight"
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    exact = 0.7 * layer.get_delta_weight("default").double() + 0.3 * layer.get_delta_weight("second").double()
    # two float32 roundings of numbers below 1: measured 1.2e-9
    assert float((got[name] - exact).abs().max()) < 1e-7 * float(exact.abs().max())
    model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "mixed", combination_type="linear")
    mixed = layer.get_delta_weight("mixed").double()
    assert float((mixed - exact).norm() / exact.norm()) > 0.3  # the twin: products of factors of different adapters
    one = got.apply_to(base).get_parameter(name)
    assert torch.allclose(one, base.get_parameter(name) + exact.float(), atol=1e-7)


def test_adapters_on_different_layers_add_up(tmp_path):
    base, one = adapted(bert, {"target_modules": ["query"]})
    _, two = adapted(bert, {"target_modules": ["value"]})
    both = TaskVector.between(base, one) + TaskVector.between(base, saved(two, tmp_path))
    assert len(both) == 4 and both.partial
    alone = TaskVector.between(base, two).in_memory()
    assert all(torch.equal(both[n], alone[n]) for n in alone)


def test_transformers_own_adapters():
    base, model = adapted(*CASES["bert"])
    native = copy.deepcopy(base)
    assert not is_adapter(native)
    native.add_adapter(peft.LoraConfig(r=4, target_modules=ATTENTION))
    trained(native)
    assert is_adapter(native)
    assert same(TaskVector.between(base, native), TaskVector.between(base, model))


def test_the_flag_for_turned_weights_is_not_trusted_where_shapes_tell(tmp_path):
    """peft writes one `fan_in_fan_out` for all layers, that of the last: wrong for GPT-2's c_attn beside its head."""
    base, model = adapted(gpt2, {"target_modules": ["c_attn", "lm_head"]})
    folder = saved(model, tmp_path)
    assert json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    live = TaskVector.between(base, model)
    for source in (base, base.state_dict()):
        v = TaskVector.between(source, folder)
        assert v["transformer.h.0.attn.c_attn.weight"].shape == (8, 24) and same(v, live)
    # with the base unknown there is only the flag
    assert TaskVector.between(None, folder)["transformer.h.0.attn.c_attn.weight"].shape == (24, 8)
    # shapes do not tell which way a square weight lies; the layer does, or else its namesakes' biases
    base, model = adapted(gpt2, {"target_modules": ["attn.c_proj", "c_attn", "lm_head"]})
    folder = saved(model, tmp_path / "square")
    assert same(TaskVector.between(base.state_dict(), folder), TaskVector.between(base, model))
    bare = {n: t for n, t in base.state_dict().items() if not n.endswith("bias")}
    refused(
        VectorError, lambda: TaskVector.between(bare, folder),
        "does not show which kind transformer.h.0.attn.c_proj.weight is. Pass the pretrained model as a module",
    )  # fmt: skip
    assert same(TaskVector.between(base, folder), TaskVector.between(base, model))


@pytest.mark.parametrize("targets", [["attn.c_proj", "lm_head"], ["attn.c_proj", "mlp.c_fc"], ["q_attn", "score"]])
def test_square_layers_of_both_kinds_from_files(tmp_path, targets, monkeypatch):
    """The config has the last layer's flag, and no other adapted layer speaks against it."""

    def net():
        config = transformers.GPT2Config(**GPT2, tie_word_embeddings=False, add_cross_attention=True, pad_token_id=0)
        return (transformers.GPT2ForSequenceClassification if "score" in targets else transformers.GPT2LMHeadModel)(
            config
        )

    base, model = adapted(net, {"target_modules": targets})
    base.save_pretrained(tmp_path / "base")
    folder = saved(model, tmp_path / "lora")
    live = TaskVector.between(base, model)
    assert same(TaskVector.between(tmp_path / "base", folder), live)
    monkeypatch.setattr(adapters, "_turned_near", lambda name, base: None)
    fooled = TaskVector.between(tmp_path / "base", folder)  # the twin
    assert same(fooled, live) == ("mlp.c_fc" in targets)


def test_embeddings_that_peft_saves_beside_the_pair(tmp_path):
    base, model = adapted(gpt2, {"target_modules": ["wte", "lm_head"]})
    folder = saved(model, tmp_path)
    assert any("base_layer" in n for n in load_file(folder / "adapter_model.safetensors"))  # a copy of the base's
    v = TaskVector.between(base, folder)
    assert set(v) == {"transformer.wte.weight", "lm_head.weight"} and same(v, TaskVector.between(base, model))
    assert same(TaskVector.between(None, folder), v)


def llama(vocabulary=30):
    torch.manual_seed(0)
    config = {**SIZE, "vocab_size": vocabulary, "num_key_value_heads": 2, "max_position_embeddings": 8}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, tie_word_embeddings=False))


ADDED = {
    "trained parameters with": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "trained in full and saved as embeddings": ({"modules_to_save": ["embed_tokens", "lm_head"]}, True),
    "saved as embeddings": ({}, True),
}


@pytest.mark.parametrize("name", ADDED)
def test_added_tokens(tmp_path, name):
    options, embeddings = ADDED[name]
    small, large = llama(), llama()
    large.resize_token_embeddings(33)
    _, model = adapted(lambda: large, {"target_modules": ["q_proj"], **options})
    model.save_pretrained(tmp_path, save_embedding_layers=embeddings)
    stored = {n.rpartition(".")[0].rpartition(".")[2] for n in load_file(tmp_path / "adapter_model.safetensors")}
    if options and embeddings:
        assert {"modules_to_save", "original_module"} <= stored  # as peft writes them
    want = copy.deepcopy(model).merge_and_unload().state_dict()
    for source in (model, tmp_path):
        got = TaskVector.between(large, source).apply_to(large).state_dict()
        assert all(torch.equal(got[n], want[n]) for n in want)
        if source is model and not options:
            continue  # the live adapter has no copies of the tables
        with pytest.raises(VectorError) as caught:
            TaskVector.between(small, source)
        for text in (
            "is [30, 8] in the pretrained model, [33, 8] in the adapter: the vocabulary has 30 entries in the",
            "resize the pretrained model first (model.resize_token_embeddings(33)), or compare the rows that both have",
        ):
            assert text in str(caught.value)
        got = TaskVector.between(small, source, embeddings="common").apply_to(small).state_dict()
        for n in want:
            rows = 30 if want[n].shape[0] == 33 else None
            assert torch.equal(got[n], want[n][:rows])


def test_patterns_choose_among_an_adapters_layers(tmp_path):
    base, model = adapted(*CASES["head in full"])
    for source in (model, saved(model, tmp_path)):
        v = TaskVector.between(base, source, skip="classifier.*")
        assert v.partial and all("attention" in n for n in v) and len(v.base) == len(v) == 4
        assert set(TaskVector.between(base, source, only=["classifier.*"])) == {"classifier.weight", "classifier.bias"}
        assert len(TaskVector.between(base, source, skip="*.word_embeddings.*")) == 6  # a name of the base alone
        with pytest.raises(ConfigError, match="leave none of the adapter's 6"):
            TaskVector.between(base, source, only="*.word_embeddings.*")
        with pytest.raises(ConfigError, match="skip: 'clasifier.*' matches none of .*did you mean 'classifier"):
            TaskVector.between(base, source, skip="clasifier.*")


def test_running_statistics_beside_a_norm_that_was_trained_in_full(tmp_path):
    make = lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))  # noqa: E731
    base, model = adapted(make, {"target_modules": ["0"], "modules_to_save": ["1"]})
    folder = saved(model, tmp_path)
    assert any("running_mean" in n for n in load_file(folder / "adapter_model.safetensors"))
    assert set(TaskVector.between(base, folder)) == {"0.weight", "1.weight", "1.bias"}


def test_keys_with_the_adapters_name(tmp_path):
    """As a state dict has them that was saved without peft."""
    base, model = adapted(*CASES["bert"])
    folder = saved(model, tmp_path)
    want = TaskVector.between(base, folder).in_memory()
    file = folder / "adapter_model.safetensors"
    plain = load_file(file)

    def called(name):
        return {n.replace(".weight", f".{name}.weight"): t.clone() for n, t in plain.items()}

    save_file(called("mine"), file)
    assert same(TaskVector.between(base, folder).in_memory(), want)
    for two, names in (
        ({**called("mine"), **called("other")}, r"2 adapters \(mine, other\)"),
        ({**plain, **called("mine")}, r"2 adapters \(mine, the plain names\)"),
    ):
        save_file(two, file)
        with pytest.raises(
            VectorError, match=f"its keys belong to {names}; save one of them with model.save_pretrained"
        ):
            TaskVector.between(base, folder)
    save_file({**plain, "base_model.model.q.lora_magnitude_vector": torch.ones(2)}, file)
    refused(
        VectorError,
        lambda: TaskVector.between(base, folder),
        "q.lora_magnitude_vector, which is not a factor of a plain",
    )


def test_an_adapter_that_was_saved_empty(tmp_path):
    """By one process of several under DeepSpeed's ZeRO-3, which holds a part."""
    base, model = adapted(*CASES["bert"])
    folder = saved(model, tmp_path)
    file = folder / "adapter_model.safetensors"
    save_file({n: torch.zeros(0) for n in load_file(file)}, file)
    refused(
        VectorError, lambda: TaskVector.between(base, folder), "lora_A.weight: the adapter's tensors are empty; under",
        "DeepSpeed's ZeRO-3", "save_pretrained(folder, state_dict=accelerator.get_state_dict(model))",
    )  # fmt: skip


# --- refused ---


@pytest.mark.parametrize("from_folder", [False, True])
@pytest.mark.parametrize(
    "options, text",
    [
        ({"use_dora": True}, "the adapter has use_dora: DoRA rescales the base's weights, which"),
        ({"lora_bias": True}, "the adapter has lora_bias: it has its own biases"),
        ({"bias": "all"}, "the adapter has bias='all', biases trained in addition"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base's weights before training"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion, or merge it into its base first"),
        ({"trainable_token_indices": {"word_embeddings": [1]}}, "trainable_token_indices: it changes single tokens"),
        ({"layer_replication": [(0, 1), (0, 2)]}, "layer_replication: its layers are copies of the base's"),
    ],
)
def test_what_is_no_sum_is_refused_by_name(tmp_path, options, text, from_folder):
    if "layer_replication" in options:
        base = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SIZE, max_position_embeddings=8, tie_word_embeddings=False)
        )
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["q_proj"], **options))
    else:
        base, model = adapted(bert, {"target_modules": ATTENTION, **options})
    source = saved(model, tmp_path) if from_folder else model
    refused(VectorError, lambda: TaskVector.between(base, source), text)


@pytest.mark.parametrize(
    "option, why",
    [
        ("target_parameters", "it changes parameters instead of layers"), ("use_qalora", "QALoRA pools the inputs"),
        ("megatron_config", "split across devices"), ("use_bdlora", "split across devices"),
        ("alora_invocation_tokens", "some tokens only"), ("arrow_config", "chooses among adapters per token"),
        ("monteclora_config", "draws its weights at random"), ("kasa_config", "singular values"),
    ],
)  # fmt: skip
def test_other_variants_are_refused_by_name(tmp_path, option, why):
    base, model = adapted(*CASES["bert"])
    config = json.loads((saved(model, tmp_path) / "adapter_config.json").read_text())
    assert option in config  # peft still calls it so
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, option: [1]}))
    refused(
        VectorError, lambda: TaskVector.between(base, tmp_path), f"the adapter has {option}: ", why, "merge it into"
    )


def test_another_kind_of_adapter(tmp_path):
    base = bert()
    model = peft.get_peft_model(copy.deepcopy(base), peft.IA3Config(target_modules=["query"], feedforward_modules=[]))
    for source in (model, saved(model, tmp_path)):
        refused(
            VectorError, lambda source=source: TaskVector.between(base, source), "the adapter is IA3, expected LORA"
        )


def test_a_merged_adapter_and_several_active_ones():
    base, model = adapted(*CASES["bert"])
    model.merge_adapter()
    refused(
        VectorError, lambda: TaskVector.between(base, model),
        "bert.encoder.layer.0.attention.self.query: the adapter is merged into its base; call unmerge_adapter() first",
    )  # fmt: skip
    model.unmerge_adapter()
    model.add_adapter("second", peft.LoraConfig(r=4, target_modules=ATTENTION))
    model.base_model.set_adapter(["default", "second"])
    refused(
        VectorError, lambda: TaskVector.between(base, model), "2 adapters are active (default, second), expected one"
    )


def test_grouped_convolutions_and_multihead_attention(tmp_path):
    base, model = adapted(Convs, {"target_modules": ["groups"]})
    for source in (model, saved(model, tmp_path)):
        refused(
            VectorError, lambda source=source: TaskVector.between(base, source),
            "groups is a grouped convolution, whose LoRA is not a product of two matrices; leave it out of",
        )  # fmt: skip
    base, model = adapted(lambda: nn.Sequential(nn.MultiheadAttention(8, 2)), {"target_modules": ["0"]})
    refused(VectorError, lambda: TaskVector.between(base, model), "0 is a MultiheadAttention, whose LoRA has no weight")


def test_another_base(tmp_path):
    base, model = adapted(*CASES["bert"])
    folder = saved(model, tmp_path)
    other = nn.Linear(2, 2)
    for source in (model, folder):
        refused(
            VectorError, lambda source=source: TaskVector.between(other, source),
            "the adapter changes bert.encoder.layer.0.attention.self.query.weight, which the pretrained model lacks (4",
            "pass the model that the adapter was trained on",
        )  # fmt: skip
    v = TaskVector.between(base, folder)
    refused(IntegrityError, lambda: v.apply_to(bert()), "differs from this vector's base")
    tied = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    head = peft.get_peft_model(copy.deepcopy(tied), peft.LoraConfig(r=4, target_modules=["lm_head"]))
    refused(VectorError, lambda: TaskVector.between(tied, head), "lm_head.weight", "the two are tied")


def test_damaged_folders(tmp_path):
    base, model = adapted(*CASES["head in full"])
    folder = saved(model, tmp_path)
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    refused(
        VectorError, lambda: TaskVector.between(None, folder), "holds the fully trained classifier.", "; pass the",
    )  # fmt: skip
    tensors = load_file(file)
    b = next(n for n in tensors if "lora_B" in n)
    save_file({n: t for n, t in tensors.items() if n != b}, file)
    refused(IntegrityError, lambda: TaskVector.between(base, folder), f"lacks {b}; save the adapter again")
    save_file({**tensors, "base_model.model.extra": torch.zeros(1)}, file)
    refused(
        VectorError, lambda: TaskVector.between(base, folder),
        "the adapter changes extra, which the pretrained model lacks (1 such tensors)",
    )  # fmt: skip
    save_file({}, file)
    refused(IntegrityError, lambda: TaskVector.between(base, folder), "lacks its tensors; save the adapter again")
    save_file({n: t * float("nan") for n, t in tensors.items()}, file)
    refused(VectorError, lambda: dict(TaskVector.between(base, folder)), "64 of 64 elements are NaN")
    file.write_bytes(b"")
    refused(IntegrityError, lambda: TaskVector.between(base, folder), "cannot be read as safetensors")
    file.unlink()
    refused(IntegrityError, lambda: TaskVector.between(base, folder), "adapter_model.safetensors: no such file")
    config.write_text("{")
    refused(IntegrityError, lambda: TaskVector.between(base, folder), "adapter_config.json cannot be read as JSON")
    config.write_text("[]")
    refused(IntegrityError, lambda: TaskVector.between(base, folder), "adapter_config.json holds a JSON list")


def test_what_is_an_adapter(tmp_path):
    base, model = adapted(*CASES["bert"])
    assert is_adapter(model) and is_adapter(saved(model, tmp_path))
    assert not any(map(is_adapter, (base, tmp_path / "none", tmp_path / "adapter_config.json", {}, None)))
    assert len(lora_deltas(model, None)) == 4


@pytest.mark.parametrize("change", [{"r": 0}, {"r": 5}, {"rank_pattern": {"0": 3}}, {"lora_alpha": None}])
def test_a_config_of_other_factors_is_refused(tmp_path, change):
    base = nn.Sequential(nn.Linear(6, 6))
    peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    assert len(TaskVector.between(base, tmp_path)) == 1
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(IntegrityError, match="0: its factors have the rank 2, but adapter_config.json says rank"):
        TaskVector.between(base, tmp_path)
