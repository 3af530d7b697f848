"""Tiny text models and tasks, without any file."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn import functional as F

import hatcl
from hatcl.continual import (
    ContinualTask,
    Progress,
    SequenceResult,
    TextData,
    label_word_task,
    learn_sequence,
    list_continual_methods,
)

WORDS = [f"w{i}" for i in range(20)]
OUT = ["red", "green", "blue", "warm", "cold"]
TARGETS = r".*layer\..*(query|value|dense)"  # without the pooler, which nothing uses
SPECIAL = ["<pad>", "</s>", "<unk>"]


@functools.cache
def tokenizer() -> Any:
    """Whole words; `tok` in front, which post-processing of real tokenizers also adds."""
    names = [*SPECIAL, *WORDS, *OUT, "ask", ":"]
    inner = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def vocabulary() -> int:
    return len(tokenizer())


def bert(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=vocabulary(), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    return transformers.BertModel(config)


def adapted(base: Any = None, seed: int = 0, **options: Any) -> Any:
    base = bert(seed) if base is None else base
    torch.manual_seed(seed)
    return peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, **options}))


def made(method: str, base: Any = None) -> Any:
    """A model that the method can learn with."""
    if not list_continual_methods()[method].adapted:
        return bert() if base is None else base
    return gated(base) if method == "hat" else adapted(base)


def gated(base: Any = None, seed: int = 0) -> Any:
    """With gates over the pairs, for three tasks."""
    model = adapted(base, seed)
    tokens = dict(tokenizer()(["w1 w2 w3", "w4 w5"], padding=True, return_tensors="pt"))
    torch.manual_seed(seed)
    return hatcl.convert(model, 3, {n: tokens[n] for n in ("input_ids", "attention_mask")})


def texts(seed: int, words: tuple[str, ...] = ("warm", "cold"), count: int = 24) -> TextData:
    """The class is told by which of two halves of the words occur; which halves differs by seed."""
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(WORDS), generator=g).tolist()
    rows = []
    for i in range(2 * count):
        c = i % len(words)
        share = len(WORDS) // len(words)
        pool = [WORDS[k] for k in order[c * share : (c + 1) * share]]
        length = 3 + int(torch.randint(5, (), generator=g))
        picked = [pool[int(torch.randint(len(pool), (), generator=g))] for _ in range(length)]
        rows.append((" ".join(picked), words[c]))
    return TextData(rows[:count], rows[count : count + 8], rows[count:])


def text_tasks(base: Any, count: int = 3, size: int = 16) -> list[ContinualTask]:
    words = [("warm", "cold"), ("red", "green", "blue"), ("green", "warm")]
    return [label_word_task(f"task {i}", texts(i, words[i], size), base, tokenizer()) for i in range(count)]


def vector_task(name: str, seed: int, classes: int = 2, count: int = 24) -> ContinualTask:
    """Labelled vectors of 6 numbers, with a loss and a score of the user's own."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * count, 6, generator=g)
    y = (x @ torch.randn(6, classes, generator=g)).argmax(1)
    rows = [(x[i], int(y[i])) for i in range(count)]

    def collate(some: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack([v for v, _ in some]), torch.tensor([c for _, c in some])

    def loss(model: Any, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch[0])[:, :classes], batch[1])

    def score(model: Any) -> float:
        return float((model(x[count:])[:, :classes].argmax(1) == y[count:]).float().mean())

    return ContinualTask(name, rows, collate, loss, score)


QUICK = {"epochs": 2, "batch_size": 8, "lr": 3e-2}
METHODS = sorted(list_continual_methods())
# small enough that the memory overflows and that the stable adapter moves
CHANGED: dict[str, dict[str, Any]] = {
    "replay": {"buffer_size": 16},
    "ilora": {"ema_alpha": 0.8, "ilora_buffer_size": 16, "samples": 8},
}


def plain(seed: int = 0) -> nn.Module:
    """A network without LoRA, with running statistics."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


class Kill(BaseException):
    """Like KeyboardInterrupt."""


def killer(until: tuple[int, str] | None, step: int = 0) -> Callable[[Progress], None]:
    """Stops a run in a stage, while learning (from a step on) or scoring."""

    def tell(at: Progress) -> None:
        if until is not None and at.stage == until[0] and at.doing == until[1] and at.step >= step:
            raise Kill

    return tell


def run(
    method: Any,
    folder: Path | None = None,
    seed: int = 0,
    model: Any = None,
    tasks: list[ContinualTask] | None = None,
    until: tuple[int, str] | None = None,
    step: int = 0,
    seconds: float = 60.0,
    **options: Any,
) -> tuple[Any, SequenceResult]:
    """Learn three tiny text tasks."""
    model = made(method) if model is None else model
    tasks = text_tasks(bert()) if tasks is None else tasks
    result = learn_sequence(
        model, tasks, method, {**QUICK, "seed": seed, "checkpoint_seconds": seconds, **options},
        method_options=CHANGED.get(method), folder=folder, on_progress=killer(until, step),
    )  # fmt: skip
    return model, result


def files(folder: Path) -> dict[str, bytes]:
    """Every file's content."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of its state."""
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """The same names and the same bits?"""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def causal_lm(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocabulary(), n_embd=8, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1,
        **options,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def write_texts(path: Path, data: TextData) -> None:
    """As a file of a task."""
    parts = {"train": data.train, "dev": data.validation, "test": data.test}
    path.write_text(json.dumps({n: [list(pair) for pair in rows] for n, rows in parts.items()}))
