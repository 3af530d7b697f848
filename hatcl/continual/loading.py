"""Text tasks from files: a base model with a new adapter, and the tasks for it to learn."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import Changeable, flag, number, one_of, whole
from ..data.texts import TextData, read_texts
from ..errors import ConfigError, nearest
from ..integrations.peft_models import with_lora
from .generation import causal_task, seq2seq_task
from .label_words import label_word_task
from .tasks import ContinualTask
from .text_scores import TEXT_SCORES

BASE_DTYPES = ("float32", "bfloat16", "float16")
BITS = (4, 8)
# the fields of `TextOptions` that define the adapter
LORA = ("rank", "alpha", "target", "dropout", "use_rslora", "use_dora", "modules_to_save")
FORMS = ("auto", "labels", "seq2seq", "causal")


@dataclass(frozen=True)
class TextOptions(Changeable):
    """How text tasks and an adapter for them are made.

    Args:
        form: labels (the nearest label word, for encoders), seq2seq or causal (greedy generation); auto chooses by the
        model.
        word: with labels, NAME:LABEL=WORD, the word or phrase for a label of a task.
        measure: in generation, NAME=MEASURE, the measure that scores a task: match (the default), answer, rouge_l,
            bleu_1, bleu_4, similarity or sari.
        plain: leave out the inputs' first line (the question) and a last `Answer:`.
        train: use at most this many training examples of each task. test: use at most this many test examples of each
        task.
        rank: LoRA's rank r. alpha: LoRA's alpha; the adapter's output is scaled by alpha / r.
        target: a module to adapt, such as query; by default peft's for the model.
        dropout: LoRA's dropout.
        use_rslora: scale by alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732). use_dora: learn magnitudes
            as well as directions (Liu et al. 2024, arXiv 2402.09353).
        modules_to_save: a module that is trained fully and saved with the adapter, such as a classifier; repeatable.
        bits: load the base in 4 (NF4, doubly quantised, as QLoRA, Dettmers et al. 2023, arXiv 2305.14314) or 8 bits by
        bitsandbytes; None = without quantisation.
        dtype: the type of the base's weights: float32, bfloat16 or float16; the adapter's are float32.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        max_input: tokens of an input, up to the model's limit; longer inputs are cut. max_output: tokens of an output,
            in generation.

    Raises:
        ConfigError: a value outside its range.
    """

    form: str = "auto"
    word: tuple[str, ...] = ()
    measure: tuple[str, ...] = ()
    plain: bool = False
    train: int | None = None
    test: int | None = None
    rank: int = 8
    alpha: int = 16
    target: tuple[str, ...] = ()
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    bits: int | None = None
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    max_input: int = 256
    max_output: int = 32

    def __post_init__(self) -> None:
        one_of("form", self.form, FORMS)
        for name in ("plain", "use_rslora", "use_dora", "gradient_checkpointing"):
            flag(name, getattr(self, name))
        one_of("dtype", self.dtype, BASE_DTYPES)
        if self.bits not in (None, *BITS):
            raise ConfigError(f"bits: got {self.bits!r}, expected 4, 8 or None")
        for name in ("train", "test"):
            whole(name, getattr(self, name), optional=True)
        for name in ("rank", "alpha", "max_input", "max_output"):
            whole(name, getattr(self, name))
        number("dropout", self.dropout, 0, 1, without="high", what="a share")


def adapted_model(model: str, options: TextOptions, seed: int, adapter: bool = True) -> tuple[Any, Any, str]:
    """The base model with a new adapter, its tokenizer, and the form of its tasks.

    Args:
        model: a folder of transformers, or a name on its hub. seed: seeds the adapter's start values. adapter: False =
            without an adapter.

    Raises:
        ConfigError: transformers or peft is not installed, or cannot make the model.
    """
    try:
        import peft  # noqa: F401  # used later; if it is missing, nothing should be loaded first
        import transformers
    except ImportError as error:
        raise ConfigError(f"learning texts needs {error.name}; run: pip install 'hatcl[hf]'") from error
    transformers.utils.logging.disable_progress_bar()
    form, how = options.form, _loading(options, transformers)
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
        base = kinds[form].from_pretrained(model, **how)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{model}: transformers cannot load it as {form} ({str(error).splitlines()[0]})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if options.gradient_checkpointing:
        base.config.use_cache = False  # otherwise it warns
    if options.bits is not None:
        import peft

        base = peft.prepare_model_for_kbit_training(
            base, options.gradient_checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        for module in base.modules():  # packed in evaluation on such CPUs, 4-bit weights would lose all later gradients
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    elif options.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(seed)
    return with_adapter(base, options) if adapter else base, tokenizer, form


def with_adapter(base: nn.Module, options: TextOptions, beside: Sequence[str] = ()) -> Any:
    """A model with a new LoRA adapter, as a peft model. Its start values are drawn from torch's global generator.

    Args:
        beside: further modules that are trained fully, such as a new head.

    Raises:
        ConfigError: peft is not installed, or cannot adapt the model.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"an adapter needs {error.name}; run: pip install 'hatcl[hf]'") from error
    names = [name for name, _ in base.named_modules()]
    for wanted in options.modules_to_save:
        if not any(f".{name}".endswith(f".{wanted}") for name in names):  # peft ignores such a name silently
            known = {name.rsplit(".", 1)[-1] for name in names} - {""}
            raise ConfigError(
                f"--modules-to-save: the model has no module {wanted!r}; did you mean {nearest(wanted, known)!r}?"
            )
    try:
        lora = peft.LoraConfig(
            r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout,
            target_modules=list(options.target) or None, use_rslora=options.use_rslora, use_dora=options.use_dora,
            modules_to_save=[*options.modules_to_save, *beside] or None,
        )  # fmt: skip
        return with_lora(base, lora)
    except ValueError as error:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in base.named_modules() if isinstance(m, nn.Linear)})
        raise ConfigError(
            f"--target, --rank: peft cannot adapt this model ({str(error).splitlines()[0]}); it has the linear modules "
            f"{', '.join(linear)}"
        ) from error


def _loading(options: TextOptions, transformers: Any) -> dict[str, Any]:
    """The arguments for loading the base.

    Raises:
        ConfigError: bits were given, but bitsandbytes is not installed.
    """
    dtype = getattr(torch, options.dtype)
    if options.bits is None:
        return {"dtype": dtype}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"bits: {options.bits}-bit weights need bitsandbytes; run: pip install bitsandbytes")
    four = {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }  # fmt: skip
    kept = transformers.BitsAndBytesConfig(**(four if options.bits == 4 else {"load_in_8bit": True}))
    return {"dtype": dtype, "quantization_config": kept}


def text_tasks(
    data: Mapping[str, TextData | Path],
    model: nn.Module,
    tokenizer: Any,
    form: str,
    options: TextOptions,
    positions: int | None,
    *,
    validated: bool = False,
    seed: int = 0,
) -> list[ContinualTask]:
    """One task per text data set, in order.

    Args:
        data: by the tasks' names; files are read. positions: the number of tokens that the model has positions for;
            None = no limit. validated: score on validation examples; if the data has none, a tenth of the training
            examples is held out for it. seed: seeds this choice.

    Raises:
        ConfigError: files, words or lengths do not fit. IntegrityError: a file is damaged.
    """
    words, measures = label_words(options.word, list(data)), measures_of(options.measure, list(data))
    tasks = []
    for name, of in data.items():
        whole_data = of if isinstance(of, TextData) else read_texts(of)
        texts = part_used(whole_data, options, validated=validated, seed=seed)
        task = _task_of_form(
            form, name, texts, model, tokenizer, words.get(name), measures.get(name), options, positions
        )
        tasks.append(dataclasses.replace(task, digest=whole_data.digest()))
    return tasks


def part_used(data: TextData, options: TextOptions, *, validated: bool, seed: int) -> TextData:
    """The part of some data that `text_tasks` learns and scores."""
    data = data.cut(options.train, options.test)
    data = data.on_validation(seed) if validated else data
    return data.plain() if options.plain else data


def label_words(specs: tuple[str, ...] | list[str], names: list[str]) -> dict[str, dict[str, str]]:
    """Per task, label -> word.

    Raises:
        ConfigError: a text has another form than NAME:LABEL=WORD, or names an unknown task.
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


def measures_of(specs: tuple[str, ...] | list[str], names: list[str]) -> dict[str, str]:
    """Task -> its measure.

    Raises:
        ConfigError: a text has another form than NAME=MEASURE, or names an unknown task or measure.
    """
    found: dict[str, str] = {}
    for spec in specs:
        name, equals, measure = spec.partition("=")
        if not equals:
            raise ConfigError(f"--measure: got {spec!r}, expected NAME=MEASURE")
        one_of("--measure", name, names)
        one_of("--measure", measure, list(TEXT_SCORES))
        found[name] = measure
    return found


def _task_of_form(
    form: str, name: str, data: TextData, model: Any, tokenizer: Any, words: Mapping[str, str] | None,
    measure: str | None, options: TextOptions, positions: int | None,
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
        if measure is not None:
            raise ConfigError(f"--measure: with --form labels, {name} is scored by accuracy; leave it out")
        return label_word_task(name, data, model, tokenizer, labels=labels, max_length=length)
    if words:
        raise ConfigError("--word works only with --form labels")
    make = {"seq2seq": seq2seq_task, "causal": causal_task}[form]
    return make(name, data, tokenizer, max_input=length, max_output=options.max_output, measure=measure or "match")
