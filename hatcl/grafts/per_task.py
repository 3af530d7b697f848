"""Several tasks from one vector: each task's model is the base plus the task's own elements of the vector (EMR-merging,
TALL-masks).

`theta_t = theta_pre + scale_t * gamma_t * tau`, where tau is the same for all tasks: a task costs one bit per element
and one number.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import one_of
from ..errors import ConfigError, GraftError, IntegrityError
from ..files import read_json, replaced_folder
from ..vectors.merging.emr import emr_parts
from ..vectors.merging.registry import merge
from ..vectors.merging.tall_masks import tall_masks
from ..vectors.task_vector import TaskVector
from ..vectors.tensors import TensorSource
from .graft import Graft

ABOUT, VECTOR = "task_grafts.json", "vector.safetensors"
MASKED_BY = ("emr", "tall_masks")


@dataclass(frozen=True, eq=False)
class TaskGrafts:
    """One vector for several tasks, and the part that each task uses.

    Attributes:
        vector: tau. masks: the elements of each task, only bits. scales: one per task.

    Raises:
        GraftError: the numbers of masks and scales differ.
    """

    vector: TaskVector
    masks: tuple[Graft, ...]
    scales: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.masks) != len(self.scales) or not self.masks:
            raise GraftError(
                f"got {len(self.masks)} masks and {len(self.scales)} scales, expected one of each per task"
            )

    def __len__(self) -> int:
        return len(self.masks)

    def graft(self, task: int, pretrained: TensorSource) -> Graft:
        """A task's own model as a graft with values: `graft.apply_to(pretrained)`, `graft.save(path)`.

        Raises:
            GraftError: there is no such task, or the model does not fit. IntegrityError: the base is another one.
        """
        if not 0 <= task < len(self):
            raise GraftError(f"task: got {task}, expected 0 to {len(self) - 1}")
        return self.masks[task].fill(self.vector.apply_to(pretrained, self.scales[task]))

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write a folder: the vector, and a file of bits per task, which `Graft.load` reads as well.

        Raises:
            IntegrityError: the disk is full or not writable.
        """
        with replaced_folder(Path(folder)) as new:
            self.vector.save(new / VECTOR)
            for task, mask in enumerate(self.masks):
                mask.save(new / f"{task}.safetensors")
            (new / ABOUT).write_text(json.dumps({"scales": self.scales}))
        return Path(folder)

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> TaskGrafts:
        """Read a folder written by `save`; the vector is read on demand.

        Raises:
            IntegrityError: a file is missing or damaged.
        """
        path = Path(folder)
        scales = read_json(path / ABOUT).get("scales")
        if not isinstance(scales, list) or not all(isinstance(s, float) for s in scales):
            raise IntegrityError(f"{path / ABOUT}: got scales {scales!r}, expected a number per task; save it again")
        masks = [Graft.load(path / f"{task}.safetensors") for task in range(len(scales))]
        return TaskGrafts(TaskVector.load(path / VECTOR), tuple(masks), tuple(scales))


def task_grafts(
    pretrained: TensorSource,
    vectors: Sequence[TaskVector],
    by: str = "emr",
    threshold: float | Sequence[float] | None = None,
) -> TaskGrafts:
    """Represent the tasks' models by one vector, masks and scales, without data.

    Args:
        pretrained: the base of the vectors. by: `emr` (the elected vector, see `hatcl.merge`'s method of that
            name and `emr_parts`: Huang et al. 2024, arXiv 2405.17461), or `tall_masks` (the sum of the vectors; all
            scales are 1: Wang et al. 2024, arXiv 2405.07813).
        threshold: for `tall_masks`, one for all tasks or one per task, by default 0.4.

    Raises:
        ConfigError: `by` is unknown, thresholds do not fit, or one is given for `emr`. GraftError, VectorError: models
            and vectors do not fit together.
    """
    one_of("by", by, MASKED_BY)
    if by == "emr":
        if threshold is not None:
            raise ConfigError(f"threshold: got {threshold} for emr, which has none; leave it out, or use tall_masks")
        vector, parts = merge(vectors, "emr"), emr_parts(vectors)
    else:
        masked = tall_masks(vectors, 0.4 if threshold is None else threshold)
        vector, parts = merge(vectors, "arithmetic", scale=1.0), [(1.0, v) for v in masked]
    masks = [Graft.from_masks({n: part[n] != 0 for n in part}, pretrained=pretrained) for _, part in parts]
    return TaskGrafts(vector, tuple(masks), tuple(scale for scale, _ in parts))
