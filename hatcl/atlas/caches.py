"""Classifiers made from few-shot features: Tip-Adapter, learned together with the coefficients, and LP++."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calls import Batches, Head, again, cross_entropy, one_pass, outputs
from ..engine.loop import Tell
from ..engine.measures import top1
from ..errors import ConfigError
from ..lend import Evaluating
from .fewshot import FEW_SHOT, STEPS, by_accuracy, repeated
from .fitting import Fitted, Path_, fit, spread
from .linear import Composed
from .options import Options


class TipAdapter(nn.Module):
    """`logits + alpha exp(-beta (1 - W f)) Y` (Zhang et al. 2022, arXiv 2207.09519, eq. 4 and 6): a cache of the shots'
    features next to a classifier.

    Args:
        features: those of the shots, `[M, d]`: the initial W, made unit length. labels: `[M]`, from which Y `[M, C]` is
            made. num_classes: C. alpha, beta: their initial values; 2 and 1 in the repository of aTLAS.
    """

    def __init__(
        self, features: Tensor, labels: Tensor, num_classes: int, *, alpha: float = 2.0, beta: float = 1.0
    ) -> None:
        super().__init__()
        self.keys = nn.Parameter(F.normalize(features.detach().float(), dim=-1))
        self.register_buffer("values", F.one_hot(labels.to(features.device), num_classes).float())
        self.alpha = nn.Parameter(torch.tensor(float(alpha), device=features.device))
        self.beta = nn.Parameter(torch.tensor(float(beta), device=features.device))

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """`[B, C]` from features `[B, d]` (made unit length) and a classifier's logits `[B, C]`."""
        affinity = F.normalize(features.float(), dim=-1) @ self.keys.T
        cached = torch.exp(-self.beta * (1 - affinity)) @ self.get_buffer("values")
        return logits + self.alpha * cached


class CachedHead(nn.Module):
    """A head and a cache as one head."""

    def __init__(self, head: Head, adapter: TipAdapter) -> None:
        super().__init__()
        self.head, self.adapter = head, adapter

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.adapter(features, self.head(features))
        return out


def tip_adapter(
    composer: Composed,
    batches: Batches,
    validation: Batches | None = None,
    *,
    head: Head,
    alpha: float = 2.0,
    beta: float = 1.0,
    keys_lr: float = 1e-3,
    options: Options = None,
    steps: int = STEPS,
    warm_start: Tensor | None = None,
    checkpoint: Path_ | None = None,
    on_progress: Tell | None = None,
) -> tuple[Fitted, CachedHead]:
    """Learn coefficients, W, alpha and beta of a `TipAdapter` together, on the cross-entropy of the shots. The cache is
    made from the shots' features under the initial coefficients.

    As in the repository of aTLAS: lr 0.1 for the coefficients, alpha and beta, 1e-3 for W, cosine. Unlike there, W,
    alpha and beta are not decayed (W is data, and decay would shrink it to zero), AdamW's eps is its default, and
    coefficients are not learned first by themselves (pass those of `few_shot` as `warm_start` for that).

    Args:
        composer: of a model that returns embeddings, such as `hatcl.atlas.encoder`. head: turns these into logits.
            keys_lr: the rate of W. alpha, beta: their initial values. The rest: see `few_shot`.

    Returns:
        The result of learning, and the head that holds the cache.

    Raises:
        ConfigError: the head has fewer classes than the shots' labels; and see `few_shot`.
    """
    chosen = FEW_SHOT.changed(options)
    again(batches, "batches")
    if validation is not None:
        again(validation, "validation")
    before = composer.coefficients.detach().clone()
    if warm_start is not None:
        composer.coefficients.data.copy_(spread(composer, warm_start))
    try:
        with torch.random.fork_rng(devices=[]):  # a checkpoint's keys must meet their own labels: always one order
            torch.default_generator.manual_seed(chosen.seed)
            features, labels = gather(composer, batches)
        classes = head(features[:1]).shape[-1]
    finally:
        composer.coefficients.data.copy_(before)
    if int(labels.max()) >= classes:
        raise ConfigError(f"labels: up to {int(labels.max())}, the head gives {classes} classes")
    adapter = TipAdapter(features, labels, classes, alpha=alpha, beta=beta)
    cached = CachedHead(head, adapter)
    fitted = fit(
        composer,
        lambda batch: cross_entropy(composer, batch, cached),
        repeated(batches, steps),
        select=by_accuracy(composer, validation, cached),
        options=chosen,
        warm_start=warm_start,
        others={
            "keys": (adapter.keys, keys_lr),
            "alpha": (adapter.alpha, chosen.rate),
            "beta": (adapter.beta, chosen.rate),
        },
        checkpoint=checkpoint,
        on_progress=on_progress,
    )
    return fitted, cached.requires_grad_(False)


class LPPlusPlus(nn.Module):
    """`l_c = f (w_c + alpha_c t_c)`, the features f of unit length: class weights learned from the shots, blended with
    given class embeddings t (Huang et al. 2024, arXiv 2404.02285, eq. 3).

    Args:
        weight: w, `[C, d]`. alpha: `[C]`. embeddings: t, `[C, d]`, of unit length.
    """

    def __init__(self, weight: Tensor, alpha: Tensor, embeddings: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("alpha", alpha)
        self.register_buffer("embeddings", embeddings)

    def forward(self, features: Tensor) -> Tensor:
        blended = self.get_buffer("weight") + self.get_buffer("alpha")[:, None] * self.get_buffer("embeddings")
        return F.normalize(features, dim=-1) @ blended.T


def lp_plus_plus(
    composer: nn.Module,
    batches: Batches,
    embeddings: Tensor,
    validation: Batches | None = None,
    *,
    iterations: int = 300,
    momentum: float = 0.9,
) -> LPPlusPlus:
    """Learn an `LPPlusPlus` head on the composed model's features, after `few_shot`. The step sizes follow from the
    data (the paper's Lipschitz bounds): `4 N / lambda_max(F^T F)` for w, with momentum as in its code, and
    `N / (4 max_c sum_i (f_i t_c)^2)` for alpha, one plain step in every tenth iteration. Start: `w_c = sum_i y_ic f_i`,
    `alpha = 250 mean_c mean_{i in c} f_i t_c`. The iteration with the best validation accuracy is kept, else the last.

    Unlike its code, there is no bias (as in the paper), and alpha's gradient is that of the iteration; in the code it
    accumulates, since nothing resets it.

    Args:
        composer: a model that returns embeddings, `[B, d]`. embeddings: t, `[C, d]`, from text or prototypes.

    Raises:
        ConfigError: embeddings have another width, or a class has no shots.
    """
    f, y = gather(composer, batches)
    t = F.normalize(embeddings.to(f), dim=-1)
    if t.dim() != 2 or t.shape[1] != f.shape[1]:
        raise ConfigError(f"embeddings: got {list(embeddings.shape)}, expected [classes, {f.shape[1]}]")
    f = F.normalize(f, dim=-1)
    y1 = F.one_hot(y, len(t)).to(f)
    if not bool(y1.sum(0).all()):
        raise ConfigError(f"class {int((y1.sum(0) == 0).nonzero()[0])} has no shots; LP++ needs some of every class")
    held = None if validation is None else gather(composer, validation)
    text = f @ t.T
    weight = y1.T @ f
    alpha = torch.full((len(t),), float(250 * ((text * y1).sum(0) / y1.sum(0)).mean())).to(f)
    step_w = 4 * len(f) / torch.linalg.matrix_norm(f, 2).square()
    step_alpha = len(f) / (4 * text.square().sum(0).max())
    moved, best = torch.zeros_like(weight), (-1.0, weight, alpha)
    for k in range(iterations):
        off = (f @ weight.T + alpha * text).softmax(-1) - y1  # the cross-entropy's derivative by the logits, times N
        gradient, by_alpha = off.T @ f / len(f), (off * text).sum(0) / len(f)
        moved = momentum * moved + gradient
        weight = weight - step_w * moved
        if (k + 1) % 10 == 0:
            alpha = alpha - step_alpha * by_alpha
        score = float(k)
        if held is not None:
            logits = LPPlusPlus(weight, alpha, t)(held[0])
            score = top1(logits, held[1])
        if score >= best[0]:
            best = (score, weight, alpha)
    return LPPlusPlus(best[1], best[2], t)


@torch.no_grad()
def gather(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """Embeddings `[M, d]` float32 and labels `[M]` of all batches, in evaluation mode.

    Raises:
        ConfigError: there are no examples, or the model does not return one vector per example.
    """
    with Evaluating(model):
        pairs = [(outputs(model, x).float(), y) for x, y in one_pass(batches, "batches")]
    if pairs[0][0].dim() != 2:
        raise ConfigError(
            f"the model gives shape {list(pairs[0][0].shape)}, expected embeddings [batch, d]; use hatcl.atlas.encoder"
        )
    features = torch.cat([x for x, _ in pairs])
    return features, torch.cat([y for _, y in pairs]).to(features.device)
