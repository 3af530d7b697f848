"""Forgetting task 1 of 3, in an MLP, a ResNet and a ViT on real tasks (mnist, fashion_mnist, notmnist).

    python benchmarks/forgetting.py [--models mlp resnet vit] [--epochs 3]

Results per model: tasks 0 and 2 are bit-equal before and after; every element that the dry run listed was erased; the
freed capacity learns a new task. An attacker who kept task 1's gates, head, norms and statistics puts them back, and
leaves, zeroes or rescales the re-drawn elements; the result is task 1's accuracy. For comparison, the 16-shot
relearning curves of the forgotten task and of the same task in a model that never saw it.
"""

from __future__ import annotations

import argparse
import copy

import timm
import torch
from common import Task, accuracy, fit, load, logits, save
from torch import nn
from torch.nn import functional as F

import hatcl
from hatcl.hat.gates import gates_of
from hatcl.hat.held import held, own_buffers

NAMES = ["mnist", "fashion_mnist", "notmnist"]
SHOTS, STEPS, EVERY = 16, 60, 10


def make(kind: str) -> nn.Module:
    if kind == "mlp":
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(3072, 400),
            nn.ReLU(),
            nn.Linear(400, 400),
            nn.ReLU(),
            nn.Linear(400, 400),
            nn.ReLU(),
            nn.Linear(400, 10),
        )
    if kind == "resnet":
        return timm.create_model("resnet10t", num_classes=10)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=10)


def fresh(kind: str, seed: int, config: hatcl.HATConfig, x: torch.Tensor) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = hatcl.convert(make(kind), example_inputs=x, config=config)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)


def teach(model: nn.Module, optimizer: torch.optim.Optimizer, t: int, task: Task, epochs: int) -> None:
    with hatcl.learn(model, t, optimizer, steps=epochs * task.steps(64), epochs=epochs) as learning:
        fit(model, task, optimizer, epochs, 64, t, extra=learning.penalty)


def on(model: nn.Module, t: int, task: Task) -> torch.Tensor:
    with hatcl.task(model, t):
        return logits(model, task.x_test)


def score(model: nn.Module, t: int, task: Task) -> float:
    with hatcl.task(model, t):
        return accuracy(model, task)


def restored(model: nn.Module, before: nn.Module, t: int, erased: dict[str, torch.Tensor], factor: float) -> nn.Module:
    """The attacker's model: task t's gates, copies and statistics from before, re-drawn elements times `factor`."""
    model = copy.deepcopy(model)
    old = {h.name: h.param for h in held(before)}
    with torch.no_grad():
        for h in held(model):
            if h.task == t:
                h.param.copy_(old[h.name])
            elif h.name in erased:
                h.param.copy_(torch.where(erased[h.name], h.param * factor, h.param))
        stats = dict(own_buffers(before, t))
        for name, b in own_buffers(model, t):
            b.copy_(stats[name])
        gates_of(model)[0].masks[t] = gates_of(before)[0].masks[t]
        gates_of(model)[0].sealed[t] = True
        gates_of(model)[0].epoch += 1
    return model


def relearn(model: nn.Module, optimizer: torch.optim.Optimizer, t: int, task: Task) -> list[float]:
    """Test accuracy along 16-shot learning, with the gates as they are at that step."""
    chosen = torch.cat([(task.y == c).nonzero().flatten()[:SHOTS] for c in range(task.classes)])
    generator = torch.Generator().manual_seed(0)
    curve = []
    with hatcl.learn(model, t, optimizer, steps=STEPS) as learning:
        for step in range(STEPS):
            if step % EVERY == 0:
                curve.append(accuracy(model, task))
            model.train()
            pick = chosen[torch.randperm(len(chosen), generator=generator)[:64]]
            loss = F.cross_entropy(model(task.x[pick]), task.y[pick]) + learning.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        curve.append(accuracy(model, task))
    return curve


def run(kind: str, epochs: int, seed: int, config: hatcl.HATConfig) -> dict:
    tasks = [load(n) for n in NAMES]
    model, optimizer = fresh(kind, seed, config, tasks[0].x[:2])
    for t, task in enumerate(tasks):
        teach(model, optimizer, t, task, epochs)
    learned = [score(model, t, task) for t, task in enumerate(tasks)]
    kept = {t: on(model, t, tasks[t]) for t in (0, 2)}
    before = copy.deepcopy(model)
    planned = hatcl.forget_task(model, 1, dry_run=True)
    report = hatcl.forget_task(model, 1)
    old = {h.name: h.param.detach() for h in held(before)}
    erased = {}
    for h in held(before):
        if h.name in planned.erased:
            needed = torch.zeros(h.param.shape, dtype=torch.bool)
            for t in (0, 2):
                needed |= h.live(t)
            erased[h.name] = h.live(1) & ~needed
    now = {h.name: h.param.detach() for h in held(model)}
    changed = {n: int((now[n] != old[n]).sum()) for n in erased}
    result = {
        "learned": learned,
        "bit_equal": {t: torch.equal(on(model, t, tasks[t]), kept[t]) for t in (0, 2)},
        "listed": planned.total_erased,
        "changed": sum(changed.values()),
        "all_listed_erased": changed == planned.erased,
        "share_kept": report.share_kept,
        "attack": {
            f"times {f:g}": score(restored(model, before, 1, erased, f), 1, tasks[1]) for f in (1.0, 0.0, 0.1, 3.0)
        },
        "chance": 1 / tasks[1].classes,
    }
    again = copy.deepcopy(model)
    result["relearn_forgotten"] = relearn(again, torch.optim.AdamW(again.parameters(), lr=1e-3), 1, tasks[1])
    never, o = fresh(kind, seed, config, tasks[0].x[:2])
    for t in (0, 2):
        teach(never, o, t, tasks[t], epochs)
    result["relearn_never_seen"] = relearn(never, torch.optim.AdamW(never.parameters(), lr=1e-3), 1, tasks[1])
    teach(model, optimizer, 1, tasks[1], epochs)
    result["capacity_used_again"] = score(model, 1, tasks[1])
    result["bit_equal_after_relearning"] = {t: torch.equal(on(model, t, tasks[t]), kept[t]) for t in (0, 2)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["mlp", "resnet", "vit"])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hat", nargs="*", default=[], metavar="KEY=VALUE", help="HATConfig options")
    args = parser.parse_args()
    import ast

    options = {}
    for pair in args.hat:
        key, _, value = pair.partition("=")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    config = hatcl.HATConfig.from_dict({"num_tasks": 3, **options})
    out = {"tasks": NAMES, "epochs": args.epochs, "config": config.to_dict(), "models": {}}
    for kind in args.models:
        out["models"][kind] = row = run(kind, args.epochs, args.seed, config)
        print(kind, {k: v for k, v in row.items()}, flush=True)
    masks = config.masks.replace(":", "")
    save(f"forgetting_reuse_{config.reuse}" if masks == "learned" else f"forgetting_masks_{masks}", out)


if __name__ == "__main__":
    main()
