"""Avalanche: hatcl as a plugin, compared with two of Avalanche's own strategies, on the same five tasks of digits.

Needs Avalanche and scikit-learn: pip install -e '.[avalanche,data]'
"""

import torch
from avalanche.evaluation.metrics import accuracy_metrics, forgetting_metrics
from avalanche.models import as_multitask
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive, Replay
from torch import nn

import hatcl
from hatcl.data.images import digits_tasks
from hatcl.integrations.avalanche import HATPlugin, image_benchmark

benchmark = image_benchmark(digits_tasks())  # task labels 0 to 4, two classes each
x = torch.stack([benchmark.test_stream[0].dataset[i][0] for i in range(8)])


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
    net.add_module("classifier", nn.Linear(128, 2))
    return net


converted = hatcl.convert(network(), num_tasks=5, example_inputs=x)
theirs = [as_multitask(network(), "classifier") for _ in range(2)]  # with a head for each task, as hatcl has
choices = (Naive, theirs[0], {}), (Replay, theirs[1], {"mem_size": 50}), (Naive, converted, {"plugins": [HATPlugin()]})
for kind, model, options in choices:
    watch = EvaluationPlugin(accuracy_metrics(stream=True), forgetting_metrics(stream=True), loggers=[])
    general = {"criterion": nn.CrossEntropyLoss(), "train_mb_size": 32, "eval_mb_size": 256, "evaluator": watch}
    general["optimizer"] = torch.optim.AdamW(model.parameters(), lr=3e-3)
    strategy = kind(model=model, train_epochs=10, **general, **options)
    found = [(strategy.train(e), strategy.eval(benchmark.test_stream))[1] for e in benchmark.train_stream][-1]
    accuracy, forgetting = (v for k, v in found.items() if k.startswith(("Top1_Acc_Stream", "StreamForgetting")))
    print(f"{'hatcl' if model is converted else kind.__name__}: {accuracy:.1%} right, {forgetting:.1%} forgotten")
print(hatcl.certify(converted, x, strict=True))
