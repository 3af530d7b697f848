"""Options of fine-tuning: the task and the learning, as two frozen, JSON-able dataclasses."""

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
SHOTS_SEED = 13  # the first of the five seeds that LM-BFF and its successors use


@dataclass(frozen=True)
class TaskOptions(Changeable):
    """A task made from files: the model, the data, and how the model reads the data.

    Args:
        mode: one of `list_finetune_modes()`.
        model: a folder of transformers or a name on its hub, passed to `from_pretrained` as it is; in mode `image` a
        timm name.
        data: a file: texts as `hatcl.continual.read_texts` reads them, images as `.npz`; for a published task also a
        folder in its published form, or None for its copy on the hub (`datasets`).
        task: a published task of texts: sst-2, sst-5, mr, cr, mpqa, subj, trec, cola, mnli, snli, qnli, rte, mrpc, qqp,
            sts-b or agnews; it sets template, label words, measure and length unless they are given.
        k: the number of examples of each class for training, and as many for validation, see `k_shot`; None = all.
        data_seed: seeds their choice. file_seed: selects the seed in a file with several samples. test: use at most
        this many test examples, always the same random ones; None = all.
        words: label -> the word (or the name of the class) that stands for it; default: the label itself.
        template: a text with `{text}` and `{mask}`, for `prompt`, for `autoregressive` (where `{mask}` may only be
        last) and for `finetune` with token `mask`; None = the mode's.
        measure: the measure for validation: accuracy, f1 (for the second label), mcc or pearson; None = the task's, or
        accuracy.
        max_length: tokens of an example with its template; None = the task's, or 128.
        cut: the part that a long text loses, its `end` or its `head` (LM-BFF's `truncate_head`).
        token: with `finetune`, the token whose hidden state the head reads: `cls` (the first), `mask` or `last`.
        head: a new head starts `random`, or `fitted` on the pretrained model's features of the training examples, so
        that the pretrained model is better than chance and the body's share of the gain can be measured.
        scale: with `labels`, the factor of the cosines.
        plain: leave out the inputs' first line (the question) and a last `Answer:`.
        weights: with `image`, a safetensors file of the model's weights; its old classifier may have other classes.
        model_kwargs: with `image`, arguments for timm's model, such as `img_size` or `pretrained`.
        size, fit: with `image`, adapt images to this size by `resize` or `pad`; None = the model's, 0 = their own.
        normalise: with `image`, by mean and deviation of the `data` or those of the `model`.

    Raises:
        ConfigError: a value is outside its range.
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
                f"measure: {self.measure} needs scores, but the labels are classes; use another, or leave it out"
            )
        if self.data is None and published is None:
            raise ConfigError("data: got none; give a file (--data), or the name of a published task (--task)")
        if published is None:
            return
        if self.mode == "image":
            raise ConfigError(
                f"task: {published.name} is a task of texts, which mode image does not read; leave it out"
            )
        if published.bounds is not None and self.mode not in ("prompt", "autoregressive"):
            raise ConfigError(
                f"task: {published.name} is a regression, which mode {self.mode!r} does not learn; use mode "
                "'prompt' or 'autoregressive'"
            )

    @property
    def published(self) -> PublishedTask | None:
        """The published task, if one is named."""
        return None if self.task is None else published_task(self.task)

    @property
    def length(self) -> int:
        """The most tokens per example."""
        return self.max_length or 128

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The lowest and the highest score of a regression."""
        return None if self.published is None else self.published.bounds

    @property
    def filled(self) -> TaskOptions:
        """The options with values that were not given taken from the published task.

        Raises:
            ConfigError: a causal model cannot read the task's template.
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
        """The task's template in the form for this mode."""
        if self.mode == "prompt" or (self.mode == "finetune" and self.token == "mask"):
            return task.template
        if self.mode == "autoregressive":
            before, _, after = task.template.partition("{mask}")
            if "{text" in after:
                raise ConfigError(
                    f"template: that of {task.name} has text after {{mask}}, which a causal model does not read; "
                    f"give one that ends with {{mask}} (--template), such as '{{text}}{' {text2}' * task.paired} "
                    f"{{mask}}'"
                )
            return before + "{mask}"
        return PAIR_TEMPLATE if self.mode == "finetune" and task.paired else None

    @property
    def name(self) -> str:
        """The task's name: that of its file, or of the folder if the file is `data.npz`."""
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
    """How a model is fine-tuned. Defaults follow Panigrahi et al. 2023 (arXiv 2302.06600) and its repository: SGD at a
    constant rate without momentum, 1,000 steps, the best of every 100 on validation, embeddings and language model head
    fixed, dropout on. Two differ. The rate of its scripts, 1e-3, hardly learns from 16 examples of a class; `rates` has
    rates that do, chosen on validation data (`benchmarks/defaults.py`). Its scripts also set a weight decay of 1e-4;
    here it is 0, since decay moves every weight a little, and a graft would have to separate that from learning.

    After `sgd` few weights hold the skill, after `adamw` they do so only with `l1`. Weight decay skips biases and
    norms, as published. `schedule="auto"` is the published one: constant for SGD, linear for other optimizers. Without
    `max_steps` and `epochs` there are 1,000 steps.

    Args:
        lr: None = 0.01 for `sgd`, 2e-4 for `adamw`; other optimizers need one.
        batch_size: examples per batch.
        train_bias_only: train only the biases of the pretrained model; a new head is trained fully.
        fix_embeddings: leave the embeddings as they are, including position embeddings and the norm next to them.
        fix_head: leave the head as it is; None = by the mode: a language model's or a fitted head is fixed, a new
        random one learns. A tensor that is both (tied output embeddings) is fixed if either is.
        l1: pull to the pretrained weights, `l1 sum |theta - theta_pre|`, as a proximal step after each of the
            optimizer's (see `finetune_`): many weights end exactly at the pretrained value. It has the unit of the
            loss's gradient, works with `sgd` and `adamw`, and has an effect from about 1e-4 to 1e-2.
        dropout: train in training mode; without it, in evaluation mode.
        statistics: running statistics of batch norms are `held`, so that only weights change, or `learned`.
        evaluate_every: steps between two validations; the best state is kept, the last one among equals.

    Raises:
        ConfigError: a value is outside its range, see also `LoopOptions`; or both `max_steps` and `epochs` are given.
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
                f"l1: got {self.l1!r} with optimizer={self.optimizer!r}; the pull works with {' and '.join(COMMON)}"
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
        """The number of steps for this many examples."""
        return self.steps_of(-(-examples // self.batch_size))
