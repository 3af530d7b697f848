"""Make a task from files: data, K-shot samples, model and tokenizer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calls import seeded
from ..data.images import ImageData, npz_task
from ..data.published import read_published
from ..data.shots import same_few
from ..data.texts import TextData, k_shot, read_texts
from ..errors import ConfigError, nearest
from ..vectors.tensors import kinds_of, named_tensors
from .modes import mode_for, mode_of
from .options import TaskOptions
from .state import load_state
from .tasks import FinetuneTask


def make_task(
    options: TaskOptions, seed: int = 0, *, model: nn.Module | None = None, tokenizer: Any = None
) -> FinetuneTask:
    """The task that the options describe, with its pretrained model in evaluation mode on the CPU.

    Args:
        seed: seeds random parts of the model, such as a new head (`FinetuneOptions.seed`). model, tokenizer: used
            instead of those that `options.model` names.

    Raises:
        ConfigError: the mode is unknown, or model, data or options do not fit. IntegrityError: a file is missing or
            damaged.
    """
    mode = mode_for(options)
    data, options = read_data(options), options.filled
    if model is None:
        with seeded(seed):
            model, tokenizer = load_model(options)
    return mode.make(options, data, model, tokenizer, seed)


def read_data(options: TaskOptions) -> TextData | ImageData:
    """The data of the options: K-shot samples of texts, or all images (their mode draws the samples).

    Raises:
        ConfigError, IntegrityError: as `make_task`.
    """
    mode, options = mode_for(options), options.filled
    if not mode.texts:
        assert options.data is not None  # checked by the options
        task = npz_task(options.data)
        if options.test is not None:
            ids = same_few(len(task.y_test), options.test)  # files are ordered by class
            task = dataclasses.replace(task, x_test=task.x_test[ids], y_test=task.y_test[ids])
        return task
    published, seeds = options.published, {"shots_seed": options.file_seed, "seed": options.data_seed}
    if published is not None:
        data = read_published(published, options.data, **seeds)
    else:
        assert options.data is not None  # checked by the options
        data = read_texts(options.data, **seeds)
    if options.plain:
        data = data.plain()
    if options.k is not None:
        classes = None if options.words is None else list(options.words)
        half = published.half if published is not None and published.bounds is not None else str
        data = k_shot(data, options.k, options.data_seed, classes, half)
    return data.cut(test=options.test)


def load_model(options: TaskOptions) -> tuple[nn.Module, Any]:
    """The pretrained model, and its tokenizer if it reads texts.

    Raises:
        ConfigError: it cannot be loaded for the mode, or lacks weights that the mode uses.
    """
    mode = mode_of(options.mode)
    return _text_model(options.model, mode.loads) if mode.texts else (_image_model(options), None)


def _text_model(name: str, loads: str) -> tuple[nn.Module, Any]:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"fine-tuning on texts needs {error.name}; run: pip install 'hatcl[hf]'") from error
    try:
        with _quiet(transformers):
            model, report = getattr(transformers, loads).from_pretrained(
                name, output_loading_info=True, dtype=torch.float32
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"model: transformers cannot load {name} as {loads} ({str(error).splitlines()[0]}); is the path right, and "
            "does the mode (--mode) fit the model?"
        ) from error
    bare = loads == "AutoModel"  # whose pooler is never used here
    missing = sorted(n for n in report["missing_keys"] if not (bare and "pooler" in n.split(".")))
    if missing:
        what = f"model: {name} lacks {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}"
        raise ConfigError(
            f"{what}, which would be random; give a complete checkpoint" if bare else
            f"{what}: it has no pretrained language model head ({loads}); use mode 'labels' or 'finetune', or a "
            "checkpoint with such a head"
        )  # fmt: skip
    return model, tokenizer


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Inside, transformers shows no progress bars and no reports of unused weights."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _image_model(options: TaskOptions) -> nn.Module:
    """timm's model, with the tensors of `weights` if they are given, including its old classifier."""
    import timm

    name, kwargs = options.model, dict(options.model_kwargs)
    if not timm.is_model(name):
        near = nearest(name.split(".")[0], timm.list_models())
        raise ConfigError(f"model: timm has no {name!r}; did you mean {near!r}?")
    stored = None if options.weights is None else named_tensors(Path(options.weights))
    try:
        if stored is not None and "num_classes" not in kwargs:
            classifier = (timm.get_pretrained_cfg(name) or timm.create_model(name).pretrained_cfg).classifier
            weight = kinds_of(stored).get(f"{classifier}.weight")
            kwargs["num_classes"] = 1000 if weight is None else weight.shape[0]
        model: nn.Module = timm.create_model(name, **kwargs)
    except (TypeError, RuntimeError, AssertionError, ValueError, OSError) as error:
        raise ConfigError(f"model, model_kwargs: timm cannot make {name} with {kwargs} ({error})") from error
    if stored is not None:
        load_state(model, stored, str(options.weights), lacking=("num_batches_tracked",))
    return model
