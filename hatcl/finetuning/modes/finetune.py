"""A new linear head on the hidden state of one token."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...config import one_of
from ...continual.label_words import words_of_labels
from ...data.texts import TextData
from ...errors import ConfigError
from ..forwards import HEAD, HeadForward, embedding_names, open_copy, with_forward
from ..heads import fit_head, new_head
from ..options import HEADS, TaskOptions
from ..prompts import MASK_TEMPLATE, PromptReader, check_length
from ..tasks import FinetuneTask
from ..texts import text_task
from .registry import finetune_mode


def head_task(
    data: TextData,
    model: nn.Module,
    tokenizer: Any,
    *,
    token: str = "cls",
    template: str | None = None,
    head: str = "random",
    max_length: int = 128,
    cut: str = "end",
    seed: int = 0,
    name: str = "task",
    measure: str | None = None,
) -> FinetuneTask:
    """A task for a bare encoder or decoder (transformers' AutoModel): logits `W h + b` from the hidden state h of one
    token, with new W `[C, d]` and b.

    Args:
        token: the token to read: `cls` (the first), `mask` (the template's; by default "{text} It was {mask}."),
        `last`.
        head: `random` (torch's initialisation, from the seed), or `fitted`: by logistic regression on the pretrained
            model's features of the training examples.

    Raises:
        ConfigError: labels, tokenizer or model do not fit; see `PromptReader`.
    """
    one_of("head", head, HEADS)
    labels = words_of_labels(name, data)
    if token == "mask" and template is None:
        template = MASK_TEMPLATE
    read = PromptReader(tokenizer, template, max_length=max_length, cut=cut, at=token)
    check_length(model, max_length)
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    if not isinstance(width, int):
        raise ConfigError(f"{type(model).__name__} has no config.hidden_size; mode finetune needs a transformers model")
    if hasattr(model, HEAD):
        raise ConfigError(f"{type(model).__name__} has a {HEAD!r} already; mode finetune needs a bare AutoModel")
    out = open_copy(model)
    out.add_module(HEAD, new_head(width, len(labels), seed).to(next(out.parameters())))
    with_forward(out, HeadForward(out))
    names = (f"{HEAD}.weight", f"{HEAD}.bias")
    task = text_task(
        name, "finetune", labels, data, out, tokenizer, read, embedding_names(out), names, fresh=names,
        fixed_head=head == "fitted", measure=measure,
    )  # fmt: skip
    if head == "fitted":
        fit_head(task, HEAD)
    return task


@finetune_mode("finetune", loads="AutoModel", paper="Panigrahi et al. 2023, arXiv 2302.06600", own=("token", "head"))
def _head(options: TaskOptions, data: TextData, model: nn.Module, tokenizer: Any, seed: int) -> FinetuneTask:
    return head_task(
        data, model, tokenizer, token=options.token, template=options.template, head=options.head,
        max_length=options.length, cut=options.cut, seed=seed, name=options.name, measure=options.measure,
    )  # fmt: skip
