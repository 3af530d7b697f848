"""Test-time adaptation: coefficients from unlabelled examples (Zhang et al. 2024, arXiv 2407.02880)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

from ..calls import Head, moved, outputs
from ..config import one_of
from ..engine.loop import Tell
from ..errors import ConfigError
from .entropy import mean_entropy
from .fitting import Fitted, Path_, fit
from .linear import Composed
from .options import AtlasOptions, Options

ADAPTATION = AtlasOptions(lr=1e-2, epochs=10, schedule="cosine")
ADAPTED_BY = ("ufm", "entropy")
View = Callable[[Any], Any]


def adapt(
    composer: Composed,
    examples: Any,
    *,
    head: Head | None = None,
    strong: View | None = None,
    weak: View | None = None,
    per_class: int | None = None,
    batch_size: int = 128,
    objective: str = "ufm",
    options: Options = None,
    checkpoint: Path_ | None = None,
    on_progress: Tell | None = None,
) -> Fitted:
    """Learn coefficients from examples without labels, by unsupervised FixMatch (UFM). No labels are used: the last
    epoch's coefficients are kept without a choice.

    At the start of each epoch the weak view of every example is classified. For each class, the k examples with the
    highest probability of it are trusted, `k = min(N / 10 C, 100)`, with this class as their label. A batch has a
    quarter of trusted examples, which repeat, and three quarters of others; an epoch passes over the others once. For
    the strong view x' of an example

        trusted:   CE(f(x'), argmax of its assigned class)
        others:    CE(f(x'), q),  q = sqrt(p) / sum sqrt(p),  p the weak view's softmax,  where max q > t

    and the loss is their mean over the examples that count. The threshold t goes from 0.9 towards 1: `0.9 + 0.1 e / E`
    in epoch e.

    As published: AdamW, cosine from lr 1e-2 without warm-up, weight decay 0.1, clip 1, 10 epochs, batches of 128.

    The trusted set is that of the authors' released script (github fredzzhang/atlas, src/learn_ufm.py), which ranks all
    examples for each class; an example that two classes select appears once. The batches, q, t and the new estimate in
    each epoch are those of the earlier script (src/learn_coef.py at 03ca31e), which ranks the examples assigned to a
    class by their confidence and drops incomplete batches. The released one takes p / 2 for the root of p and holds t
    at 0.99; by mistake it trusts all examples, with labels assigned before the first epoch, so its loss is
    cross-entropy on these. Both choose the epoch by true labels.

    Args:
        examples: a tensor `[N, ...]`, a mapping of tensors, or a data set with indices and a length. Labels in items
        (input, label) are ignored. head: turns the model's output into logits; None = it is logits already.
        strong: a batch of inputs -> its strong view; None = `random_crops`, for images only.
        weak: the same for the weak view; None = unchanged. per_class: k.
        objective: `ufm`, or for comparison `entropy`: the mean entropy of the predictions, without views and trusted
        examples.
        checkpoint, on_progress: see `fit`.

    Raises:
        ConfigError: there are no examples, no strong view for inputs that are not images, or views for `entropy`.
        NonFiniteLossError: see `fit`.
    """
    one_of("objective", objective, ADAPTED_BY)
    data = Unlabelled(examples)
    if batch_size < 4:
        raise ConfigError(f"batch_size: got {batch_size}, expected at least 4, a quarter of which is trusted")
    if per_class is not None and per_class < 1:
        raise ConfigError(f"per_class: got {per_class}, expected at least 1")
    if objective == "entropy":
        for name, value in (("strong", strong), ("weak", weak), ("per_class", per_class)):
            if value is not None:
                raise ConfigError(f"{name}: has no effect with objective={objective!r}; pass 'ufm', or leave it out")
    chosen = ADAPTATION.changed(options)
    seen = data.take(torch.arange(1))
    if strong is None and objective == "ufm" and not (isinstance(seen, Tensor) and seen.dim() == 4):
        raise ConfigError("strong: the inputs are not images; pass a function that makes a batch's strong view")
    stronger: View = strong or random_crops
    weaker: View = weak or (lambda x: x)
    device = composer.coefficients.device

    def views(ids: Tensor) -> Any:
        return moved(data.take(ids), device)

    @torch.no_grad()
    def predictions() -> Tensor:
        parts = torch.arange(len(data)).split(batch_size)
        return torch.cat([outputs(composer, weaker(views(i)), head).float().softmax(-1).cpu() for i in parts])

    def steps(epoch: int) -> list[Step]:
        if objective == "entropy":
            return [Step(i, torch.full((len(i),), -1), 0.0) for i in torch.randperm(len(data)).split(batch_size)]
        threshold = 0.9 + 0.1 * epoch / chosen.epochs
        return two_streams(*trusted(predictions(), per_class), batch_size, threshold)

    def loss(step: Step) -> Tensor:
        x = views(step.ids)
        if objective == "entropy":
            return mean_entropy(outputs(composer, x, head))
        with torch.no_grad():
            p = outputs(composer, weaker(x), head).float().softmax(-1)
        return ufm_loss(outputs(composer, stronger(x), head), p, step.labels.to(device), step.threshold)

    return fit(composer, loss, steps, options=chosen, checkpoint=checkpoint, on_progress=on_progress)


@dataclass(frozen=True)
class Step:
    """A batch: indices, the labels of trusted examples (-1 for others), the epoch's threshold."""

    ids: Tensor
    labels: Tensor
    threshold: float


class Unlabelled:
    """Unlabelled examples by their index. Raises `ConfigError` if there are none."""

    def __init__(self, source: Any) -> None:
        self.source = source
        sized = next(iter(source.values())) if isinstance(source, Mapping) and source else source
        if not hasattr(sized, "__len__") or not hasattr(sized, "__getitem__") or not len(sized):
            raise ConfigError(
                f"examples: got {type(source).__name__}, expected a tensor, a mapping of tensors or a data set that "
                "has a length above 0 and can be indexed (a DataLoader cannot: pass its dataset)"
            )
        self.count = len(sized)

    def __len__(self) -> int:
        return self.count

    def take(self, ids: Tensor) -> Any:
        """The inputs at these indices, as a batch."""
        if isinstance(self.source, Tensor):
            return self.source[ids]
        if isinstance(self.source, Mapping):
            return {k: v[ids] for k, v in self.source.items()}
        items = [self.source[i] for i in ids.tolist()]
        return default_collate([x[0] if isinstance(x, (tuple, list)) else x for x in items])


def trusted(probabilities: Tensor, per_class: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """For each class, the examples with the highest probability of it.

    Args:
        probabilities: `[N, C]`. per_class: k; None = `min(N / 10 C, 100)`, at least 1.

    Returns:
        Indices of the trusted examples, their assigned classes, and indices of the others; both in ascending order.
    """
    n, classes = probabilities.shape
    k = max(1, min(n // (10 * classes), 100)) if per_class is None else per_class
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[probabilities.argsort(dim=0, descending=True, stable=True)[:k]] = True
    ids = chosen.nonzero().view(-1)
    return ids, probabilities.argmax(-1)[ids], (~chosen).nonzero().view(-1)


def two_streams(ids: Tensor, labels: Tensor, rest: Tensor, batch_size: int, threshold: float) -> list[Step]:
    """Batches of three quarters `rest`, each once and in random order, and a quarter trusted ones, which repeat. If all
    are trusted, batches of these."""
    if not len(rest):
        order = torch.randperm(len(ids))
        return [Step(ids[o], labels[o], threshold) for o in order.split(batch_size)]
    quarter = batch_size // 4
    parts = rest[torch.randperm(len(rest))].split(batch_size - quarter)
    rounds = -(-len(parts) * quarter // len(ids))
    again = torch.cat([torch.randperm(len(ids)) for _ in range(rounds)])
    out = []
    for part, o in zip(parts, again.split(quarter), strict=False):
        out.append(Step(torch.cat([part, ids[o]]), torch.cat([torch.full_like(part, -1), labels[o]]), threshold))
    return out


def ufm_loss(logits: Tensor, weak: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """The loss of `adapt` for one batch.

    Args:
        logits: of the strong view, `[B, C]`. weak: probabilities of the weak view, `[B, C]`.
        labels: classes of trusted examples, -1 for others, `[B]`. threshold: that `max q` must exceed.
    """
    q = weak.detach().float().sqrt()
    q = q / q.sum(-1, keepdim=True)
    is_trusted = labels >= 0
    hard = F.one_hot(labels.clamp(min=0), logits.shape[-1]).to(q)
    target = torch.where(is_trusted[:, None], hard, q)
    counts = (is_trusted | (q.max(-1).values > threshold)).float()
    return (F.cross_entropy(logits, target, reduction="none") * counts).sum() / counts.sum().clamp(min=1)


def random_crops(images: Tensor, smallest: float = 0.5, flip: bool = True) -> Tensor:
    """A random part of each image, with `smallest` to all of its area, resized to the full size; half of them are
    mirrored: the strong view of the published code (torchvision's RandomResizedCrop with an area of 0.5 to 1, here with
    the image's own aspect, for a batch at once).

    Args:
        images: `[B, channels, height, width]`. flip: False where left and right differ (digits, text).
    """
    side = (smallest + (1 - smallest) * torch.rand(len(images))).sqrt()
    shift = (2 * torch.rand(len(images), 2) - 1) * (1 - side)[:, None]
    mirrored = torch.where(torch.rand(len(images)) < 0.5, -1.0, 1.0) if flip else torch.ones(len(images))
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = side * mirrored, side, shift
    grid = F.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
