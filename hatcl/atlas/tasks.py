"""The inputs of aTLAS's procedures: tasks with data and frozen heads, as plain iterables of (inputs, labels)."""

from __future__ import annotations

from dataclasses import dataclass

from ..calls import Batches, Head


@dataclass(frozen=True)
class AtlasTask:
    """A task to compose for.

    Args:
        name: the name in reports. batches: (inputs, labels) to learn from, a list or a DataLoader, which can be
            iterated again. Inputs are a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        validation: (inputs, labels) that choose coefficients; None = `batches`, as published for addition and negation,
            where both are the validation set. head: turns the model's output into logits, such as
            `hatcl.atlas.prototypes`; None = it is logits already. finetuned: validation accuracy of the task's
            fine-tuned model, for normalised accuracy.
    """

    name: str
    batches: Batches
    validation: Batches | None = None
    head: Head | None = None
    finetuned: float | None = None

    @property
    def chosen_by(self) -> Batches:
        """The batches that choose coefficients."""
        return self.batches if self.validation is None else self.validation
