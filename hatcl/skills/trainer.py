"""TaSL and I-LoRA in transformers' Trainer: a callback, and thin subclasses that change the loss.

Not imported by `import hatcl`, which works without transformers: `from hatcl.skills.trainer import ILoRATrainer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..config import number, one_of
from ..errors import ConfigError, SkillError
from ..files import read_torch, write_files
from .ilora import ILoRA
from .orthogonal import orthogonality
from .scorer import TIMINGS, SkillScorer

ILORA_FOLDER = "ilora"  # the folder inside a checkpoint


class SkillCallback(TrainerCallback):
    """Scores each optimizer step of a `Trainer`: `Trainer(..., callbacks=[SkillCallback(scorer)])`.

    Checkpoints hold the scores so far, so that a resumed run ends with the scores of an uninterrupted one.

    Args:
        scorer: a `SkillScorer`. timing: `before` the optimizer's step (clipped gradient, old weights;
            `on_pre_optimizer_step`) or `after` it (clipped gradient, new weights; `on_optimizer_step`). At
            `on_step_end`, where patched Trainers score, the gradients are gone. name: the name of the file in a
            checkpoint; each callback needs its own.

    Raises:
        ConfigError: the timing is unknown.
    """

    def __init__(self, scorer: SkillScorer, timing: str = "before", name: str = "skills") -> None:
        one_of("timing", timing, TIMINGS)
        self.scorer, self.timing, self.name = scorer, timing, name

    def _state(self, args: Any, state: Any) -> Path:
        return _checkpoint(args, state) / f"{self.name}.pt"

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            write_files({self._state(args, state): lambda path: torch.save(self.scorer.state_dict(), path)})

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises `SkillError` if a resumed run lacks the scores of the earlier steps, `ConfigError` if gradients would
        be scored with their loss scale, which only clipping removes."""
        if state.global_step:
            path = self._state(args, state)
            if path.exists():
                self.scorer.load_state_dict(read_torch(path))
            elif self.scorer.steps != state.global_step:
                raise SkillError(
                    f"{path} does not exist, so the scores of the {state.global_step} earlier steps are lost; "
                    "resume from a checkpoint in output_dir that was written with this callback, or first load "
                    "another skills.pt with scorer.load_state_dict"
                )
        if args.fp16 and not args.max_grad_norm:
            raise ConfigError(
                f"max_grad_norm: got {args.max_grad_norm!r} with fp16, so gradients keep the loss scale; set "
                "max_grad_norm (a large one clips nothing), or train in bf16"
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.timing == "before" and _counts(args, kwargs["model"]):
            self.scorer.update()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.timing == "after" and _counts(args, kwargs["model"]):
            self.scorer.update()


def _checkpoint(args: Any, state: Any) -> Path:
    """The folder of a `Trainer`'s checkpoint for the current step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _counts(args: Any, model: nn.Module) -> bool:
    """Whether the step counts: false if fp16's loss scaling skips it because a gradient is not finite."""
    return not args.fp16 or all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


class _Follow(TrainerCallback):
    """Updates the moving average after each step, and saves I-LoRA's state next to each checkpoint."""

    def __init__(self, trainer: ILoRATrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:  # by fp16's loss scaling
            self.trainer.ilora.step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            self.trainer.ilora.save(_checkpoint(args, state) / ILORA_FOLDER)


class _Adding(Trainer):
    """A `Trainer` that adds a term to the loss while learning."""

    def term(self, inputs: Any) -> Tensor | None:
        """The term for a batch, as a mean over it, so that micro-batches share its weight; None = no term."""
        raise NotImplementedError

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """`Trainer`'s loss and, while learning, the term."""
        batch = dict(inputs) if isinstance(inputs, Mapping) else inputs  # Trainer may remove the labels
        out = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        term = self.term(batch) if model.training else None
        if term is None:
            return out
        if self._summed(num_items_in_batch):
            # the task's loss is a part of the whole step's mean; otherwise Trainer divides the returned value
            term = term / self.current_gradient_accumulation_steps
        loss, *outputs = out if return_outputs else (out,)
        loss = loss + term.to(loss.device)
        return (loss, *outputs) if return_outputs else loss

    def _summed(self, num_items_in_batch: Any) -> bool:
        """Whether the task's loss is normalised over all micro-batches of a step, as in `Trainer.training_step`."""
        if self.loss_is_scaled_for_ga is not None:
            return bool(self.loss_is_scaled_for_ga)
        return (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func is not None


class SkillTrainer(_Adding):
    """A `Trainer` that adds TaSL's regulariser, `weight * orthogonality(model)`, to the loss. With
    `callbacks=[SkillCallback(scorer)]` it learns a task as in TaSL.

    Args:
        weight, squared: see `orthogonality`. The other arguments are `Trainer`'s.

    Raises:
        ConfigError: the weight is negative.
    """

    def __init__(self, *args: Any, weight: float = 0.1, squared: bool = False, **kwargs: Any) -> None:
        number("weight", weight, 0)
        super().__init__(*args, **kwargs)
        self.weight, self.squared = weight, squared

    def term(self, inputs: Any) -> Tensor:
        return self.weight * orthogonality(self.model, squared=self.squared)


class ILoRATrainer(_Adding):
    """A `Trainer` that learns with I-LoRA: adds `ILoRA.loss` to the loss, moves the stable adapter after each step of
    the optimizer, and remembers the training examples once they are learned.

        ilora = ILoRA(peft_model, ILoRAConfig())
        ILoRATrainer(peft_model, arguments, train_dataset=..., data_collator=collator, ilora=ilora).train()

    Checkpoints hold the memory and both adapters, so that a resumed run is the same run. Evaluation and prediction use
    the plastic adapter; for the stable one use `with ilora.stable_active(): trainer.evaluate()`. A model with
    `use_ilora=False` is trained as by `Trainer`.

    Args:
        ilora: an `ILoRA` of the same model; without a `collate` it gets the Trainer's. remember: offer the training
            examples to the memory at the end of the first `train()`. The other arguments are `Trainer`'s.

    Raises:
        SkillError: `ilora` belongs to another model, or a training set to remember has no length.
    """

    def __init__(self, *args: Any, ilora: ILoRA, remember: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.model is not ilora.model:
            raise SkillError(
                f"ilora has another {type(ilora.model).__name__} than the Trainer's {type(self.model).__name__}; "
                "make both with the same model"
            )
        if remember and ilora.enabled and self.train_dataset is not None and not hasattr(self.train_dataset, "__len__"):
            raise SkillError(
                f"the train_dataset ({type(self.train_dataset).__name__}) has no length and may be endless; pass "
                "remember=False, and call ilora.remember(examples) yourself"
            )
        self.ilora, self.remember = ilora, remember
        self._remembered: Any = None
        if ilora.enabled:
            self.add_callback(_Follow(self))
            if ilora.collate is None:
                ilora.collate = self._get_collator_with_removed_columns(self.data_collator)

    def term(self, inputs: Any) -> Tensor | None:
        return self.ilora.loss(inputs) if self.ilora.enabled else None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`; afterwards the training examples are offered to the memory."""
        out = super().train(*args, **kwargs)
        if self.remember and self.ilora.enabled and self.train_dataset is not self._remembered:
            self.ilora.remember(self.train_dataset)
            self._remembered = self.train_dataset
        return out

    def _load_best_model(self) -> None:
        """Load both adapters and the memory of the best checkpoint."""
        super()._load_best_model()
        if self.ilora.enabled:
            self.ilora.load(Path(self.state.best_model_checkpoint) / ILORA_FOLDER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.ilora.enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        state = Path(resume_from_checkpoint) / ILORA_FOLDER
        if not state.is_dir():
            raise SkillError(
                f"{resume_from_checkpoint}: no I-LoRA state ({ILORA_FOLDER}/); resume from a checkpoint of ILoRATrainer"
            )
        self.ilora.load(state)
