"""Hard attention to the task in Lightning 2.

Not imported by `import hatcl`, which works without Lightning: `from hatcl.integrations.lightning import LearnTask`.
"""

from __future__ import annotations

import contextlib
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch import callbacks as theirs

from ..config import whole
from ..errors import ConfigError, TaskError
from ..hat.tasks import task as active_task
from .course import TaskCourse


class LearnTask(TaskCourse, Callback):
    """Lets a Lightning `Trainer` learn a task of the converted model in its module, and seals it:

        class Module(LightningModule):
            def __init__(self):
                super().__init__()
                self.model = hatcl.convert(...)

        Trainer(max_epochs=5, callbacks=[LearnTask(task=1)]).fit(module, loader)

    It enters `hatcl.learn` when training begins, with the number of steps that the `Trainer` takes and those that a
    resumed run (`fit(..., ckpt_path=...)`) has done, and seals the task after the last step, before a `ModelCheckpoint`
    saves that step. The gradient of HAT's penalty is added once per optimizer step, before gradients are clipped, so
    that it does not grow with `accumulate_grad_batches`; your `training_step` returns the task's own loss. `validate`,
    `test` and `predict` of a `Trainer` with this callback are under its task. An error seals nothing and leaves earlier
    tasks as they were. Automatic and manual optimization both work.

    In several processes use `strategy="ddp_find_unused_parameters_true"`: Lightning wraps your whole module, and other
    tasks' gates get no gradient.

    The best checkpoint of a `ModelCheckpoint`, unless it is the last, was written before the task was sealed; load it
    after training, and seal it:

        module.load_state_dict(torch.load(checkpoint.best_model_path)["state_dict"])
        hatcl.seal(module.model, 1)

    Args:
        task: the index of the task to learn. steps: optimizer steps in all; None takes the `Trainer`'s own
            estimate, which counts the steps of automatic optimization with one optimizer.

    Attributes:
        learning: the result of `hatcl.learn`, while the task is learned. penalty: the last step's penalty.

    Raises:
        ConfigError: the number of steps is unknown, or a callback averages weights. TaskError: the task is sealed and
            has steps left, or a checkpoint belongs to another task. Also all errors of `hatcl.learn`.
    """

    def __init__(self, task: int, steps: int | None = None) -> None:
        super().__init__(task)
        self.steps = whole("steps", steps, optional=True)
        self._total = 0
        self._evaluation = contextlib.ExitStack()

    def state_dict(self) -> dict[str, Any]:
        """The task, which a checkpoint stores."""
        return {"task": self.task}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise `TaskError` if a resumed checkpoint belongs to another task, whose steps would count as this one's."""
        self.check_resumed(state_dict["task"], "give ckpt_path one of this task, or leave it out")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check_averaging(trainer.callbacks)
        self._total = self._steps(trainer)
        self.begin(pl_module, trainer.optimizers, self._total, trainer.global_step)

    def _steps(self, trainer: Trainer) -> int:
        if self.steps is not None:
            return self.steps
        found = trainer.estimated_stepping_batches
        if not 0 < found < float("inf"):
            raise ConfigError(
                f"LearnTask: the Trainer cannot tell how many steps it takes (max_epochs={trainer.max_epochs}, "
                f"max_steps={trainer.max_steps}); pass LearnTask(task={self.task}, steps=...), or set max_steps"
            )
        return int(found)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Called when gradients are unscaled and not clipped yet."""
        if optimizer is trainer.optimizers[0]:
            self.add_penalty()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Checkpoint callbacks come after all others, so they save the sealed task."""
        if self.learning is not None and self.learning.step >= self._total:
            self.seal()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Seal the task before a checkpoint is written, also if training has just been stopped early."""
        if self.learning is not None and trainer.should_stop and trainer.fit_loop._can_stop_early:
            self.seal()
            checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.learning is None:
            raise TaskError(
                f"LearnTask: task {self.task} is sealed after {self._total} steps, and the Trainer takes more, which "
                "would change it; pass the number of steps that it takes, LearnTask(task, steps=...)"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seal()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate under this task once it is sealed; while it is learned, under its current hard gates. Lightning's
        check of the first batches runs before either."""
        if self.learning is None and not trainer.sanity_checking:
            self._evaluation.enter_context(active_task(pl_module, self.task))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluation.close()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._evaluation.close()
        self.leave(exception)


AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")  # older Lightning has only the second


def _check_averaging(callbacks: list[Any]) -> None:
    """Raise `ConfigError` for a callback that overwrites the model with an average after the task is sealed."""
    kinds = tuple(kind for name in AVERAGING if (kind := getattr(theirs, name, None)) is not None)
    for callback in callbacks:
        if isinstance(callback, kinds):
            raise ConfigError(
                f"{type(callback).__name__}: puts averaged weights in the model's place after training, where every "
                "task is sealed, and averages of what sealed tasks use may round; average a copy of your own "
                "(timm's ModelEmaV3(module.model), updated in on_train_batch_end) and call hatcl.seal(ema.module)"
            )
