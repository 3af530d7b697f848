"""Hard attention to the task in transformers' `Trainer`.

Not imported by `import hatcl`, which works without transformers: `from hatcl.integrations.trainer import HATTrainer`.
"""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import TrainerState
from transformers.utils import can_return_loss, find_labels

from ..errors import ConfigError, TaskError
from ..hat.masked import MaskedInputs
from ..hat.saving.pretrained import load_pretrained_, save_pretrained
from ..hat.tasks import check_task, tasks
from ..hat.tasks import task as active_task
from .course import TaskCourse

KEPT = "hatcl"  # the entry of a checkpoint's `TrainerState.stateful_callbacks` that holds its task


class HATCallback(TaskCourse, TrainerCallback):
    """Lets your own `Trainer` learn a task: `Trainer(..., callbacks=[HATCallback(task=1)])`.

    It enters `hatcl.learn` when training begins, with the number of steps that the `Trainer` takes and those that a
    resumed run has done, and seals the task after the last step, before that step is evaluated and saved. The
    gradient of HAT's penalty is added once per optimizer step, so that it does not grow with
    `gradient_accumulation_steps`; the loss that is logged is the task's own.

        callback = HATCallback(task=1)
        trainer = MyTrainer(model, args, train_dataset=..., callbacks=[callback])
        with callback:                   # an error in training leaves the task unsealed and earlier tasks as they were
            trainer.train()

    For a model of transformers or peft, `hatcl.from_pretrained` can read the `Trainer`'s checkpoints. For other modules
    they hold only the state, which can be loaded into a model that was converted in the same way. A plain `Trainer`
    evaluates under the model's current task: put `trainer.evaluate()` into `with hatcl.task(model, 1)`.

    Args:
        task: the index of the task to learn. knows_hatcl: whether the Trainer is `HATTrainer`, which can load hatcl's
            checkpoint of a peft model, and handles a mask of the inputs.

    Attributes:
        learning: the result of `hatcl.learn`, while the task is learned. penalty: the last step's penalty.

    Raises:
        ConfigError: training runs under DeepSpeed or FSDP, `load_best_model_at_end` is set for a peft model, which only
            `HATTrainer` can load, or a model with masked inputs is in another Trainer. TaskError: a resumed task is
            sealed and has steps left, or a checkpoint belongs to another task. Also all errors of `hatcl.learn`.
    """

    def __init__(self, task: int, knows_hatcl: bool = False) -> None:
        super().__init__(task)
        self.knows_hatcl = knows_hatcl

    def __enter__(self) -> HATCallback:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """If an error ended training, leave the task unsealed."""
        self.leave(error)

    def check_checkpoint(self, state: TrainerState) -> None:
        """Raise `TaskError` if a resumed checkpoint belongs to another task, whose steps would count as this one's."""
        kept = (state.stateful_callbacks or {}).get(KEPT)
        of = self.task if kept is None else kept["args"]["task"]
        self.check_resumed(of, "give each task an output_dir of its own, or leave out resume_from_checkpoint")

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(kwargs.get("model"), MaskedInputs) and not self.knows_hatcl:
            raise ConfigError(
                "mask_inputs: this Trainer asks a model's forward for the names of its inputs and labels, and the "
                "forward in front of the model has none, so it would drop the inputs and scale the loss as for another "
                "model; use HATTrainer"
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _check_host(args)
        self.on_init_end(args, state, control, **kwargs)
        if args.load_best_model_at_end and not self.knows_hatcl and hasattr(kwargs["model"], "peft_config"):
            raise ConfigError(
                "load_best_model_at_end: for a peft model this Trainer would look only for an adapter and continue "
                "with that of the last step; use HATTrainer"
            )
        if self.learning is not None:  # an error ended an earlier call of train()
            self.leave(TaskError("training begins once more"))
        self.check_checkpoint(state)
        state.stateful_callbacks[KEPT] = {"args": {"task": self.task}, "attributes": {}}
        self.begin(kwargs["model"], _inner(kwargs["optimizer"]), state.max_steps, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.add_penalty(getattr(kwargs["optimizer"], "scaler", None))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            self.seal()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal training that was stopped early, and the best checkpoint, whose task is not sealed yet."""
        self.seal()
        steps = state.max_steps
        if self.task not in tasks(kwargs["model"]):
            self.begin(kwargs["model"], _inner(kwargs["optimizer"]), steps, steps)
            self.seal()


class HATTrainer(Trainer):
    """A `Trainer` that learns one task of a converted model and seals it; earlier tasks stay bit for bit.

        model = hatcl.convert(transformers.AutoModelForSequenceClassification.from_pretrained(...), 2, batch)
        for task, data in enumerate(datasets):
            args = TrainingArguments(f"run/{task}", ...)  # a folder for each task, so that it can be resumed
            HATTrainer(model=model, task=task, args=args, train_dataset=data).train()

    Checkpoints are written by `hatcl.save_pretrained`, the last one with the task sealed: `hatcl.from_pretrained` reads
    them, transformers' refuses them. `train(resume_from_checkpoint=True)` continues in a model that was converted in
    the same way. With `load_best_model_at_end` the best checkpoint, measured with hard gates, is loaded and sealed.
    `evaluate` and `predict` compute with this task once it is sealed. The logs have HAT's `penalty` and `scale` in
    addition to the loss.

    Args:
        task: the index of the task to learn. The other arguments are `Trainer`'s.

    Raises:
        TaskError, ConfigError: see `HATCallback`.
    """

    def __init__(self, *args: Any, task: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_host(self.args)
        if isinstance(self.model, MaskedInputs):
            self._look_behind(self.model.model)
        self.hat = HATCallback(task if self.model is None else check_task(self.model, task), knows_hatcl=True)
        self.add_callback(self.hat)

    def _look_behind(self, model: torch.nn.Module) -> None:
        """Read the attributes that `Trainer` needs of a forward from the model behind a mask of its inputs."""
        names = inspect.signature(model.forward).parameters
        self.label_names = find_labels(type(model)) if self.args.label_names is None else self.args.label_names
        self.can_return_loss = can_return_loss(type(model))
        self._signature_columns = [*names, "label", "label_ids", *self.label_names]
        by_name = any(p.kind is p.VAR_KEYWORD for p in names.values())
        self.model_accepts_loss_kwargs = getattr(model, "accepts_loss_kwargs", by_name)

    @property
    def task(self) -> int:
        """The task to learn."""
        return self.hat.task

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`. An error seals nothing and leaves earlier tasks as they were."""
        with self.hat:
            return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer`'s, under this task; while it is learned, under its current hard gates."""
        with contextlib.nullcontext() if self.hat.learning is not None else active_task(self.model, self.task):
            return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """`Trainer.log`, with the last step's penalty and the scale."""
        if self.hat.learning is not None and self.hat.penalty is not None and "loss" in logs:
            logs = {**logs, "penalty": float(self.hat.penalty), "scale": self.hat.learning.scale}
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_training_stop:  # also if an evaluation has just requested it
            self.hat.seal()
        super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            save_pretrained(self.model, folder)
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state = Path(resume_from_checkpoint) / TRAINER_STATE_NAME
        if state.exists():  # before the model is changed
            self.hat.check_checkpoint(TrainerState.load_from_json(str(state)))
        load_pretrained_(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_pretrained_(self.model, self.state.best_model_checkpoint)


def _inner(optimizer: Any) -> Any:
    """The optimizer that accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def _check_host(args: Any) -> None:
    found = "DeepSpeed" if args.deepspeed else "FSDP" if args.fsdp else None
    if found:
        raise ConfigError(
            f"{found}: this Trainer would shard the model, and hatcl cannot enter its wrapping; train in "
            "DistributedDataParallel (leave out deepspeed and fsdp), or call fully_shard in a loop of your own"
        )
