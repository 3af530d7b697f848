"""A task that comes back: five pairs of digits, an MLP of width 48, five seeds. Each task is learned from eight images;
then task 0 is reopened and learns from 100 others. `cosine` is the scale of a reopened task, `linear` one that rises
from almost 0. Accuracy is measured on images that were used in neither. `python benchmarks/reopen.py` writes
results/reopen.json in a minute."""

from __future__ import annotations

import statistics

import torch
from common import save
from torch import nn
from torch.nn import functional as F

import hatcl
from hatcl.data.images import digits_tasks

STEPS, SEEDS, FEW, MORE = 150, range(5), 8, 100


def run(schedule: str, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    data = []
    for task in digits_tasks():
        x = torch.from_numpy(task.x_train).flatten(1).float() / 255
        order = torch.randperm(len(x))
        data.append((x[order], torch.from_numpy(task.y_train)[order]))
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 2))
    model = hatcl.convert(net, len(data), data[0][0][:2])

    def learn(t: int, x: torch.Tensor, y: torch.Tensor) -> float:
        optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
        with hatcl.learn(model.train(), t, optimizer, STEPS) as learning:
            if schedule == "linear":
                learning.reopened = False
                learning._set_scale()
            for _ in range(STEPS):
                at = torch.randint(len(x), (32,))
                loss = F.cross_entropy(model(x[at]), y[at])
                optimizer.zero_grad(), (loss + learning.penalty()).backward(), optimizer.step()
                losses.append(float(loss))
        return losses[0]

    for t, (x, y) in enumerate(data):
        learn(t, x[:FEW], y[:FEW])
    (x, y), units = data[0], hatcl.describe(model).use[0]

    def accuracy() -> float:
        with hatcl.task(model.eval(), 0), torch.no_grad():
            return float((model(x[FEW + MORE :]).argmax(1) == y[FEW + MORE :]).float().mean())

    before = accuracy()
    report = hatcl.reopen_task(model, 0)
    first = learn(0, x[FEW : FEW + MORE], y[FEW : FEW + MORE])
    after, held = accuracy(), report.share_held
    return {"before": before, "after": after, "first_loss": first, "share_held": held, "units_before": units,
            "units_after": hatcl.describe(model).use[0]}  # fmt: skip


def main() -> None:
    found: dict[str, dict[str, list[float]]] = {}
    for schedule in ("cosine", "linear"):
        runs = [run(schedule, seed) for seed in SEEDS]
        found[schedule] = {name: [r[name] for r in runs] for name in runs[0]}
        print(schedule, *(f"{n} {statistics.fmean(v):.3f}" for n, v in found[schedule].items()), flush=True)
    save("reopen", found)


if __name__ == "__main__":
    main()
