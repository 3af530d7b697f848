"""What is fine-tuned on what, and how: two frozen, JSON-able dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import Changeable, flag, number, one_of, whole
from ..data.images import FITS
from ..data.published import PublishedTask, published_task
from ..engine.options import COMMON, RATE_SCHEDULES, LoopOptions
from ..errors import ConfigError
from .measuring import MEASURES

STATISTICS = ("held", "learned")
TOKENS = ("cls", "mask", "last")
CUTS = ("end", "head")
HEADS = ("random", "fitted")
NORMALISE = ("data", "model")
PAIR_TEMPLATE = "{text}{sep}{text2}"
SHOTS_SEED = 13  # the first of the five that LM-BFF and its successors use


@dataclass(frozen=True)
class TaskOptions(Changeable):
    """A task made from files: which model, which data, and how the one reads the other.

    Args:
        mode: one of `list_finetune_modes()`.
        model: a folder of transformers or a name on its hub, passed to `from_pretrained` as it is; in mode `image`
            timm's name.
        data: a file: texts as `hatcl.continual.read_texts` reads them, images as `.npz`; of a published task also a
            folder as it is published, or None for its copy on the hub (`datasets`).
        task: a published task of texts: sst-2, sst-5, mr, cr, mpqa, subj, trec, cola, mnli, snli, qnli, rte, mrpc, qqp,
            sts-b or agnews; its template, label words, measure and length, where they are not given.
        k: so many examples of each class to learn from, and as many to validate on, see `k_shot`; None = all.
        data_seed: of the choice of these. file_seed: which of the seeds of a file that holds several choices.
        test: at most so many test examples, always the same random ones; None = all.
        words: label -> the word that stands for it (its class's name); default: the label itself.
        template: text around `{text}` with a `{mask}`, for `prompt`, for `autoregressive` (where `{mask}` may only
            stand last) and for `finetune` with token `mask`; None = the mode's.
        measure: what validation chooses by: accuracy, f1 (of the second label), mcc or pearson; None = the task's, or
            accuracy.
        max_length: tokens of an example with its template; None = the task's, or 128.
        cut: what a long text loses, its `end` or its `head` (LM-BFF's `truncate_head`).
        token: with `finetune`, whose hidden state the head reads: `cls` (the first), `mask` or `last`.
        head: a new head starts `random`, or `fitted` on the pretrained model's features of the training examples, so
            that the pretrained model is better than chance and the body's share of the gain can be told.
        scale: with `labels`, of the cosines.
        plain: without the inputs' first line (the question) and a last `Answer:`.
        weights: with `image`, a safetensors file of the model's weights; its old classifier may be of other classes.
        model_kwargs: with `image`, what timm makes the model with, such as `img_size` or `pretrained`.
        size, fit: with `image`, bring images to this size by `resize` or `pad`; None = the model's, 0 = their own.
        normalise: with `image`, by mean and deviation of the `data` or those of the `model`.

    Raises:
        ConfigError: a value outside its range.
    """

    mode: str
    model: str
    data: str | None = None
    task: str | None = None
    k: int | None = None
    data_seed: int = 0
    file_seed: int = SHOTS_SEED
    test: int | None = None
    words: Mapping[str, str] | None = None
    template: str | None = None
    measure: str | None = None
    max_length: int | None = None
    cut: str = "end"
    token: str = "cls"
    head: str = "random"
    scale: float = 20.0
    plain: bool = False
    weights: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    size: int | None = None
    fit: str = "resize"
    normalise: str = "data"

    def __post_init__(self) -> None:
        for name in ("k", "test", "max_length"):
            whole(name, getattr(self, name), optional=True)
        for name in ("data_seed", "file_seed", "size"):
            whole(name, getattr(self, name), 0, optional=name == "size")
        one_of("cut", self.cut, CUTS)
        one_of("token", self.token, TOKENS)
        one_of("head", self.head, HEADS)
        one_of("fit", self.fit, FITS)
        one_of("normalise", self.normalise, NORMALISE)
        number("scale", self.scale, 0, without="low")
        flag("plain", self.plain)
        if self.measure is not None:
            one_of("measure", self.measure, list(MEASURES))
        published = self.published
        if self.measure is not None and MEASURES[self.measure].of_scores and self.bounds is None:
            raise ConfigError(
                f"measure: {self.measure} is of scores, and these are classes; take another, or leave it out"
            )
        if self.data is None and published is None:
            raise ConfigError("data: got none; give a file (--data), or the name of a published task (--task)")
        if published is None:
            return
        if self.mode == "image":
            raise ConfigError(f"task: {published.name} is of texts, which mode image does not read; leave it out")
        if published.bounds is not None and self.mode not in ("prompt", "autoregressive"):
            raise ConfigError(
                f"task: {published.name} is a regression, which mode {self.mode!r} does not learn; take mode 'prompt' "
                "or 'autoregressive'"
            )

    @property
    def published(self) -> PublishedTask | None:
        """The published task, where one is named."""
        return None if self.task is None else published_task(self.task)

    @property
    def length(self) -> int:
        """Tokens of an example at most."""
        return self.max_length or 128

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Of a regression, the lowest and the highest score."""
        return None if self.published is None else self.published.bounds

    @property
    def filled(self) -> TaskOptions:
        """With what the published task says in the place of what was not given.

        Raises:
            ConfigError: the task's template cannot be read by a causal model.
        """
        task = self.published
        if task is None:
            return self
        return dataclasses.replace(
            self,
            words=self.words if self.words is not None else dict(task.words),
            template=self.template if self.template is not None else self._template_of(task),
            measure=self.measure or task.measure,
            max_length=self.max_length or task.max_length,
        )

    def _template_of(self, task: PublishedTask) -> str | None:
        """The task's template as this mode reads it."""
        if self.mode == "prompt" or (self.mode == "finetune" and self.token == "mask"):
            return task.template
        if self.mode == "autoregressive":
            before, _, after = task.template.partition("{mask}")
            if "{text" in after:
                raise ConfigError(
                    f"template: the one of {task.name} goes on after {{mask}}, which a causal model does not read; "
                    f"give one that ends with it (--template), such as '{{text}}{' {text2}' * task.paired} {{mask}}'"
                )
            return before + "{mask}"
        return PAIR_TEMPLATE if self.mode == "finetune" and task.paired else None

    @property
    def name(self) -> str:
        """What the task is called: after its file, or after the folder where the file is `data.npz`."""
        if self.data is None:
            return str(self.task)
        path = Path(self.data)
        stem = path.name.split(".")[0]
        return path.parent.name if stem == "data" and path.parent.name else stem

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `TaskOptions(**fields)` reads it back."""
        out = dataclasses.asdict(self)
        return {**out, "words": None if self.words is None else dict(self.words)}


@dataclass(frozen=True)
class FinetuneOptions(LoopOptions):
    """How a model is fine-tuned. Defaults are those of Panigrahi et al. 2023 (arXiv 2302.06600) and its repository
    where it has one: SGD at a constant rate without momentum, 1,000 steps, the best of every 100 on validation,
    embeddings and language model head fixed, dropout on. Two differ. The rate of its scripts, 1e-3, hardly learns from
    16 examples of a class; `rates` has those that do, chosen by validation (`benchmarks/defaults.py`). And its scripts
    set a weight decay of 1e-4; here it is 0, since decay moves every weight a little, which is what a graft must then
    tell from learning.

    After `sgd` few weights hold the skill, after `adamw` they do so only with `l1`. Weight decay skips biases and
    norms, as published. `schedule="auto"` is what was published: constant for SGD, linear for other optimizers. Neither
    `max_steps` nor `epochs` means 1,000 steps.

    Args:
        lr: None = 0.01 for `sgd`, 2e-4 for `adamw`; other optimizers need one.
        batch_size: examples per batch.
        train_bias_only: of the pretrained model only biases are trained; a new head is trained whole.
        fix_embeddings: leave embeddings as they are, those of positions and the norm next to them included.
        fix_head: leave the head as it is; None = as the mode has it: a language model's or a fitted head is fixed, a
            new random one learns. A tensor that is both (tied output embeddings) is fixed if either is.
        l1: pull to the pretrained weights, `l1 sum |theta - theta_pre|`, as a proximal step after each of the
            optimizer's (see `finetune_`): many weights end exactly at the pretrained value. In the unit of the loss's
            gradient for `sgd` and `adamw`, which have such a step; 1e-4 to 1e-2 is where it begins to matter.
        dropout: train in training mode. Off: in evaluation mode.
        statistics: running statistics of batch norms are `held`, so that weights are all that changes, or `learned`.
        evaluate_every: steps between two validations; the best state is kept, of equal ones the last.

    Raises:
        ConfigError: a value outside its range, see also `LoopOptions`; both `max_steps` and `epochs`.
    """

    optimizer: str = "sgd"
    lr: float | None = None
    momentum: float | None = 0.0
    schedule: str = "auto"
    clip: float = 1.0
    batch_size: int = 8
    train_bias_only: bool = False
    fix_embeddings: bool = True
    fix_head: bool | None = None
    l1: float = 0.0
    dropout: bool = True
    statistics: str = "held"
    evaluate_every: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("statistics", self.statistics, STATISTICS)
        number("l1", self.l1, 0)
        for name in ("train_bias_only", "fix_embeddings", "dropout", *(() if self.fix_head is None else ("fix_head",))):
            flag(name, getattr(self, name))
        if self.max_steps is not None and self.epochs is not None:
            raise ConfigError(f"max_steps={self.max_steps} and epochs={self.epochs}: give one of the two")
        for name in ("batch_size", "evaluate_every"):
            whole(name, getattr(self, name))
        if self.l1 and self.optimizer not in COMMON:
            raise ConfigError(
                f"l1: got {self.l1!r} with optimizer={self.optimizer!r}; the pull is known for {' and '.join(COMMON)}"
            )

    @classmethod
    def schedules(cls) -> tuple[str, ...]:
        return ("auto", *RATE_SCHEDULES)

    @classmethod
    def rates(cls) -> Mapping[str, float]:
        return {"sgd": 1e-2, "adamw": 2e-4}

    @property
    def course(self) -> str:
        auto = "constant" if self.optimizer == "sgd" else "linear"
        return auto if self.schedule == "auto" else self.schedule

    def steps_of(self, batches: int) -> int:
        return super().steps_of(batches) or 1000

    def steps(self, examples: int) -> int:
        """How many steps learning from so many examples takes."""
        return self.steps_of(-(-examples // self.batch_size))
