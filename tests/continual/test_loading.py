from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import ilora_parts  # noqa: E402
from continual_parts import bert, causal_lm, texts, tokenizer, vocabulary, write_texts  # noqa: E402

from hatcl.continual import learn_sequence  # noqa: E402
from hatcl.continual.folder import base_of  # noqa: E402
from hatcl.continual.loading import (  # noqa: E402
    TextOptions,
    adapted_model,
    label_words,
    measures_of,
    text_tasks,
    with_adapter,
)
from hatcl.continual.text_scores import TEXT_SCORES  # noqa: E402
from hatcl.errors import ConfigError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def folder(tmp_path):
    bert().save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    write_texts(tmp_path / "a.json", texts(0, count=16))
    return tmp_path


def test_a_model_with_an_adapter_and_its_tasks(folder):
    options = TextOptions(rank=2, target=("query",), train=8, word=("a:warm=red",))
    model, words, form = adapted_model(str(folder / "bert"), options, 0)
    again, _, _ = adapted_model(str(folder / "bert"), options, 0)
    assert form == "labels"
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all(".query.lora_" in n for n in names)
    assert all((p == q).all() for p, q in zip(model.parameters(), again.parameters(), strict=True))
    (task,) = text_tasks({"a": folder / "a.json"}, model, words, form, options, None)
    assert task.name == "a" and len(task.train) == 8
    assert set(task.inputs()) >= {"input_ids", "attention_mask"}


def test_a_module_to_save_that_is_not_there(folder):
    options = TextOptions(modules_to_save=("pooller",))
    with pytest.raises(
        ConfigError, match="--modules-to-save: the model has no module 'pooller'; did you mean 'pooler'"
    ):
        adapted_model(str(folder / "bert"), options, 0)


def test_words_of_labels():
    assert label_words(["a:warm=red", "a:cold=sky blue"], ["a"]) == {"a": {"warm": "red", "cold": "sky blue"}}
    with pytest.raises(ConfigError, match="--word: got 'warm=red', expected NAME:LABEL=WORD"):
        label_words(["warm=red"], ["a"])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"form": "label"}, "did you mean 'labels'"),
        ({"rank": 0}, "rank: got 0, expected an integer of at least 1"),
        ({"train": 0}, "train: got 0"),
        ({"dropout": 1}, "dropout: got 1, expected a share"),
        ({"plain": 1}, "plain: got 1, expected True or False"),
    ],
)
def test_options_out_of_range(changes, text):
    with pytest.raises(ConfigError, match=text):
        TextOptions(**changes)


def test_without_peft(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"learning texts needs peft; run: pip install 'hatcl\[hf\]'"):
        adapted_model("any", TextOptions(), 0)


# --- LoRA's kinds, and how the base is loaded ---


def lora_of(model):
    return model.peft_config["default"]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"use_rslora": True}, lambda m: lora_of(m).use_rslora and m.base_model.model.encoder.layer[0].attention.self
            .query.scaling["default"] == 16 / 2**0.5),
        ({"use_dora": True}, lambda m: any("lora_magnitude_vector" in n for n, _ in m.named_parameters())),
        ({"modules_to_save": ("pooler",)}, lambda m: all(p.requires_grad for n, p in m.named_parameters()
            if "pooler.modules_to_save" in n) and "pooler" in lora_of(m).modules_to_save),
        ({"dtype": "bfloat16"}, lambda m: {str(p.dtype) for n, p in m.named_parameters() if "lora" not in n}
            == {"torch.bfloat16"} and {str(p.dtype) for n, p in m.named_parameters() if "lora" in n}
            == {"torch.float32"}),
        ({"gradient_checkpointing": True}, lambda m: m.base_model.model.is_gradient_checkpointing),
    ],
    ids=["use_rslora", "use_dora", "modules_to_save", "dtype", "gradient_checkpointing"],
)  # fmt: skip
def test_an_option_of_lora_has_its_effect_and_the_task_is_learned(options, kept, folder):
    chosen = {"rank": 2, "target": ("query", "value")}
    plain = adapted_model(str(folder / "bert"), TextOptions(**chosen), 0)[0]
    model, words, form = adapted_model(str(folder / "bert"), TextOptions(**chosen, **options), 0)
    assert kept(model)
    with pytest.raises((AssertionError, AttributeError, KeyError, TypeError)):  # without the option it is otherwise
        assert kept(plain)
    (task,) = text_tasks({"a": folder / "a.json"}, model, words, form, TextOptions(train=8, test=8), None)
    result = learn_sequence(model, [task], "tasl", {"epochs": 4, "batch_size": 4, "lr": 1e-2})
    assert 0 <= result.rows[0][0] <= 1


def test_checkpointing_changes_no_gradient(folder):
    def gradients(**options):
        model, words, form = adapted_model(str(folder / "bert"), TextOptions(rank=2, target=("query",), **options), 0)
        (task,) = text_tasks({"a": folder / "a.json"}, model, words, form, TextOptions(), None)
        for module in model.modules():  # two passes would draw dropout anew
            module.p = 0.0 if isinstance(module, torch.nn.Dropout) else getattr(module, "p", None)
        task.loss(model.train(), task.collate(list(task.train[:4]))).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    ours, theirs = gradients(), gradients(gradient_checkpointing=True)
    assert ours and ours.keys() == theirs.keys() and all(torch.equal(g, theirs[n]) for n, g in ours.items())


@pytest.mark.parametrize("bits", [4, 8])
def test_fewer_bits_are_asked_of_transformers(bits, folder, monkeypatch):
    """What the loading hands on, where bitsandbytes is not installed."""
    asked = {}

    def from_pretrained(name, **options):
        asked.update(options)
        raise ValueError("far enough")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", from_pretrained)
    options = TextOptions(bits=bits, dtype="bfloat16")
    with pytest.raises(ConfigError, match="far enough"):
        adapted_model(str(folder / "bert"), options, 0)
    kept = asked["quantization_config"]
    assert (kept.load_in_4bit, kept.load_in_8bit) == (bits == 4, bits == 8)
    if bits == 4:
        assert kept.bnb_4bit_quant_type == "nf4" and kept.bnb_4bit_use_double_quant
        assert kept.bnb_4bit_compute_dtype == torch.bfloat16
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=f"^bits: {bits}-bit weights need bitsandbytes; run: pip install bitsandbytes"
    ):
        adapted_model(str(folder / "bert"), options, 0)


def small_llama(folder):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary(), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    tokenizer().save_pretrained(folder / "llama")


@pytest.mark.parametrize("bits", [4, 8])
def test_learning_on_a_base_of_fewer_bits(bits, tmp_path):
    """QLoRA, where bitsandbytes is installed: the base keeps its bits, the adapter learns and is saved."""
    pytest.importorskip("bitsandbytes")
    small_llama(tmp_path)
    write_texts(tmp_path / "a.json", texts(0, count=16))
    write_texts(tmp_path / "b.json", texts(1, ("red", "green"), count=16))
    options = TextOptions(rank=2, bits=bits, test=4, max_output=2)
    model, words, form = adapted_model(str(tmp_path / "llama"), options, 0)
    before = base_of(model)
    tasks = text_tasks({n: tmp_path / f"{n}.json" for n in "ab"}, model, words, form, options, 64)
    result = learn_sequence(model, tasks, "tasl", {"epochs": 3, "batch_size": 8, "lr": 1e-2}, folder=tmp_path / "run")
    assert base_of(model) == before and result.losses[0][1] < result.losses[0][0]
    assert (tmp_path / "run" / "tasks" / "1_b" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("guarded", [True, False])
def test_evaluation_leaves_4_bits_their_gradients(guarded, tmp_path):
    """On CPUs with AVX512-BF16, bitsandbytes packs 4-bit weights in evaluation, and has no backward pass for them."""
    bnb = pytest.importorskip("bitsandbytes")
    if not bnb.functional.has_avx512bf16():
        pytest.skip("bitsandbytes packs no weights on this CPU")
    small_llama(tmp_path)
    model = adapted_model(str(tmp_path / "llama"), TextOptions(rank=2, bits=4), 0)[0]
    if not guarded:
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = True
    batch = {"input_ids": torch.tensor([[3, 4, 5, 6]]), "labels": torch.tensor([[3, 4, 5, 6]])}
    with torch.no_grad():
        model.eval()(**batch)
    model.train()(**batch).loss.backward()
    reached = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert bool(reached) is guarded


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"bits": 3}, "bits: got 3, expected 4, 8 or None"),
        ({"dtype": "float8"}, "dtype: got 'float8', expected one of float32, bfloat16, float16"),
        ({"use_dora": 1}, "use_dora: got 1, expected True or False"),
    ],
)
def test_options_of_lora_out_of_range(changes, text):
    with pytest.raises(ConfigError, match=text):
        TextOptions(**changes)


def test_measures_of_tasks(folder, monkeypatch):
    assert measures_of(["a=rouge_l"], ["a", "b"]) == {"a": "rouge_l"}
    for specs, words in (
        (["rouge_l"], "--measure: got 'rouge_l', expected NAME=MEASURE"),
        (["c=sari"], "--measure: got 'c', expected one of a"),
        (["a=rouge"], "--measure: got 'rouge', expected one of match, .*did you mean 'rouge_l'"),
    ):
        with pytest.raises(ConfigError, match=words):
            measures_of(specs, ["a"])
    model, words, form = adapted_model(str(folder / "bert"), TextOptions(rank=2, target=("query",)), 0)
    options = TextOptions(measure=("a=sari",), test=2)
    with pytest.raises(ConfigError, match="--measure: with --form labels, a is scored by accuracy; leave it out"):
        text_tasks({"a": folder / "a.json"}, model, words, form, options, None)
    causal_lm().save_pretrained(folder / "gpt2")
    tokenizer().save_pretrained(folder / "gpt2")
    model, words, form = adapted_model(str(folder / "gpt2"), TextOptions(rank=2), 0)
    monkeypatch.setitem(TEXT_SCORES, "sari", lambda source, given, expected: 0.125)
    (task,) = text_tasks({"a": folder / "a.json"}, model, words, form, options, None)
    assert task.score(model.eval()) == 0.125


def test_an_adapter_is_made_without_a_word():
    """peft asks for an attribute that transformers has renamed, which users could do nothing about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("default", message="(?!.*is_gradient_checkpointing)")
        with_adapter(ilora_parts.plain_bert(), TextOptions(rank=2, target=("query",)))
