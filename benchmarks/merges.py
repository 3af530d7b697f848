"""Merging methods from the literature, compared on the networks and tasks of `atlas.py`.

    python benchmarks/merges.py [--network minilm] [--seed 0] [--methods iso_c opcm ...]
    python benchmarks/merges.py --table [--network minilm]     # over all seeds, with the rows that atlas.py measured

Scales and thresholds are chosen on the validation examples. `tall_masks` and `emr` give one model per task (base, one
vector, and each task's mask), which is measured on its own task; the others give one model for all tasks. `... of rank
16` are the vectors cut to 16 singular values per matrix, as LoRA's are. Networks and vectors are kept in `--work`.
Results are written after each method; methods that are there are skipped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from atlas import measured
from atlas_networks import World, prepare
from common import HERE, RESULTS, read, save

import hatcl
from hatcl.vectors.merging import emr_parts
from hatcl.vectors.merging.blocks import as_matrix
from hatcl.vectors.merging.registry import merge_info
from hatcl.vectors.merging.tall_masks import tall_masks
from hatcl.vectors.merging.tsv import thin_svd

Vectors = list[hatcl.TaskVector]
Candidates = dict[str, Vectors]  # a setting -> one vector for all tasks, or one per task
SCALES = (1.0, 1.5, 2.0, 2.5)
THRESHOLDS = (0.2, 0.4, 0.6)
# of ViT-B/32 on eight tasks, or what the abstract claims; checkpoints differ between papers by up to 4 points
PUBLISHED = {
    "ties": "72 to 75", "tsv": "85.9", "iso_c": "86.3", "emr": "88.7", "tall_masks": "above 99 % of the fine-tuned",
    "opcm": "5 to 8 points above other continual merges", "regmean_plusplus": "above regmean",
    "knots of rank 16": "up to 4.3 points above other merges of LoRA",
}  # fmt: skip


def scaled(method: str, scales: Sequence[float], **options: Any) -> Callable[[World], Candidates]:
    def make(world: World) -> Candidates:
        merged = hatcl.merge(world.vectors, method, **options, **of_filters(method, world)).in_memory()
        return {f"scale {s:g}": [merged * s] for s in scales}

    return make


def of_filters(method: str, world: World) -> dict[str, bool]:
    """Where nearly all weights are filters, methods for matrices take these too; else they would be the mean."""
    return {"convs": True} if world.network.convs and "convs" in merge_info(method).options else {}


def masked(world: World) -> Candidates:
    return {f"threshold {t:g}": tall_masks(world.vectors, t) for t in THRESHOLDS}


def rescaled(world: World) -> Candidates:
    return {"": [scale * part for scale, part in emr_parts(world.vectors)]}


def of_rank(vectors: Vectors, rank: int, convs: bool) -> Vectors:
    """As LoRA's updates: matrices (and filters) of this rank, and nothing else."""

    def one(_: str, tau: torch.Tensor) -> torch.Tensor:
        matrix = as_matrix(tau, convs)
        if matrix is None:
            return torch.zeros_like(tau)
        u, s, vh = thin_svd(matrix)
        return ((u[:, :rank] * s[:rank]) @ vh[:rank]).view(tau.shape)

    return [v.map(one) for v in vectors]


def low(method: str) -> Callable[[World], Candidates]:
    def make(world: World) -> Candidates:
        vectors = of_rank(world.vectors, 16, world.network.convs)
        merged = hatcl.merge(vectors, method, **of_filters(method, world)).in_memory()
        return {f"scale {s:g}": [merged * s] for s in SCALES}

    return make


def by_inputs(method: str) -> Callable[[World], Candidates]:
    def make(world: World) -> Candidates:
        batches = [d.batches("train", world.network.grams // 2) for d in world.data]
        return {"": [hatcl.merge(world.vectors, method, model=world.base, batches=batches)]}

    return make


METHODS: dict[str, Callable[[World], Candidates]] = {
    "iso_c": scaled("iso_c", SCALES), "iso_cts": scaled("iso_cts", SCALES), "emr": rescaled, "tall_masks": masked,
    "consensus": scaled("consensus", (0.25, 0.5, 0.75), scale=1.0), "opcm": scaled("opcm", (1.0,)),
    "localize_and_stitch": scaled("localize_and_stitch", (1.0,)), "regmean_plusplus": by_inputs("regmean_plusplus"),
    "knots of rank 16": low("knots"), "ties of rank 16": low("ties"),
}  # fmt: skip


def accuracies(world: World, vectors: Vectors, part: str) -> list[float]:
    """Of each task, by the one model for all or by its own."""
    models = [v.apply_to(world.base) for v in vectors]
    if len(models) == 1:
        return measured(models[0], world.data, part)
    return [measured(m, [d], part)[0] for m, d in zip(models, world.data, strict=True)]


def normalised(got: list[float], tuned: list[float]) -> float:
    return float(np.mean([a / b for a, b in zip(got, tuned, strict=True)]))


def chosen(world: World, candidates: Candidates, tuned: list[float]) -> tuple[str, dict[str, list[float]]]:
    """The best setting on the validation examples, and what all reach there. The grid of scales is extended where an
    end of it is the best."""
    seen = {k: accuracies(world, v, "validation") for k, v in candidates.items()}
    while True:
        best = max(seen, key=lambda k: normalised(seen[k], tuned))
        scales = sorted((k for k in seen if k.startswith("scale")), key=lambda k: float(k.split()[1]))
        if len(scales) < 2 or best not in (scales[0], scales[-1]):
            return best, seen
        step = 0.8 if best == scales[0] else 1.25
        wider = f"scale {step * float(best.split()[1]):.3g}"
        candidates[wider] = [step * v for v in candidates[best]]
        seen[wider] = accuracies(world, candidates[wider], "validation")


def run(network: str, seed: int, work: Path, methods: Sequence[str]) -> None:
    name, world = f"merges_{network}_seed{seed}", prepare(network, seed, work)
    parts = ("validation", "test")
    if "finetuned" not in read(name):
        save(name, {**read(name), "finetuned": {p: accuracies(world, world.vectors, p) for p in parts}})
    tuned = read(name)["finetuned"]
    for method in methods:
        if method in read(name):
            continue
        began = time.process_time()
        candidates = METHODS[method](world)
        cost = time.process_time() - began
        best, seen = chosen(world, candidates, tuned["validation"])
        got = accuracies(world, candidates[best], "test")
        row = {
            "chosen": best, "seconds": cost, "validation": seen[best], "test": got,
            "mean": float(np.mean(got)), "normalised": normalised(got, tuned["test"]),
        }  # fmt: skip
        save(name, {**read(name), method: row})
        print(network, seed, method, json.dumps(row), flush=True)


def table(network: str) -> None:
    runs = [json.loads(p.read_text()) for p in sorted(RESULTS.glob(f"merges_{network}_seed*.json"))]
    before = [json.loads(p.read_text())["addition"] for p in sorted(RESULTS.glob(f"atlas_{network}_seed*.json"))]
    rows: dict[str, list[tuple[float, float]]] = {}
    costs: dict[str, str] = {}
    for run_of in before:
        for title, row in run_of.items():
            if isinstance(row, dict) and "test" in row and title != "finetuned":
                got = row["test"]
                rows.setdefault(title.removesuffix(" at the best scale"), []).append((got["mean"], got["normalised"]))
    for run_of in runs:
        for title, row in run_of.items():
            if isinstance(row, dict) and "normalised" in row:
                rows.setdefault(title, []).append((row["mean"], row["normalised"]))
                costs[title] = f"{row['seconds']:.1f} s"
    print(
        "| method | data | cost | published | mean | of the fine-tuned | seeds | seed 0, of the fine-tuned |\n|"
        + "---|" * 8
    )
    for title, got in sorted(rows.items(), key=lambda item: -item[1][0][1]):
        method = "consensus" if title == "tall_masks" else title.split()[0]
        known = method in hatcl.list_merges()
        needs = " and ".join(merge_info(method).needs) if known else "" if method == "pretrained" else "labels"
        values = np.array(got).T * 100
        shown = [f"{x.mean():.1f} ({x.std(ddof=1):.1f})" if len(x) > 1 else f"{x[0]:.1f}" for x in values]
        cells = [title, needs or "none", costs.get(title, ""), PUBLISHED.get(title, ""), *shown, len(got)]
        print("|", " | ".join(map(str, cells)), f"| {values[1, 0]:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="minilm", choices=["minilm", "resnet20", "convnext"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "atlas")
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    args = parser.parse_args()
    if args.table:
        table(args.network)
    else:
        run(args.network, args.seed, args.work, args.methods)


if __name__ == "__main__":
    main()
