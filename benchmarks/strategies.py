"""hatcl compared with Avalanche's own strategies, in Avalanche's loop and by its metrics.

    pip install avalanche-lib                # in an environment of its own
    python benchmarks/strategies.py          # in 15 minutes on one core: results/strategies.json

Five tasks of two classes each, task labels given: scikit-learn's digits (a fifth of each class for the test) and
CIFAR-10 (500 images a class, 100 for the test). The network is an MLP with two hidden layers of 256 and a head for each
task; AdamW, batches of 32, 10 epochs. The learning rate and the strategy's own option are chosen by the mean accuracy
at the end on a validation part, with one seed; the table shows the test part, with three seeds.
"""

from __future__ import annotations

import itertools
import statistics
import warnings
from typing import Any

import torch
from avalanche.evaluation.metrics import accuracy_metrics, forgetting_metrics
from avalanche.models import as_multitask
from avalanche.training import supervised
from avalanche.training.plugins import EvaluationPlugin
from common import DATA, read, save
from torch import nn

import hatcl
from hatcl.data.images import ImageData, digits_tasks, npz_task, split_classes
from hatcl.integrations.avalanche import HATPlugin, image_benchmark

NAME, RATES, SEEDS, EPOCHS = "strategies", (1e-3, 3e-3), 3, 10
CHOICES: dict[str, tuple[str, dict[str, tuple[Any, ...]]]] = {
    "Naive": ("Naive", {}),
    "EWC": ("EWC", {"ewc_lambda": (1e2, 1e4, 1e6)}),
    "LwF": ("LwF", {"alpha": (1.0, 10.0), "temperature": (2.0,)}),
    "Replay of 200 images": ("Replay", {"mem_size": (200,)}),
    "hatcl": ("Naive", {}),
}


def problems() -> dict[str, list[ImageData]]:
    return {"digits": digits_tasks(), "cifar10": split_classes(npz_task(DATA / "cifar10" / "data.npz"), 5)}


def network(inputs: int) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
    net.add_module("classifier", nn.Linear(256, 2))
    return net


def run(name: str, tasks: list[ImageData], rate: float, options: dict[str, Any], seed: int) -> dict[str, float]:
    """Mean accuracy on all tasks at the end, and what was forgotten of them, in percent."""
    torch.manual_seed(seed)
    benchmark = image_benchmark(tasks)
    x = torch.stack([benchmark.train_stream[0].dataset[i][0] for i in range(2)])
    net = network(x[0].numel())
    ours = name == "hatcl"
    model = hatcl.convert(net, len(tasks), x, verify=False) if ours else as_multitask(net, "classifier")
    measures = accuracy_metrics(stream=True), forgetting_metrics(stream=True)
    strategy = getattr(supervised, CHOICES[name][0])(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=rate), criterion=nn.CrossEntropyLoss(),
        train_mb_size=32, eval_mb_size=512, train_epochs=EPOCHS, plugins=[HATPlugin()] if ours else [],
        evaluator=EvaluationPlugin(*measures, loggers=[]), **options,
    )  # fmt: skip
    for experience in benchmark.train_stream:
        strategy.train(experience)
        found = strategy.eval(benchmark.test_stream)
    accuracy, forgetting = (next(v for k, v in found.items() if k.startswith(m)) for m in ("Top1", "StreamForgetting"))
    return {"accuracy": 100 * accuracy, "forgetting": 100 * forgetting}


def chosen(name: str, tasks: list[ImageData]) -> tuple[float, dict[str, Any]]:
    """Rate and options with the best accuracy on validation images."""
    held_out, options = [task.on_validation() for task in tasks], CHOICES[name][1]
    grid = [
        (rate, dict(zip(options, values, strict=True)))
        for rate in RATES
        for values in itertools.product(*options.values())
    ]
    return max(grid, key=lambda given: run(name, held_out, *given, seed=0)["accuracy"])


def main() -> None:
    warnings.simplefilter("ignore")
    result = read(NAME)
    for data, tasks in problems().items():
        for name in CHOICES:
            if name in result.get(data, {}):
                continue
            rate, options = chosen(name, tasks)
            runs = [run(name, tasks, rate, options, seed) for seed in range(SEEDS)]
            result.setdefault(data, {})[name] = {"rate": rate, "options": options, "runs": runs}
            save(NAME, result)
    for data in problems():
        for name, row in result[data].items():
            each = {key: [r[key] for r in row["runs"]] for key in ("accuracy", "forgetting")}
            said = ", ".join(f"{k} {statistics.fmean(v):.1f} ({statistics.stdev(v):.1f})" for k, v in each.items())
            print(f"{data}: {name}: {said}; rate {row['rate']:g}, {row['options']}")


if __name__ == "__main__":
    main()
