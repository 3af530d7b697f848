"""The statistics that a router keeps for one task, and their computation from examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ...calls import one_pass, split_batch
from ...config import Changeable, number, whole
from ...errors import ConfigError, TaskError
from ..digests import task_digests
from ..gates import gates_of
from .ridge import Sums, lifted, projection


@dataclass(frozen=True)
class RouterOptions(Changeable):
    """How a router tells tasks apart.

    Args:
        width: M, the number of random features that each task's features are mapped to.
        temperature: tau, the factor of the classifiers' outputs before they are compared.
        threshold: theta: an answer is marked as rejected if no task reaches this probability.
        rank: keep each sum as its diagonal and this many directions, instead of all of its entries; None = all.
        seed: the seed of the random features.

    Raises:
        ConfigError: a value outside its range.
    """

    width: int = 512
    temperature: float = 8.0
    threshold: float = 0.0
    rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        whole("width", self.width)
        number("temperature", self.temperature, 0, without="low")
        number("threshold", self.threshold, 0, 1, what="a share")
        whole("rank", self.rank, optional=True)
        if self.rank is not None and self.rank > self.width:
            raise ConfigError(f"rank: got {self.rank}, expected at most width, {self.width}; or None to keep all")
        whole("seed", self.seed, 0)


@dataclass
class KnownTask:
    """A router's statistics of one task.

    Attributes:
        labels: the classes that have examples. counts: the number of examples of each.
        p: the random projection of its space, `[F, M]`. sums: space -> the task's statistics in it.
        dtype: the dtype of its features. digests: digests, from sealing, of everything that the task computes with.
    """

    labels: list[int]
    counts: list[int]
    p: Tensor
    sums: dict[int, Sums]
    dtype: str
    digests: dict[str, str]

    @property
    def examples(self) -> int:
        """The number of examples that it was added with."""
        return sum(self.counts)

    def tensors(self) -> dict[str, Tensor]:
        """All its tensors, by name."""
        of_spaces = {
            f"{space}.{f.name}": x
            for space, sums in self.sums.items()
            for f in dataclasses.fields(sums)
            if (x := getattr(sums, f.name)) is not None
        }
        return {"p": self.p, **of_spaces}


def sealed_digests(model: nn.Module, of_task: int) -> dict[str, str]:
    """The digests, from sealing, of everything that a task computes with; if a loaded state lacked them, digests of the
    current values."""
    return dict(gates_of(model)[0].digests.get(of_task) or task_digests(model, of_task))


def changed_digest(was: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """A name whose digest changed in the same dtype, or exists on one side only; None if there is none. Embeddings do
    not count: a sealed task computes with its hard gates, and a task that is reopened and sealed unchanged gets the
    same gates from other embeddings."""
    for name in [name for name in {**was, **now} if not name.rpartition(".embeddings.")[0].endswith("gates")]:
        a, b = was.get(name), now.get(name)
        if a is None or b is None or (a != b and a.split(":")[0] == b.split(":")[0]):
            return name
    return None


# ---- examples ----------------------------------------------------------------------------------------------------


def rows_of(what: str, x: Any, y: Any, size: int) -> Iterator[tuple[Any, Tensor]]:
    """Batches of the rows of some inputs."""
    whole("batch_size", size)
    labels = _as_labels(what, y)
    rows = {len(v) if v.dim() else None for v in tree_leaves(x) if isinstance(v, Tensor)}
    if rows != {len(labels)}:
        found = ", ".join("no rows" if n is None else str(n) for n in sorted(rows, key=str)) or "no tensor"
        raise ConfigError(
            f"{what}: got inputs with {found} rows and {len(labels)} labels; every tensor needs a row each"
        )
    for i in range(0, len(labels), size):
        here = slice(i, i + size)
        yield tree_map(lambda v, here=here: v[here] if isinstance(v, Tensor) else v, x), labels[here]


def labelled(what: str, batches: Any) -> Iterator[tuple[Any, Tensor]]:
    """The batches of a loader, with their labels."""
    if isinstance(batches, (Tensor, Mapping)):
        raise ConfigError(f"{what}: got inputs without labels; pass both, or batches of (inputs, labels)")
    for batch in one_pass(batches, what):
        inputs, y = split_batch(batch)
        yield inputs, _as_labels(what, y)


def _as_labels(what: str, y: Any) -> Tensor:
    labels = torch.as_tensor([] if y is None else y).detach().cpu()
    if labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        came = f"{labels.dtype} of shape {list(labels.shape)}" if len(labels) else "none"
        raise ConfigError(f"{what}: labels: got {came}, expected one integer per example, [B]")
    return labels.long()


class Gathered:
    """Collects the statistics of a task from batches of its examples."""

    def __init__(self, options: RouterOptions, new: int, others: Mapping[int, Tensor]) -> None:
        self.options, self.new, self.p = options, new, dict(others)
        self.dtype = ""
        self.counts = torch.zeros(0, dtype=torch.long)
        self.grams: dict[int, Tensor] = {}
        self.classes: dict[int, Tensor] = {}

    def add(self, labels: Tensor, seen: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Add a batch: its labels, and its features and logits under each task."""
        h, z = seen[self.new]
        if self.new not in self.p:
            self.p[self.new] = projection(h.shape[1], self.options.width, self.options.seed, self.new)
            self.dtype, self.counts = str(h.dtype), torch.zeros(z.shape[1], dtype=torch.long)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < z.shape[1]:
            raise ConfigError(
                f"task {self.new}: got labels from {int(labels.min())} to {int(labels.max())}, and its head has "
                f"classes 0 to {z.shape[1] - 1}"
            )
        onehot = torch.nn.functional.one_hot(labels, z.shape[1]).double()
        self.counts += onehot.sum(0).long()
        for a, (features, _) in seen.items():
            phi = lifted(features, self.p[a])
            for sums, of in ((self.grams, phi.T @ phi), (self.classes, phi.T @ onehot)):
                sums[a] = sums[a].add_(of) if a in sums else of

    def known(self, digests: dict[str, str]) -> KnownTask:
        """The router's statistics.

        Raises:
            TaskError: the examples have fewer than two classes, but the task has more than one.
        """
        labels = self.counts.nonzero().flatten().tolist()
        if len(labels) < min(2, max(1, len(self.counts))):
            raise TaskError(
                f"task {self.new}: got {int(self.counts.sum())} examples of {len(labels)} classes, expected some of at "
                "least two: of one class the ridge has nothing to tell apart"
            )
        sums = {a: Sums.of(gram, self.classes[a][:, labels], self.options.rank) for a, gram in self.grams.items()}
        counts = self.counts[labels].tolist()
        return KnownTask(labels, counts, self.p[self.new], sums, self.dtype, digests)
