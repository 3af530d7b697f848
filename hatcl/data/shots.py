"""K-shot sampling: a few examples of each class to learn from, as many to validate on, none in two parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ..config import whole
from ..errors import ConfigError
from .images import Images
from .texts import TextData


def k_shot(data: TextData, k: int, seed: int = 0, labels: Sequence[str] | None = None) -> TextData:
    """K examples of each class for training and K others for validation, as LM-BFF takes them (Gao et al. 2021, arXiv
    2012.15723). The same seed gives the same examples.

    Validation is drawn from the data's own validation pairs, or from all that training left over where these have too
    few. A text comes once in train or validation, also where the data has it several times; test loses the texts that
    were drawn.

    Args:
        labels: the classes; None = all that the data has.

    Raises:
        ConfigError: k below 1, or a class with too few different texts (or none), by name.
    """
    every = [*data.train, *data.validation, *data.test]
    classes = sorted({y for _, y in every}) if labels is None else list(labels)
    chosen = draw([x for x, _ in data.train], [y for _, y in data.train], k, seed, classes, "train")
    train = [data.train[i] for i in chosen]
    taken = {x for x, _ in train}
    pool = [p for p in data.validation if p[0] not in taken]
    counts = Counter(y for _, y in set(pool))
    if any(counts[y] < k for y in classes):
        pool += [p for p in data.train if p[0] not in taken]
    chosen = draw([x for x, _ in pool], [y for _, y in pool], k, seed, classes, "validation")
    validation = [pool[i] for i in chosen]
    taken |= {x for x, _ in validation}
    rows = [i for i, (x, _) in enumerate(data.test) if x not in taken]
    turns = [data.turns[i] for i in rows] if data.turns else []
    return TextData(train, validation, [data.test[i] for i in rows], turns)


def k_shot_images(images: Images, k: int, seed: int = 0) -> tuple[Images, Images]:
    """The same of images: K of each class to learn from, and K others."""
    keys, labels = [x.tobytes() for x in images.x], images.y.tolist()
    classes = sorted(set(labels))
    first = draw(keys, labels, k, seed, classes, "train")
    taken = {keys[i] for i in first}
    rest = [i for i, key in enumerate(keys) if key not in taken]
    second = draw([keys[i] for i in rest], [labels[i] for i in rest], k, seed, classes, "validation")
    return images.at(torch.tensor(first)), images.at(torch.tensor([rest[i] for i in second]))


def draw(
    keys: Sequence[Hashable], labels: Sequence[Hashable], k: int, seed: int, classes: Sequence[Hashable], part: str
) -> list[int]:
    """Indices of k examples of each class with different keys, in their own order (`hatcl.atlas.sample_shots`).

    Raises:
        ConfigError: k below 1, or a class with too few, by name.
    """
    whole("k", k)
    first: dict[Hashable, int] = {}
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    ids = list(first.values())
    counts = Counter(labels[i] for i in ids)
    for c in classes:
        if counts[c] < k:
            left = " besides those drawn for train" if part == "validation" else ""
            raise ConfigError(
                f"k-shot: class {c!r} has {counts[c] or 'no'} different examples for {part}{left}, expected {k}; give "
                "a smaller k, or more data"
            )
    place = {c: i for i, c in enumerate(classes)}
    ids = [i for i in ids if labels[i] in place]
    found = sample_shots([place[labels[i]] for i in ids], k, seed=seed, num_classes=len(classes))
    return [ids[i] for i in found.tolist()]


def sample_shots(
    labels: Tensor | Sequence[int],
    shots: int | float,
    *,
    seed: int = 0,
    num_classes: int | None = None,
    at_most: bool = False,
) -> Tensor:
    """Indices of a few examples: `shots` of each class, or a fraction of all. The same seed gives the same examples;
    with it, those of fewer shots are among those of more.

        loader = DataLoader(Subset(dataset, sample_shots(labels, 4)), batch_size=128, shuffle=True)

    Args:
        shots: an integer, or a fraction between 0 and 1. seed: of the choice; global random numbers are left alone.
        num_classes: of the task; None = the largest label + 1.
        at_most: take all of a class that has fewer, instead of raising.

    Raises:
        ConfigError: a class without examples or (unless `at_most`) with too few, or shots that are neither.
    """
    y = torch.as_tensor(labels).cpu().long()
    if y.dim() != 1 or not len(y):
        raise ConfigError(f"labels: got shape {list(y.shape)}, expected one label per example, [N]")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    if isinstance(shots, float):
        if not 0 < shots <= 1 or int(shots * len(y)) < 1:
            raise ConfigError(f"shots: got the fraction {shots!r} of {len(y)} examples, expected one that gives any")
        return order[: int(shots * len(y))].sort().values
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 1:
        raise ConfigError(f"shots: got {shots!r}, expected an integer of at least 1 or a fraction")
    chosen = []
    for c in range(int(y.max()) + 1 if num_classes is None else num_classes):
        of_class = order[y[order] == c]
        if not len(of_class):
            raise ConfigError(f"class {c} has no examples; pass num_classes= or relabel, so that every class has some")
        if len(of_class) < shots and not at_most:
            raise ConfigError(f"class {c} has {len(of_class)} examples, {shots} shots are asked for; or at_most=True")
        chosen.append(of_class[:shots])
    return torch.cat(chosen).sort().values
