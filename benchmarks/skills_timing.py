"""TaSL's scores from before the optimizer's step (the paper's formula and hatcl's default) compared with those from
after it (TaSL's code): how much do they differ, and does that change the consolidated adapter?

    python benchmarks/skills_timing.py [--steps 40]

The model, texts and rate are those of `skills.py`: SST-2, then QQP, with one LoRA adapter on a 6-layer BERT. One
training is scored in both ways at once; then both pairs of scores consolidate the same two adapters.
`results/skills_timing.json` has, per task, the rank correlation of the scores and the share of the top fifth that both
have in common; and the distance between the consolidated adapters, relative to the distance that the second task moved
the adapter.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import read, save
from pretrained import of_minilm
from scipy.stats import spearmanr
from skills import adapted, tasks_of
from torch import Tensor

import hatcl
from hatcl.skills.scorer import TIMINGS

ORDER = ("sst-2", "qqp")


def scored(model: Any, task: Any, optimizer: torch.optim.Optimizer, steps: int, generator: torch.Generator) -> Any:
    """Learn a task, scored in both ways."""
    scorers = {timing: hatcl.SkillScorer(model, grain="lora_pair") for timing in TIMINGS}
    handles = [s.watch(optimizer, timing) for timing, s in scorers.items()]
    model.train()
    for step in range(steps):
        some = torch.randint(len(task.train), (16,), generator=generator).tolist()
        loss = task.loss(model, task.collate([task.train[i] for i in some]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 9:
            print(f"  {task.name} {step + 1}/{steps}: {float(loss.detach()):.4f}", flush=True)
    for handle in handles:
        handle.remove()
    return {timing: s.scores() for timing, s in scorers.items()}


def state(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in hatcl.skill_tensors(model).items()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum(float((a[n] - b[n]).square().sum()) for n in a) ** 0.5


def main(steps: int) -> None:
    torch.set_num_threads(1)
    base, tokenizer = of_minilm("AutoModel"), of_minilm("AutoTokenizer")
    tasks = tasks_of(ORDER, base, tokenizer)
    model, generator = adapted(base, 0), torch.Generator().manual_seed(0)
    rate = read("skills_lr")["lr"]
    found: list[dict[str, Any]] = []
    adapters = []
    for task in tasks:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
        found.append(scored(model, task, optimizer, steps, generator))
        adapters.append(state(model))
    rows = {}
    for task, scores in zip(tasks, found, strict=True):
        skills = [hatcl.localize(scores[t]).on for t in TIMINGS]
        rows[task.name] = {
            "rank_correlation": float(spearmanr(*[scores[t].values for t in TIMINGS]).statistic),
            "top_fifth_shared": float((skills[0] & skills[1]).sum() / skills[0].sum()),
            "pairs": len(skills[0]),
        }
    merged = {t: hatcl.consolidate(*adapters, hatcl.accumulate_scores(found[0][t], None), found[1][t]) for t in TIMINGS}
    apart = distance(merged["before"], merged["after"]) / distance(*adapters)
    result = {"steps": steps, "lr": rate, "tasks": rows, "consolidated_apart": apart}
    save("skills_timing", result)
    print(result)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    main(parser.parse_args().steps)
