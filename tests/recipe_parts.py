"""Tiny checkpoints of transformers, the same numbers on every machine, and recipes of mergekit over them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hatcl.functional import hashed

MODELS = {"base": 0, "a": 1, "b": 2, "c": 3}  # folder -> seed
LAYERS = 4
SAMPLE = 211  # of mergekit's results every so-manieth element is recorded
A, B, C = ({"model": m, "parameters": {"weight": w}} for m, w in (("a", 0.6), ("b", 0.3), ("c", 0.5)))
BASE = {"base_model": "base"}


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Numbers between -1 and 1 that depend on the shape and the seed alone."""
    count = int(torch.tensor(shape).prod())
    return (hashed(hashed(torch.arange(count)) ^ seed).double() / 2**31 - 1).float().view(shape)


def write_models(folder: Path, kind: str = "llama", size: float = 0.02) -> None:
    """Four fine-tunings of one network, as folders that transformers saves.

    Args:
        kind: `llama` or `gpt2` (whose head is tied). size: of what fine-tuning changed; an eighth of it stays zero.
    """
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    if kind == "llama":
        config: Any = LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
    else:
        config = GPT2Config(
            vocab_size=40, n_embd=16, n_layer=LAYERS, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1
        )
    model = AutoModelForCausalLM.from_config(config)
    for name, seed in MODELS.items():
        model.save_pretrained(folder / name)
        file = folder / name / "model.safetensors"
        tensors = load_file(file)
        for i, (n, t) in enumerate(sorted(tensors.items())):
            start = noise(tuple(t.shape), 1000 + i) * 0.3 + (1 if "norm" in n or "ln_" in n else 0)
            moved = noise(tuple(t.shape), 10_000 * seed + i)
            tensors[n] = start + (torch.where(moved.abs() > 0.125, moved, 0) * size if seed else 0)
        save_file(tensors, file, metadata={"format": "pt"})
        write_tokenizer(folder / name, ["<new>"] if name == "b" else [])


def write_tokenizer(folder: Path, more: list[str]) -> None:
    """A byte-pair tokenizer of 30 tokens and some more."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {t: i for i, t in enumerate(["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "ab", "cd"])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("c", "d")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(more)
    tokenizer.save_pretrained(folder)


def recipe(method: str, models: list[dict[str, Any]] | None = None, **rest: Any) -> dict[str, Any]:
    return {"merge_method": method, "dtype": "float32", **({"models": copy.deepcopy(models)} if models else {}), **rest}


def with_density(*densities: float, **more: Any) -> list[dict[str, Any]]:
    out = copy.deepcopy([A, B, C][: len(densities)])
    for model, density in zip(out, densities, strict=True):
        model["parameters"] |= {"density": density, **more}
    return out


def cases() -> dict[str, dict[str, Any]]:
    """A name -> a recipe: each method with its defaults, then each feature."""
    two, three = [A, B], [A, B, C]
    named = [{"model": m["model"]} for m in three]
    spread = {"weight": [0.1, 0.9]}
    trimmed = with_density(0.5, 0.3, 0.7)
    return {
        "linear": recipe("linear", three),
        "linear, normalize: false": recipe("linear", three, parameters={"normalize": False}),
        "task_arithmetic": recipe("task_arithmetic", three, **BASE),
        "task_arithmetic, lambda, normalize": recipe(
            "task_arithmetic", three, **BASE, parameters={"lambda": 0.7, "normalize": True}
        ),
        "ties": recipe("ties", trimmed, **BASE),
        "ties, rescale, lambda, normalize: false": recipe(
            "ties", trimmed, **BASE, parameters={"rescale": True, "lambda": 0.7, "normalize": False, "int8_mask": True}
        ),
        "ties, a weight below 0": recipe(
            "ties", [*trimmed[:2], {"model": "c", "parameters": {"weight": -0.4, "density": 0.5}}], **BASE
        ),
        "dare_linear": recipe("dare_linear", trimmed, **BASE),
        "dare_linear, rescale: false": recipe("dare_linear", trimmed, **BASE, parameters={"rescale": False}),
        "dare_ties": recipe("dare_ties", trimmed, **BASE),
        "dare_ties, normalize": recipe("dare_ties", trimmed, **BASE, parameters={"normalize": True}),
        "breadcrumbs": recipe("breadcrumbs", with_density(0.5, 0.9, 0.3, gamma=0.05), **BASE),
        "breadcrumbs, most of it kept": recipe("breadcrumbs", with_density(0.95, 0.99, gamma=0.1), **BASE),
        "breadcrumbs_ties": recipe("breadcrumbs_ties", with_density(0.5, 0.9, 0.3, gamma=0.05), **BASE),
        "della": recipe("della", with_density(0.5, 0.6, 0.4, epsilon=0.2), **BASE),
        "della_linear": recipe("della_linear", with_density(0.5, 0.6, 0.4, epsilon=0.2), **BASE),
        "model_stock": recipe("model_stock", named, **BASE),
        "model_stock, filter_wise": recipe("model_stock", named, **BASE, parameters={"filter_wise": True}),
        "sce": recipe("sce", named, **BASE),
        "sce, select_topk": recipe("sce", named, **BASE, parameters={"select_topk": 0.3}),
        "slerp": recipe("slerp", named[:1], **BASE, parameters={"t": 0.3}),
        "nuslerp": recipe("nuslerp", two),
        "nuslerp, with a base": recipe("nuslerp", two, **BASE),
        "nuslerp, rows": recipe("nuslerp", two, **BASE, parameters={"nuslerp_flatten": False}),
        "nuslerp, row_wise": recipe(
            "nuslerp", two, **BASE, parameters={"nuslerp_flatten": False, "nuslerp_row_wise": True}
        ),
        "multislerp": recipe("multislerp", three),
        "multislerp, with a base": recipe("multislerp", three, **BASE, parameters={"normalize_weights": False}),
        "karcher": recipe("karcher", named),
        "arcee_fusion": recipe("arcee_fusion", named[:1], **BASE),
        "nearswap": recipe("nearswap", named[:1], **BASE, parameters={"t": 0.01}),
        "nearswap, t below all changes": recipe("nearswap", named[:1], **BASE, parameters={"t": 5e-7}),
        "ram": recipe("ram", named, **BASE, parameters={"epsilon": 0.005}),
        "ramplus_tl": recipe("ramplus_tl", named, **BASE, parameters={"epsilon": 0.01}),
        "passthrough": recipe("passthrough", named[:1]),
        "passthrough, scale": recipe("passthrough", named[:1], parameters={"scale": 0.5}),
        "gradient": recipe(
            "linear", [{"model": "a", "parameters": spread}, {"model": "b", "parameters": {"weight": [1, 0, 0.5]}}]
        ),
        "filters": recipe(
            "slerp",
            named[:1],
            **BASE,
            parameters={
                "t": [
                    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
                    {"value": 0.5},
                ]
            },
        ),
        "slices, passthrough": recipe(
            "passthrough",
            slices=[
                {"sources": [{"model": "a", "layer_range": [0, 3]}]},
                {
                    "sources": [
                        {
                            "model": "b",
                            "layer_range": [1, 4],
                            "parameters": {"scale": [{"filter": "o_proj", "value": 0.0}, {"value": 1.0}]},
                        }
                    ]
                },
            ],
        ),
        "slices, slerp, parameters of a slice": recipe(
            "slerp",
            **BASE,
            slices=[
                {
                    "sources": [{"model": m, "layer_range": [0, 2]} for m in ("base", "a")],
                    "parameters": {"t": [0.2, 0.6]},
                },
                {"sources": [{"model": m, "layer_range": [1, 4]} for m in ("base", "b")]},
            ],
            parameters={"t": 0.5},
        ),
        "out_dtype": recipe("linear", three, out_dtype="bfloat16"),
        "dtype: bfloat16": {**recipe("ties", with_density(1.0, 1.0), **BASE), "dtype": "bfloat16"},
        "no dtype": {k: v for k, v in recipe("linear", three).items() if k != "dtype"},
        "tokenizer_source: base": recipe("linear", three, **BASE, tokenizer_source="base", parameters={"weight": 0.1}),
        "tokenizer_source: union": recipe(
            "linear", three, **BASE, tokenizer_source="union", parameters={"weight": 0.1}
        ),
        "tokenizer, tokens": recipe(
            "linear",
            three,
            **BASE,
            tokenizer={
                "source": "union",
                "pad_to_multiple_of": 8,
                "tokens": {
                    "<new>": {"source": {"kind": "model_token", "model": "a", "token": "x"}},
                    "a": {"source": "c", "force": True},
                    "b": {"source": {"kind": "zero"}, "force": True},
                    "<more>": {"source": {"kind": "model_token", "model": "b", "token_id": 3}},
                },
            },
            parameters={"weight": 0.1},
        ),
    }


def sampled(tensors: dict[str, Tensor]) -> list[float]:
    """Some of the numbers of a result, by name and place."""
    flat = torch.cat([tensors[n].double().reshape(-1) for n in sorted(tensors)])
    return [float(f"{x:.9g}") for x in flat[::SAMPLE].tolist()]


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())
