"""K-shot sampling: a few examples of each class to learn from, as many to validate on, none in two parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import torch

from ..atlas.fewshot import sample_shots
from ..atlas.images import Images
from ..config import whole
from ..continual.text import TextData
from ..errors import ConfigError


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
