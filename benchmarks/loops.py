"""One short seeded run of each kind of loop, and the sha256 of its final weights.

    python benchmarks/loops.py            compares with benchmarks/results/loops.json
    python benchmarks/loops.py --write    writes it

The digests were recorded with four separate loops, before one loop replaced them. They come from one machine; another
machine or another torch may round differently, so compare two versions of the code on the same one. Four were recorded
again when images became tasks like all others:

- images (three runs): the order of images, dropout and augmentation are now drawn from torch's generators, with which
  every loop resumes, instead of numpy's by seed, task, epoch and batch. With the former order, and without dropout and
  augmentation, the weights of all three had the same bits before and after.
- sequence, joint: biases and norms no longer decay; for images they never did.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hatcl
from hatcl.atlas import AtlasOptions, fit
from hatcl.continual import ContinualTask, ImageLearning, image_tasks, learn_sequence
from hatcl.data.images import ImageData
from hatcl.finetuning import FinetuneOptions, FinetuneTask, finetune_

RESULTS = Path(__file__).parent / "results" / "loops.json"


def digest(tensors: dict[str, Tensor]) -> str:
    """Of names and bits."""
    out = hashlib.sha256()
    for name in sorted(tensors):
        out.update(name.encode())
        out.update(tensors[name].detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return out.hexdigest()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)
    )


def rows(seed: int, count: int = 40) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    y = (x @ torch.randn(6, 3, generator=generator)).argmax(1)
    return [(x[i], int(y[i])) for i in range(count)]


def collate(some: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in some]), torch.tensor([y for _, y in some])


# --- the runs ---


def images(**options: Any) -> dict[str, Tensor]:
    """Image tasks under hard attention."""
    rng = np.random.default_rng(0)
    tasks = []
    for t in range(2):
        labels = np.arange(36) % 3
        x = rng.integers(0, 120, (36, 16, 16), dtype=np.uint8)
        x[np.arange(36), :8, :8] += (40 * labels[:, None, None]).astype(np.uint8)
        tasks.append(ImageData(f"blobs{t}", x, labels, x, labels, 3))
    torch.manual_seed(0)
    model = timm.create_model("hat_test_resnet", num_tasks=2, num_classes=[3, 3], drop_rate=0.2)
    learning = ImageLearning(**{"epochs": 2, "batch_size": 8, **options})
    learn_sequence(model, image_tasks(tasks, {"flip": True, "crop": 1}), "hat", learning)
    return tensors(model)


def sequence(method: str, **options: Any) -> dict[str, Tensor]:
    """Tasks one after another with a network that is trained whole."""
    tasks = [
        ContinualTask(f"t{i}", rows(i), collate, lambda m, b: F.cross_entropy(m(b[0]), b[1]), lambda m: 0.0)
        for i in range(2)
    ]
    model = network()
    learn_sequence(model, tasks, method, {"epochs": 2, "batch_size": 8, "lr": 1e-2, **options})
    return tensors(model)


def tune(**options: Any) -> dict[str, Tensor]:
    """Fine-tuning with validation."""
    model = network()
    task = FinetuneTask("t", "own", ("a", "b", "c"), model, rows(0), rows(1), rows(2), collate)
    finetune_(model, task, FinetuneOptions(**{"batch_size": 8, "evaluate_every": 3, **options}))
    return tensors(model)


def atlas(**options: Any) -> dict[str, Tensor]:
    """Coefficients of task vectors."""
    base, other = network().eval(), network().eval()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.3 * torch.randn_like(p))
    composer = hatcl.compose(base, [hatcl.TaskVector.between(base, other)], grain="block")
    x, y = collate(rows(3))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8, shuffle=True)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        noisy = batch[0] + 0.1 * torch.randn_like(batch[0])
        return F.cross_entropy(composer(noisy), batch[1])

    chosen = {"epochs": 3, "lr": 0.05, "accumulate": 3, "schedule": "cosine", "regulariser": 0.1}
    fit(composer, loss, loader, options=AtlasOptions(**{**chosen, **options}))
    return {"coefficients": composer.coefficients}


RUNS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "images, adamw, cosine": images,
    "images, constant rate": functools.partial(images, schedule="constant"),
    "images, sgd, bf16, clipped": functools.partial(
        images, optimizer="sgd", schedule="constant", amp="bf16", clip=1.0, fresh_optimizer=True
    ),
    "sequence, sequential": functools.partial(sequence, "sequential"),
    "sequence, replay": functools.partial(sequence, "replay"),
    "sequence, joint": functools.partial(sequence, "joint", schedule="linear", weight_decay=0.1, clip=0.0),
    "tune, sgd": functools.partial(tune, lr=0.1, epochs=2),
    "tune, sgd with momentum and l1": functools.partial(
        tune, lr=0.1, momentum=0.9, epochs=2, l1=0.01, weight_decay=0.01, schedule="cosine", warmup=0.2
    ),
    "tune, adamw with l1": functools.partial(
        tune, optimizer="adamw", lr=0.01, max_steps=12, l1=0.01, weight_decay=0.1, statistics="learned"
    ),
    "atlas, cosine": atlas,
    "atlas, constant, bf16": functools.partial(atlas, schedule="constant", amp="bf16", accumulate=1, regulariser=0.0),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    torch.set_num_threads(1)
    found = {name: digest(run()) for name, run in RUNS.items()}
    if write:
        RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    recorded = json.loads(RESULTS.read_text())
    for name, value in found.items():
        print(f"{name:35} {value[:16]}  {'equal' if recorded.get(name) == value else 'DIFFERS'}")
    return int(recorded != found)


if __name__ == "__main__":
    sys.exit(main())
