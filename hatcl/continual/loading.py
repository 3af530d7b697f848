"""Text tasks from files: a base model with a new adapter, and the tasks that it can learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import Changeable, flag, number, one_of, whole
from ..data.texts import TextData, read_texts
from ..errors import ConfigError
from .generation import causal_task, seq2seq_task
from .label_words import label_word_task
from .tasks import ContinualTask

LORA = ("rank", "alpha", "target", "dropout")  # the fields of `TextOptions` that make the adapter
FORMS = ("auto", "labels", "seq2seq", "causal")


@dataclass(frozen=True)
class TextOptions(Changeable):
    """How text tasks and an adapter to learn them are made.

    Args:
        form: labels (the nearest label word, for encoders), seq2seq or causal (greedy generation); auto goes by the
            model.
        word: with labels, NAME:LABEL=WORD, the word or phrase for a label of a task.
        plain: leave out the inputs' first line (the question) and a last `Answer:`.
        train: at most so many training examples of each task. test: at most so many test examples of each task.
        rank: LoRA's rank r. alpha: LoRA's alpha; what is added is scaled by alpha / r.
        target: a module to adapt, such as query; by default peft's for the model.
        dropout: LoRA's dropout.
        max_input: tokens of an input, at most what the model takes; longer is cut.
        max_output: tokens of an output, in generation.

    Raises:
        ConfigError: a value outside its range.
    """

    form: str = "auto"
    word: tuple[str, ...] = ()
    plain: bool = False
    train: int | None = None
    test: int | None = None
    rank: int = 8
    alpha: int = 16
    target: tuple[str, ...] = ()
    dropout: float = 0.0
    max_input: int = 256
    max_output: int = 32

    def __post_init__(self) -> None:
        one_of("form", self.form, FORMS)
        flag("plain", self.plain)
        for name in ("train", "test"):
            whole(name, getattr(self, name), optional=True)
        for name in ("rank", "alpha", "max_input", "max_output"):
            whole(name, getattr(self, name))
        number("dropout", self.dropout, 0, 1, without="high", what="a share")


def adapted_model(model: str, options: TextOptions, seed: int) -> tuple[Any, Any, str]:
    """The base model with a new adapter, its tokenizer, and the form of its tasks.

    Args:
        model: a folder of transformers, or a name on its hub. seed: of the adapter's start.

    Raises:
        ConfigError: transformers or peft is not installed, or cannot make it.
    """
    try:
        import peft  # noqa: F401  # used later; where it is missing, nothing is to be loaded before
        import transformers
    except ImportError as error:
        raise ConfigError(f"learning texts needs {error.name}; run: pip install 'hatcl[hf]'") from error
    transformers.utils.logging.disable_progress_bar()
    form = options.form
    try:
        config = transformers.AutoConfig.from_pretrained(model)
        if form == "auto":
            names = " ".join(config.architectures or ())
            form = "seq2seq" if config.is_encoder_decoder else "causal" if "CausalLM" in names else "labels"
            form = "causal" if "LMHead" in names and not config.is_encoder_decoder else form
        kinds = {
            "labels": transformers.AutoModel,
            "seq2seq": transformers.AutoModelForSeq2SeqLM,
            "causal": transformers.AutoModelForCausalLM,
        }
        base = kinds[form].from_pretrained(model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{model}: transformers cannot load it as {form} ({str(error).splitlines()[0]})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(seed)
    return with_adapter(base, options), tokenizer, form


def with_adapter(base: nn.Module, options: TextOptions, beside: Sequence[str] = ()) -> Any:
    """A model with a new LoRA adapter, as a peft model. Its start is drawn from torch's global generator.

    Args:
        beside: modules that are trained in full besides it, such as a new head.

    Raises:
        ConfigError: peft is not installed, or cannot adapt the model.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"an adapter needs {error.name}; run: pip install 'hatcl[hf]'") from error
    try:
        lora = peft.LoraConfig(
            r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout,
            target_modules=list(options.target) or None, modules_to_save=list(beside) or None,
        )  # fmt: skip
        return peft.get_peft_model(base, lora)
    except ValueError as error:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in base.named_modules() if isinstance(m, nn.Linear)})
        raise ConfigError(
            f"--target, --rank: peft cannot adapt this model ({str(error).splitlines()[0]}); it has the linear modules "
            f"{', '.join(linear)}"
        ) from error


def text_tasks(
    files: Mapping[str, Path], model: nn.Module, tokenizer: Any, form: str, options: TextOptions, positions: int | None
) -> list[ContinualTask]:
    """A task for each file of texts, in order.

    Args:
        positions: how many tokens the model has positions for; None = no limit.

    Raises:
        ConfigError: files, words or lengths that do not fit. IntegrityError: a damaged file.
    """
    words = label_words(options.word, list(files))
    tasks = []
    for name, path in files.items():
        data = read_texts(path).cut(options.train, options.test)
        data = data.plain() if options.plain else data
        tasks.append(_task_of_form(form, name, data, model, tokenizer, words.get(name), options, positions))
    return tasks


def label_words(specs: tuple[str, ...] | list[str], names: list[str]) -> dict[str, dict[str, str]]:
    """Per task, label -> word.

    Raises:
        ConfigError: another form than NAME:LABEL=WORD, or a task that is not there.
    """
    found: dict[str, dict[str, str]] = {}
    for spec in specs:
        head, equals, value = spec.partition("=")
        name, colon, label = head.partition(":")
        if not equals or not colon or not value:
            raise ConfigError(f"--word: got {spec!r}, expected NAME:LABEL=WORD")
        one_of("--word", name, names)
        found.setdefault(name, {})[label] = value
    return found


def _task_of_form(
    form: str, name: str, data: TextData, model: Any, tokenizer: Any, words: Mapping[str, str] | None,
    options: TextOptions, positions: int | None,
) -> ContinualTask:  # fmt: skip
    most, length = (None if form == "seq2seq" else positions), options.max_input
    if most is not None:
        room = most - (options.max_output if form == "causal" else 0)
        if room < 1:
            raise ConfigError(
                f"--max-output: got {options.max_output}, but the model has {most} positions, input included"
            )
        length = min(length, room)
    if form == "labels":
        labels = {y: (words or {}).get(y, y) for y in data.labels}
        unknown = [y for y in words or {} if y not in labels]
        if unknown:
            raise ConfigError(f"--word: {name} has no label {unknown[0]!r}; it has {', '.join(labels)}")
        return label_word_task(name, data, model, tokenizer, labels=labels, max_length=length)
    if words:
        raise ConfigError("--word: only with --form labels")
    make = {"seq2seq": seq2seq_task, "causal": causal_task}[form]
    return make(name, data, tokenizer, max_input=length, max_output=options.max_output)
