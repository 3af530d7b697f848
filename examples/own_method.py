"""A continual method of your own, in one class: elastic weight consolidation (Kirkpatrick et al. 2017) pulls every
weight to where earlier tasks left it, the harder the more their losses depend on it."""

import torch
from torch.nn import functional as F

from hatcl.continual import ContinualTask, Method, continual_method, learn_sequence


@continual_method("ewc", paper="Kirkpatrick et al. 2017, arXiv 1612.00796")
class ElasticWeights(Method):
    def start(self, model, tasks, seed):
        self.tasks, self.anchors = tasks, []  # weights, where a task left them, how much its loss depends on them

    def loss(self, model, batch):
        return batch.loss(model) + 3.0 * sum((f * (p - w).square()).sum() for p, w, f in self.anchors)

    def end(self, model, stage):
        task, fisher = self.tasks[stage], [torch.zeros_like(p) for p in model.parameters()]
        for example in task.train:
            slopes = torch.autograd.grad(task.loss(model, task.collate([example])), list(model.parameters()))
            fisher = [f + g.square() / len(task.train) for f, g in zip(fisher, slopes, strict=True)]
        self.anchors += [(p, p.detach().clone(), f) for p, f in zip(model.parameters(), fisher, strict=True)]


def task(i: int) -> ContinualTask:  # is a sum positive? Each task has two numbers of its own and the others' as noise
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(i))
    x[:, [k for k in range(8) if k // 2 != i]] *= 0.3
    y, test = (x[:, 2 * i] + x[:, 2 * i + 1] > 0).long(), slice(100, None)
    score = lambda model: float((model(x[test]).argmax(1) == y[test]).float().mean())  # noqa: E731
    return ContinualTask(f"t{i}", range(100), torch.tensor, lambda m, r: F.cross_entropy(m(x[r]), y[r]), score)


for method in ("sequential", "ewc"):
    torch.manual_seed(0)
    result = learn_sequence(torch.nn.Linear(8, 2), [task(i) for i in range(3)], method, {"epochs": 30, "lr": 0.02})
    print(f"{method}: average accuracy {result.average_accuracy:.2f}, backward transfer {result.backward_transfer:.2f}")
