"""Files as this version writes them: `python tests/format_parts.py` writes one of each kind to
`tests/formats/VERSION/`, with the answers that they must give. Run it once for a release; the files are never written
again, and every later version must read them (`tests/test_formats.py`)."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hatcl
from hatcl.continual import ContinualTask, learn_sequence

FOLDER = Path(__file__).with_name("formats")


def network() -> nn.Module:
    """The base that some of the files need, without drawing: the same in every version of torch."""
    net = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 3))
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(torch.sin(torch.arange(p.numel()).view(p.shape) * 0.7 + i))
    return net


def inputs() -> Tensor:
    return torch.cos(torch.arange(60.0).view(10, 6) * 1.3)


def labels() -> Tensor:
    return torch.arange(10) % 3


def sequence_tasks(may_learn: bool) -> list[ContinualTask]:
    """Two tasks of a run. One that is finished must be read, not learned again."""

    def loss(model: Any, rows: Tensor) -> Tensor:
        assert may_learn, "the run was learned again instead of being read"
        return F.cross_entropy(model(inputs()[rows]), labels()[rows])

    def score(model: Any) -> float:
        return float((model(inputs()).argmax(1) == labels()).float().mean())

    return [ContinualTask(name, range(10), torch.tensor, loss, score) for name in ("one", "two")]


def learned() -> nn.Module:
    torch.manual_seed(0)
    model = hatcl.convert(network(), num_tasks=3, example_inputs=inputs())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for t in range(2):
        with hatcl.learn(model, t, optimizer, steps=30) as learning:
            for _ in range(30):
                optimizer.zero_grad()
                (F.cross_entropy(model(inputs()), (labels() + t) % 3) + learning.penalty()).backward()
                optimizer.step()
    return model.eval()


def answers_of(model: nn.Module) -> dict[int, Tensor]:
    found = {}
    for t in hatcl.tasks(model):
        with hatcl.task(model, t), torch.no_grad():
            found[t] = model(inputs())
    return found


def write(folder: Path) -> None:
    folder.mkdir(parents=True)  # what is there is never written again
    model, net = learned(), network()
    hatcl.save_pretrained(model, folder / "model", card={"names": {0: "first", 1: "second"}})
    hatcl.extract_task(model, 1, inputs()).save(folder / "extracted")
    router = hatcl.TaskRouter(model, hatcl.RouterOptions(width=8))
    for t in range(2):
        router.add_task(t, inputs(), (labels() + t) % 3)
    router.save(folder / "router.safetensors")
    finetuned = copy.deepcopy(net)
    with torch.no_grad():
        for p in finetuned.parameters():
            p.mul_(1.25)
    hatcl.TaskVector.between(net, finetuned).save(folder / "vector.safetensors")
    hatcl.select_graft(net, finetuned, 0.25).save(folder / "graft.safetensors")
    torch.manual_seed(0)
    tasks = sequence_tasks(may_learn=True)
    with tempfile.TemporaryDirectory() as work:
        run = learn_sequence(net, tasks, "sequential", {"epochs": 1, "batch_size": 5}, folder=Path(work) / "run")
        (Path(work) / "run").rename(folder / "run")
    said = hatcl.predict(model, inputs(), router=router)
    answers = {
        "model": {t: out.tolist() for t, out in answers_of(model).items()},
        "router": said.task.tolist(),
        "run": run.matrix.tolist(),
    }
    (folder / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    write(FOLDER / hatcl.__version__)
