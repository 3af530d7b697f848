"""Small CLIP models with random weights, as files, and real images to show them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

DATA = Path(os.environ.get("HATCL_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
WORDS = 'a photo of the number digit small big zero one two airplane bird cat dog 0 1 2 3 4 5 6 7 8 9 : . "'.split()


def open_clip_folder(folder: Path, **vision: object) -> str:
    """A model in `folder`, as open_clip keeps its own; what `--model` is for it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], **vision}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return f"open_clip:local-dir:{folder}"


def open_clip_model(seed: int = 0, **vision: object) -> torch.nn.Module:
    import open_clip

    torch.manual_seed(seed)
    return open_clip.CLIP(**{**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], **vision}}).eval()


def transformers_folder(folder: Path, seed: int = 0) -> torch.nn.Module:
    """A `CLIPModel` of transformers, with a tokenizer of a few words, saved into `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[BOS]", "[EOS]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]"
    ).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = CLIPConfig(
        vision_config={**sizes, "image_size": 32, "patch_size": 8, "projection_dim": 16},
        text_config={
            **sizes, **special, "vocab_size": len(vocabulary), "max_position_embeddings": 16, "projection_dim": 16,
        },
        projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    return model


def moved(model: torch.nn.Module, part: str, seed: int = 1, by: float = 0.02) -> dict[str, torch.Tensor]:
    """The state dict with the parameters of a part moved at random, as fine-tuning would."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: t + by * torch.randn(t.shape, generator=generator)
        if n.startswith(part) and t.is_floating_point()
        else t.clone()
        for n, t in model.state_dict().items()
    }


def save(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    save_file({n: t.detach().clone().contiguous() for n, t in tensors.items()}, path)
    return path


def real_images(name: str, classes: int, count: int, path: Path, test: int = 12) -> Path:
    """The first classes of a data set of HATCL_DATA, a few of each, as an `.npz` file."""
    source = DATA / name / "data.npz"
    if not source.exists():
        pytest.skip(f"needs the real images of {name}: HATCL_DATA is to name a folder with {name}/data.npz")
    with np.load(source, allow_pickle=False) as file:
        arrays = {}
        for part, most in (("train", count), ("test", test)):
            x, y = file[f"x_{part}"], file[f"y_{part}"]
            at = np.concatenate([np.flatnonzero(y == c)[:most] for c in range(classes)])
            arrays |= {f"x_{part}": x[at], f"y_{part}": y[at]}
    np.savez(path, **arrays)
    return path
