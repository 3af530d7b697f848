"""Every procedure that learns, behind one face, so that one test holds for all of them."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from image_parts import blobs
from torch import Tensor, nn
from torch.nn import functional as F

import hatcl
from hatcl.atlas import AtlasOptions, fit
from hatcl.continual import ContinualTask, ImageLearning, image_tasks, learn_sequence
from hatcl.engine.state import Standing
from hatcl.finetuning import FinetuneTask, finetune_

Tell = Callable[[Any], None]


class Noise(nn.Module):
    """Draws from every generator there is."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()) + 0.1 * float(torch.rand(())))


class Net(nn.Module):
    """A body with running statistics and dropout, and a head; `inside` runs in every forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(8, 3)
        self.noise = Noise()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.noise(x)))
        return out


def rows(seed: int, count: int = 20) -> list[tuple[Tensor, int]]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=g)
    y = (x @ torch.randn(6, 3, generator=g)).argmax(1)
    return [(x[i], int(y[i])) for i in range(count)]


def collate(some: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """With augmentation by Python's and NumPy's generators."""
    x = torch.stack([v * (1 + 0.1 * random.random()) + 0.1 * float(np.random.rand()) for v, _ in some])
    return x, torch.tensor([c for _, c in some])


class Case:
    """One procedure. `model` is what a user gives; `run` learns with it, and goes on from what is in `folder`.

    Attributes:
        files: what a run that was interrupted leaves to go on from, in its folder. undone: is the model as it was
            after an error? steps: of the whole run, epochs: of the options that `run` gives.
    """

    files: tuple[str, ...] = ()
    undone = True

    def __init__(self) -> None:
        self.model: nn.Module = self.make()

    def make(self) -> nn.Module:
        return Net()

    @property
    def body(self) -> nn.Module:
        return self.model.body  # type: ignore[union-attr,return-value]

    def tensors(self) -> dict[str, Tensor]:
        return {n: t.detach().clone() for n, t in self.model.state_dict().items() if isinstance(t, Tensor)}

    def run(self, folder: Path | None = None, tell: Tell | None = None, **options: Any) -> None:
        raise NotImplementedError


@functools.cache
def gated_resnet() -> nn.Module:
    """Made once: converting takes longer than most runs."""
    torch.manual_seed(0)
    made: nn.Module = timm.create_model("hat_test_resnet", num_tasks=2, num_classes=[3, 3], drop_rate=0.2)
    return made


class Images(Case):
    files = (
        "learning_1.pt", "checkpoint/model/model.safetensors", "checkpoint/progress.json", "checkpoint/optimizer.pt",
    )  # fmt: skip
    undone = False

    def make(self) -> nn.Module:
        made = copy.deepcopy(gated_resnet())
        torch.manual_seed(0)
        return made

    @property
    def body(self) -> nn.Module:
        return self.model.layer1  # type: ignore[union-attr,return-value]

    def run(self, folder: Path | None = None, tell: Tell | None = None, **options: Any) -> None:
        tasks = image_tasks([blobs(f"t{i}", i, classes=3, count=20) for i in range(2)], {"flip": True, "crop": 1})
        chosen = {"epochs": 2, "batch_size": 8, "checkpoint_seconds": 0.0, **options}
        noise = self.model.register_forward_pre_hook(lambda module, given: (Noise()(given[0]),))
        try:
            learn_sequence(self.model, tasks, "hat", ImageLearning(**chosen), folder=folder, on_progress=tell)
        finally:
            noise.remove()


class Sequence(Case):
    files = ("learning_1.pt", "checkpoint/model.safetensors", "checkpoint/progress.json", "checkpoint/method/memory.pt")
    undone = False
    method = "replay"

    def run(self, folder: Path | None = None, tell: Tell | None = None, **options: Any) -> None:
        tasks = [
            ContinualTask(f"t{i}", rows(i), collate, lambda m, b: F.cross_entropy(m(b[0]), b[1]), lambda m: 0.5)
            for i in range(2)
        ]
        chosen = {"epochs": 2, "batch_size": 8, "lr": 1e-2, "checkpoint_seconds": 0.0, **options}
        learn_sequence(self.model, tasks, self.method, chosen, folder=folder, on_progress=tell)


class Tuning(Case):
    files = ("checkpoint/state.pt",)

    def run(self, folder: Path | None = None, tell: Tell | None = None, **options: Any) -> None:
        task = FinetuneTask("t", "own", ("a", "b", "c"), self.model, rows(0), rows(1), rows(2), collate)
        length = {} if "max_steps" in options else {"epochs": 2}
        chosen = {"optimizer": "adamw", "lr": 1e-2, "batch_size": 8, "evaluate_every": 2, **length, **options}
        standing = None if folder is None else Standing(folder / "checkpoint", dict, 0)
        finetune_(self.model, task, chosen, tell, standing)


class Coefficients(Case):
    files = ("fit.pt",)

    def tensors(self) -> dict[str, Tensor]:
        return {"coefficients": self.model.coefficients.detach().clone()}  # type: ignore[union-attr,operator]

    def make(self) -> nn.Module:
        base, other = Net(), Net()
        with torch.no_grad():
            for p in other.parameters():
                p.add_(0.3 * torch.randn_like(p))
        return hatcl.compose(base, [hatcl.TaskVector.between(base, other)], grain="block")

    @property
    def body(self) -> nn.Module:
        return self.model.model.body  # type: ignore[union-attr,return-value]

    def run(self, folder: Path | None = None, tell: Tell | None = None, **options: Any) -> None:
        loader = torch.utils.data.DataLoader(
            rows(0), batch_size=8, shuffle=True, collate_fn=collate, generator=torch.Generator().manual_seed(3)
        )
        fit(
            self.model, lambda b: F.cross_entropy(self.model(b[0]), b[1]), loader, on_progress=tell, seconds=0,
            options=AtlasOptions(**{"epochs": 2, "lr": 0.05, **options}),
            checkpoint=None if folder is None else folder / "fit.pt",
        )  # fmt: skip


LOOPS: dict[str, type[Case]] = {"images": Images, "sequence": Sequence, "finetune": Tuning, "atlas": Coefficients}
