"""Composition on real data: addition, negation, few shots, partitions, adaptation without labels.

    python benchmarks/atlas.py [--seed 0]                           # addition, negation, partitions, adaptation
    python benchmarks/atlas.py --network resnet20 [--seed 0]        # addition, on a pretrained network
    python benchmarks/atlas.py --network minilm [--seed 0]          # addition, few_shot; heads from the labels' names
    python benchmarks/atlas_table.py                                # over all seeds

Networks and tasks are in `atlas_networks.py`. Nothing is chosen by the test sets. Networks and vectors are kept in
`--work`, results are written after each part, and a part that is there is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from atlas_networks import NETWORKS, Data, World, images, prepare
from common import HERE, read, save
from torch import nn
from torch.optim.swa_utils import update_bn

import hatcl
from hatcl import atlas


def measured(model: nn.Module, data: list[Data], part: str) -> list[float]:
    return [atlas.accuracy(model, d.batches(part), d.head) for d in data]


def addition(seed: int, world: World) -> dict[str, Any]:
    network, base, data, vectors = world.network, world.base, world.data, world.vectors
    alone = [v.apply_to(base) for v in vectors]
    finetuned = {p: [measured(m, [d], p)[0] for m, d in zip(alone, data, strict=True)] for p in ("validation", "test")}
    mixed = mixed_inputs(seed, data, network.renewed) if network.renewed else []

    def accuracies(model: nn.Module, part: str) -> dict[str, Any]:
        got = measured(model, data, part)
        share = [a / b for a, b in zip(got, finetuned[part], strict=True)]
        return {"each": got, "mean": sum(got) / len(got), "normalised": sum(share) / len(share)}

    def row(model: nn.Module) -> dict[str, Any]:
        out = {part: accuracies(model, part) for part in ("validation", "test")}
        if mixed:  # and the same weights with running statistics of their own
            renewed = copy.deepcopy(model)
            update_bn(mixed, renewed)
            out["test, statistics renewed"] = accuracies(renewed, "test")
        return out

    tasks = [
        atlas.AtlasTask(d.name, d.batches("validation"), head=d.head, finetuned=a)
        for d, a in zip(data, finetuned["validation"], strict=True)
    ]
    out: dict[str, Any] = {"finetuned": finetuned, "pretrained": row(base)}
    composer = hatcl.compose(base, vectors, "global")
    select = atlas.addition.mean_normalised(composer, tasks)
    found = atlas.search(composer, select, network.scales)
    out["search"] = {"scale": float(found.coefficients[0, 0]), **row(composer)}
    options = {**network.options, "seed": seed}
    # a global coefficient sums the gradients of all blocks: the published rate suits it as well, Adam being scale-free
    isotropic = atlas.add(composer, tasks, warm_start=found.coefficients, options=options)
    out["isotropic"] = row(composer)
    composer = hatcl.compose(base, vectors, "block")
    fitted = atlas.add(composer, tasks, warm_start=isotropic.coefficients, options=options)
    out["anisotropic"] = {"epoch": fitted.epoch, **row(composer)}
    for method, own in network.merges.items():
        merged = hatcl.merge(vectors, method, **{**own, **({"seed": seed} if method == "dare_ties" else {})})
        composer = hatcl.compose(base, [merged], "global")
        found = atlas.search(composer, atlas.addition.mean_normalised(composer, tasks), network.grid)
        out[f"{method} at the best scale"] = {"scale": float(found.coefficients[0, 0]), **row(composer)}
    merged = hatcl.merge(
        vectors, "regmean", model=base, batches=[d.batches("train", network.grams) for d in data],
    )  # fmt: skip
    out["regmean"] = row(merged.apply_to(base))
    unlabelled = [[x for x, _ in d.batches("validation")] for d in data]
    heads = [d.head for d in data]
    merged = hatcl.merge(
        vectors, "adamerging", model=base, batches=unlabelled, steps=network.steps,
        forward=lambda model, x, task: heads[task](model(x)),
    )  # fmt: skip
    out["adamerging"] = row(merged.apply_to(base))
    return out


def mixed_inputs(seed: int, data: list[Data], most: int) -> list[torch.Tensor]:
    """Batches of so many training inputs of each task, mixed."""
    x = torch.cat([d.train[0][:most] for d in data])
    return list(x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))].split(100))


def negation(seed: int, world: World) -> dict[str, Any]:
    """Unlearn each task in turn; the control is what the base was trained on, under a frozen head of its own."""
    base, data, vectors = world.base, world.data, world.vectors
    control = images("cifar100_even", seed)
    control.head = atlas.trained_head(base, control.batches("train"), control.classes)
    kept = atlas.AtlasTask("control", control.batches("validation"), head=control.head)
    out: dict[str, Any] = {"control before": {p: measured(base, [control], p)[0] for p in ("validation", "test")}}
    for d, v in zip(data, vectors, strict=True):
        target = atlas.AtlasTask(d.name, d.batches("validation"), head=d.head)
        rows: dict[str, Any] = {"before": {p: measured(base, [d], p)[0] for p in ("validation", "test")}}
        composer = hatcl.compose(base, [v], "global")
        select = atlas.negation.lowest_target(composer, target, kept, 0.95)
        found = atlas.search(composer, select, [-i / 10 for i in range(11)])

        def row(model: nn.Module, d: Data = d) -> dict[str, Any]:
            return {
                part: {"target": measured(model, [d], part)[0], "control": measured(model, [control], part)[0]}
                for part in ("validation", "test")
            }

        rows["search"] = row(composer)
        composer = hatcl.compose(base, [v], "block")
        atlas.negate(composer, target, kept, warm_start=found.coefficients, options={"seed": seed})
        rows["anisotropic"] = row(composer)
        out[d.name] = rows
    return out


def few_shot(seed: int, world: World) -> dict[str, Any]:
    """By the other tasks' vectors; 20 steps over all shots at once."""
    base, data, vectors = world.base, world.data, world.vectors
    out: dict[str, Any] = {}
    for i, d in enumerate(data):
        others = [v for j, v in enumerate(vectors) if j != i]
        rows: dict[str, Any] = {"0": measured(base, [d], "test")[0]}
        for grain in ("global", "block"):
            for k in (1, 4, 16):
                ids = atlas.sample_shots(d.train[1], k, seed=seed)
                batches = [(d.train[0][ids], d.train[1][ids])]
                composer = hatcl.compose(base, others, grain)
                atlas.few_shot(composer, batches, head=d.head, steps=2, options={"seed": seed})
                rows[f"{grain} {k}"] = measured(composer, [d], "test")[0]
        out[d.name] = rows
    return out


def partitions(seed: int, world: World) -> dict[str, Any]:
    """Parameter-efficient fine-tuning of two tasks by the others' vectors, on their full training sets."""
    base, data, vectors = world.base, world.data, world.vectors
    out: dict[str, Any] = {}
    for i, d in enumerate(data):
        if d.name not in ("fashion_mnist", "cifar10"):
            continue
        others = [v for j, v in enumerate(vectors) if j != i]
        rows: dict[str, Any] = {}
        for k in (1, 5, 20):
            composer = hatcl.compose(base, others, f"partition:{k}", seed=seed)
            options = {"seed": seed, "lr": 1e-2, "epochs": 3}
            atlas.few_shot(composer, d.batches("train"), d.batches("validation"), head=d.head, options=options)
            rows[str(k)] = measured(composer, [d], "test")[0]
        out[d.name] = rows
    return out


def adaptation(seed: int, world: World) -> dict[str, Any]:
    """From 1000 test images, without labels, by the other tasks' vectors; with the normal 95 % interval of accuracy."""
    base, data, vectors = world.base, world.data, world.vectors
    out: dict[str, Any] = {}
    for i, d in enumerate(data):
        d = d.first(1000)
        others = [v for j, v in enumerate(vectors) if j != i]
        composer = hatcl.compose(base, others, "block")
        flip = d.name == "cifar10"
        atlas.adapt(
            composer, d.test[0], head=d.head, strong=lambda x, flip=flip: atlas.random_crops(x, flip=flip),  # type: ignore[misc]
            options={"seed": seed},
        )  # fmt: skip
        unlabelled = [x for x, _ in d.batches("test")]
        tent = atlas.minimise_entropy(base, unlabelled, head=d.head)
        rows = {"none": base, "ufm": composer, "entropy on norms": tent}
        n = len(d.test[1])
        got = {name: measured(m, [d], "test")[0] for name, m in rows.items()}
        out[d.name] = {
            name: {"accuracy": p, "half_interval": 1.96 * math.sqrt(p * (1 - p) / n)} for name, p in got.items()
        }
    return out


PARTS = {
    "addition": addition, "negation": negation, "few_shot": few_shot, "partitions": partitions,
    "adaptation": adaptation,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="convnext", choices=list(NETWORKS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="the network's own by default")
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "atlas")
    args = parser.parse_args()
    name = f"atlas_{args.network}_seed{args.seed}"
    world = prepare(args.network, args.seed, args.work)
    for part in args.parts or world.network.parts:
        result = read(name)
        if part in result:
            continue
        began = time.time()
        rows = PARTS[part](args.seed, world)
        save(name, {**result, part: {**rows, "seconds": time.time() - began}})
        print(part, json.dumps(rows, indent=1), flush=True)


if __name__ == "__main__":
    main()
