"""What the procedures of aTLAS are given: tasks with data and frozen heads, as plain iterables of (inputs, labels)."""

from __future__ import annotations

from dataclasses import dataclass

from ..calls import Batches, Head


@dataclass(frozen=True)
class AtlasTask:
    """A task to compose for.

    Args:
        name: what reports call it.
        batches: (inputs, labels) to learn from, a list or a DataLoader: something that can be passed over again.
            Inputs are a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        validation: (inputs, labels) by which coefficients are chosen; None = `batches`, as published for addition and
            negation, where both are the validation set.
        head: from what the model gives to logits, such as `hatcl.atlas.prototypes`; None = the model gives logits.
        finetuned: validation accuracy of the model that was fine-tuned for the task, for normalised accuracy.
    """

    name: str
    batches: Batches
    validation: Batches | None = None
    head: Head | None = None
    finetuned: float | None = None

    @property
    def chosen_by(self) -> Batches:
        """The batches of validation."""
        return self.batches if self.validation is None else self.validation
