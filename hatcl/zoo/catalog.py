"""Models by name: timm's, torchvision's (`torchvision/resnet18`), and small random ones of transformers' real classes
(`hf/llama`). A timm name can carry options: `deepseek_vit_412m:depth=2` is that model with two blocks."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
import torchvision
from timm.models import _registry
from torch import nn

from ..errors import ConfigError, nearest
from ..integrations.timm_names import PREFIX, example_input, timm_source

Made = tuple[nn.Module, Any]

# the smallest sizes at which a transformer still has every part: two layers, several heads, unequal widths
TEXT = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}  # grouped-query attention
LATENT = {  # attention through a narrow latent, with values and queries of different sizes, and experts
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "head_dim": 4, "v_head_dim": 6,
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "first_k_dense_replace": 1,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": 60, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
T5 = {
    "vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
    "decoder_start_token_id": 0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Spec:
    """A class of transformers, the options of its config, and the kind of inputs that its forward takes."""

    cls: str
    options: Mapping[str, Any]
    inputs: str = "text"


def _text(cls: str, **options: Any) -> Spec:
    return Spec(cls, {**TEXT, **options})


def _grouped(cls: str, **options: Any) -> Spec:
    return Spec(cls, {**GROUPED, **options})


HF: dict[str, Spec] = {
    # encoders with a classification head
    "bert": _text("BertForSequenceClassification"),
    "roberta": _text("RobertaForSequenceClassification", pad_token_id=1, bos_token_id=0),
    "distilbert": Spec(
        "DistilBertForSequenceClassification",
        {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
    ),
    "albert": _text("AlbertForSequenceClassification", embedding_size=24),
    "electra": _text("ElectraForSequenceClassification", embedding_size=24),
    "deberta_v2": _text(
        "DebertaV2ForSequenceClassification", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16,
        norm_rel_ebd="layer_norm", share_att_key=True,
    ),
    "mpnet": _text("MPNetForSequenceClassification", pad_token_id=1, bos_token_id=0),
    "modernbert": _text("ModernBertForSequenceClassification", cls_token_id=1, sep_token_id=2),
    "xlm_roberta": _text("XLMRobertaForTokenClassification", pad_token_id=1, bos_token_id=0),
    "bert_masked_lm": _text("BertForMaskedLM"),
    # decoders with a language-model head, tied and untied
    "gpt2": Spec("GPT2LMHeadModel", {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neo": Spec(
        "GPTNeoForCausalLM",
        {
            "vocab_size": 60, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1]], "window_size": 8,
        },
    ),
    "gpt_neox": _text("GPTNeoXForCausalLM"),
    "opt": _text("OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=24),
    "bloom": Spec("BloomForCausalLM", {"vocab_size": 60, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "llama": _grouped("LlamaForCausalLM"),
    "mistral": _grouped("MistralForCausalLM", sliding_window=8),
    "qwen2": _grouped("Qwen2ForCausalLM", tie_word_embeddings=True),
    "qwen3": _grouped("Qwen3ForCausalLM"),
    "gemma2": _grouped("Gemma2ForCausalLM", sliding_window=8, query_pre_attn_scalar=8),
    "gemma3": _grouped("Gemma3ForCausalLM", sliding_window=8, query_pre_attn_scalar=8),
    "phi3": _grouped("Phi3ForCausalLM"),
    "olmo2": _grouped("Olmo2ForCausalLM"),
    "smollm3": _grouped("SmolLM3ForCausalLM"),
    "glm4": _grouped("Glm4ForCausalLM"),
    "stablelm": _grouped("StableLmForCausalLM", qk_layernorm=True),
    "cohere": _grouped("CohereForCausalLM", use_qk_norm=True),
    "starcoder2": _grouped("Starcoder2ForCausalLM"),
    "nemotron": _grouped("NemotronForCausalLM"),
    "apertus": _grouped("ApertusForCausalLM"),
    "falcon": _text("FalconForCausalLM", num_kv_heads=2, new_decoder_architecture=True),
    "falcon_multi_query": _text("FalconForCausalLM", multi_query=True, new_decoder_architecture=False),
    "deepseek_v2": _text("DeepseekV2ForCausalLM", **LATENT),
    "deepseek_v3": _text("DeepseekV3ForCausalLM", **LATENT, n_group=2, topk_group=1),
    "gpt_oss": _grouped("GptOssForCausalLM", sliding_window=8, num_local_experts=4, num_experts_per_tok=2),
    "mixtral": _grouped("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": _grouped(
        "Qwen3MoeForCausalLM", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1
    ),
    "mamba": Spec("MambaForCausalLM", {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "mamba2": Spec(
        "Mamba2ForCausalLM",
        {
            "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8,
            "n_groups": 2, "chunk_size": 8,
        },
    ),
    "llama_classifier": _grouped("LlamaForSequenceClassification"),
    "gpt2_classifier": Spec(
        "GPT2ForSequenceClassification",
        {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0},
    ),
    # sequence to sequence
    "t5": Spec("T5ForConditionalGeneration", T5, "seq2seq"),
    "t5_gated": Spec(
        "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}, "seq2seq"
    ),
    "bart": Spec("BartForConditionalGeneration", SEQ2SEQ, "seq2seq"),
    "bart_classifier": Spec("BartForSequenceClassification", SEQ2SEQ, "eos"),
    "pegasus": Spec("PegasusForConditionalGeneration", SEQ2SEQ, "seq2seq"),
    "t5gemma": Spec(
        "T5GemmaForConditionalGeneration",
        {
            "encoder": {**GROUPED, "sliding_window": 8}, "decoder": {**GROUPED, "sliding_window": 8}, "vocab_size": 60,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        },
        "seq2seq",
    ),
    # vision
    "vit": Spec("ViTForImageClassification", VISION, "image"),
    "deit": Spec("DeiTForImageClassification", VISION, "image"),
    "beit": Spec("BeitForImageClassification", VISION, "image"),
    "swin": Spec(
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        "image",
    ),
    "convnext": Spec(
        "ConvNextForImageClassification",
        {"image_size": 32, "hidden_sizes": [16, 24], "depths": [2, 2], "num_stages": 2},
        "image",
    ),
    "dinov2": Spec("Dinov2ForImageClassification", VISION, "image"),
    "segformer": Spec(
        "SegformerForImageClassification",
        {
            "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 5],
            "sr_ratios": [4, 2, 1, 1],
        },
        "image64",
    ),
    # image and text
    "clip": Spec("CLIPModel", {"text_config": TEXT, "vision_config": VISION, "projection_dim": 24}, "image text"),
    "siglip": Spec("SiglipModel", {"text_config": TEXT, "vision_config": VISION}, "image text"),
    # audio
    "whisper": Spec(
        "WhisperForConditionalGeneration",
        {
            **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"}, "num_mel_bins": 12,
            "max_source_positions": 20, "max_target_positions": 32, "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        "mel",
    ),
    "wav2vec2": Spec(
        "Wav2Vec2ForCTC",
        {
            "vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 48, "conv_dim": [16, 16, 16], "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 2],
            "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
        },
        "wave",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Known:
    """A model that can be made from its name.

    Attributes:
        family: timm's module (`resnet`), `torchvision/` and its module, or the `hf/` name.
        make: returns the plain model with random weights, and example inputs.
        recipe: how `hatcl.from_pretrained` makes the plain model again, if the name alone determines it.
    """

    name: str
    family: str
    make: Callable[[], Made]
    recipe: dict[str, Any] | None = None


def names() -> list[str]:
    """Every name that the catalog knows."""
    return [
        *timm.list_models(),
        *(f"torchvision/{n}" for n in torchvision.models.list_models(module=torchvision.models)),
        *(f"hf/{n}" for n in HF),
    ]


def find(pattern: str = "*", family: str | None = None) -> list[str]:
    """The names that match a shell pattern, within one family if given. A timm name also matches with `hat_` in front.
    Options after the pattern are added to each name."""
    pattern, colon, options = pattern.removeprefix(PREFIX).partition(":")
    found = [f"{n}{colon}{options}" for n in fnmatch.filter(names(), pattern)]
    return [n for n in found if known(n).family == family] if family else found


def known(name: str) -> Known:
    """The model with this name.

    Raises:
        ConfigError: the name is not in the catalog; the message names the nearest one.
    """
    kind, _, rest = name.rpartition("/")
    if kind == "hf" and rest in HF:
        return Known(name, name, lambda: _hf(HF[rest]))
    if kind == "torchvision" and name in names():
        builder = torchvision.models.get_model_builder(rest)
        return Known(name, f"torchvision/{builder.__module__.rpartition('.')[2]}", lambda: _torchvision(builder))
    plain, options = _options(name)
    if plain in _registry._model_to_module:
        source = timm_source(plain, options)
        return Known(name, _registry._model_to_module[plain], lambda: _made_by_timm(plain, options), source)
    near = nearest(plain, names())
    raise ConfigError(f"no model is called {name!r}; did you mean {near!r}?")


def parameters(name: str) -> int:
    """The number of parameters of a model, counted without allocating its weights."""
    with torch.device("meta"):
        if name.startswith("hf/"):
            return sum(p.numel() for p in _hf_model(HF[name[3:]]).parameters())
        if name.startswith("torchvision/"):
            model = torchvision.models.get_model_builder(name.partition("/")[2])()
        else:
            plain, options = _options(name)
            model = timm.create_model(plain, **options)
    return sum(p.numel() for p in model.parameters())


def _options(name: str) -> tuple[str, dict[str, int]]:
    """The model's own name, and its options `key=integer,...`.

    Raises:
        ConfigError: the options have another form.
    """
    plain, _, text = name.partition(":")
    options: dict[str, int] = {}
    for part in text.split(",") if text else []:
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier() or not value.isdigit():
            raise ConfigError(f"{name}: {part!r} is no option; expected key=integer, such as {plain}:depth=2")
        options[key] = int(value)
    return plain, options


def _made_by_timm(name: str, options: dict[str, int]) -> Made:
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    return model, example_input(model, options)


def _torchvision(builder: Callable[..., nn.Module]) -> Made:
    torch.manual_seed(0)
    # these two take longer to draw truncated normals than the proof takes
    model = builder(init_weights=False) if builder.__name__ in ("googlenet", "inception_v3") else builder()
    size = 299 if builder.__name__ == "inception_v3" else 224
    return model, torch.randn(2, 3, size, size)


def _hf_model(spec: Spec) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    cls = getattr(transformers, spec.cls)
    made: nn.Module = cls(cls.config_class(**spec.options))
    return made


def _hf(spec: Spec) -> Made:
    draw = torch.Generator().manual_seed(0)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(3, 20, (2, length), generator=draw)

    def mask(length: int, left: bool = False) -> torch.Tensor:
        padded = torch.ones(2, length, dtype=torch.long)
        padded[1, slice(0, 3) if left else slice(length - 3, length)] = 0
        return padded

    images = torch.randn(2, 3, 32, 32, generator=draw)
    inputs: dict[str, dict[str, torch.Tensor]] = {
        "text": {"input_ids": ids(12), "attention_mask": mask(12)},
        "seq2seq": {
            "input_ids": ids(12), "attention_mask": mask(12), "decoder_input_ids": ids(8),
            "decoder_attention_mask": mask(8),
        },
        "eos": {"input_ids": torch.cat([ids(11), torch.full((2, 1), 2)], 1), "attention_mask": mask(12, left=True)},
        "image": {"pixel_values": images},
        "image64": {"pixel_values": torch.randn(2, 3, 64, 64, generator=draw)},
        "image text": {"input_ids": ids(12), "attention_mask": mask(12), "pixel_values": images},
        "mel": {
            "input_features": torch.randn(2, 12, 40, generator=draw), "decoder_input_ids": ids(8),
            "decoder_attention_mask": mask(8),
        },
        "wave": {"input_values": torch.randn(2, 800, generator=draw)},
    }  # fmt: skip
    return _hf_model(spec), inputs[spec.inputs]
