"""Classification with a frozen head: a model's embeddings, and heads made from class prototypes, from embeddings of
class names, or trained once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn

from ..calls import Batches
from ..config import one_of
from ..data.prompts import PLAIN
from ..errors import ConfigError
from ..integrations.clip import ImageTower, kind_of_clip, text_embeddings
from .caches import gather

POOLS = ("auto", "pooler", "mean", "first", "last")


def encoder(model: nn.Module, pool: str = "auto") -> nn.Module:
    """A copy of a timm or transformers model that returns embeddings `[B, d]` instead of logits. Its parameters keep
    their names, so that task vectors of the model fit.

        composer = hatcl.compose(hatcl.atlas.encoder(model), vectors)

    timm: `forward_head(forward_features(x), pre_logits=True)`. transformers, text and vision: the base model's pooled
    output. Parameters of the old head stay in it unused; their coefficients stay zero. A CLIP model of open_clip or
    transformers: only its image tower, with the projection, before the embeddings are made unit length.

    Args:
        pool: for transformers. `auto`: the model's own pooler if it has one, else the mean; `pooler`; `mean` over
            tokens (those of the attention mask); `first` token; `last` token (of the attention mask).

    Raises:
        ConfigError: the model comes from another library (pass a model whose forward returns embeddings directly to
            `compose`), or the pool is unknown.
    """
    one_of("pool", pool, POOLS)
    if kind_of_clip(model) is not None:
        if pool != "auto":
            raise ConfigError(f"pool: got {pool!r} for a CLIP model, which pools by itself; leave it out")
        return copy.deepcopy(ImageTower(model))
    kind = "timm" if hasattr(model, "forward_head") and hasattr(model, "forward_features") else ""
    if not kind and hasattr(model, "config") and hasattr(model, "base_model"):
        kind = "transformers"
    if not kind:
        raise ConfigError(
            f"encoder: {type(model).__name__} is not a timm, transformers or CLIP model; pass a module whose "
            "forward returns embeddings [batch, d] directly to compose"
        )
    if kind == "timm" and pool != "auto":
        raise ConfigError(f"pool: got {pool!r} for a timm model, which pools by itself; set it with global_pool=")
    out = copy.deepcopy(model)
    out.forward = _Embeds(out, kind, pool)
    return out


class _Embeds:
    """Replaces a model's forward. It is an object, not a function, so that copies and pickles of the model refer to
    themselves."""

    def __init__(self, model: nn.Module, kind: str, pool: str) -> None:
        self.model, self.kind, self.pool = model, kind, pool

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        model: Any = self.model
        if self.kind == "timm":
            out: Tensor = model.forward_head(model.forward_features(*args, **kwargs), pre_logits=True)
            return out
        base = model.base_model
        run = type(model).forward.__get__(model) if base is model else base
        got = run(*args, **kwargs)
        return pooled_output(got, self.pool, kwargs.get("attention_mask"))


def pooled_output(out: Any, pool: str, mask: Tensor | None = None) -> Tensor:
    """Pool the output of a transformers base model to `[B, d]`.

    Raises:
        ConfigError: the model has no pooler for `pooler`, or its output has no hidden states.
    """
    own = getattr(out, "pooler_output", None)
    if own is not None and pool in ("auto", "pooler"):
        return own.flatten(1)
    if pool == "pooler":
        raise ConfigError("pool: the model has no pooler; use mean, first or last")
    hidden = out[0] if isinstance(out, (tuple, list)) else getattr(out, "last_hidden_state", None)
    if not isinstance(hidden, Tensor):
        raise ConfigError(f"encoder: the base model gives {type(out).__name__} without last_hidden_state")
    if hidden.dim() == 4:  # maps of a convolutional network
        return reduce(hidden, "b d h w -> b d", "mean")
    if pool == "first":
        return hidden[:, 0]
    if mask is None:
        return hidden[:, -1] if pool == "last" else hidden.mean(1)
    if pool == "last":
        at = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), at]
    weight = mask.to(hidden)[..., None]
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


class ClassHead(nn.Module):
    """`scale cos(f, w_c)`, as in zero-shot classification with CLIP, or `f w_c + b_c`. Frozen: it has no parameters.

    Args:
        weight: `[C, d]`. bias: `[C]`. scale: the factor of the cosine; None = the plain product.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, scale: float | None = None) -> None:
        super().__init__()
        w = weight.detach().float()
        self.register_buffer("weight", w if scale is None else F.normalize(w, dim=-1))
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        weight = self.get_buffer("weight")
        if self.scale is not None:
            return self.scale * F.normalize(features.float(), dim=-1) @ weight.T
        return F.linear(features.float(), weight, self.get_buffer("bias") if self.bias is not None else None)


def class_embeddings(embeddings: Tensor, *, scale: float = 100.0) -> ClassHead:
    """A head from an embedding per class, such as those of class names by a text encoder: `scale cos(f, t_c)`.

    Args:
        embeddings: t, `[C, d]`. scale: CLIP's is 100.

    Raises:
        ConfigError: they have another shape, or a class is all zeros.
    """
    if embeddings.dim() != 2 or not bool(embeddings.any(1).all()):
        raise ConfigError(f"embeddings: got {list(embeddings.shape)}, expected [classes, d] without rows of zeros")
    return ClassHead(embeddings, scale=scale)


def text_head(
    model: nn.Module, tokenize: Callable[[Sequence[str]], Any], classes: Sequence[str], templates: Sequence[str] = PLAIN
) -> ClassHead:
    """A head from the names of classes: `scale cos(f, t_c)`, t_c the embedding of the name in each of the templates,
    averaged, by the text tower of a CLIP model, and its `exp(logit_scale)` (see `text_embeddings`).

        head = hatcl.atlas.text_head(clip, open_clip.get_tokenizer("ViT-B-32"), ["cat", "dog"])

    Args:
        model: a model of open_clip, or a `CLIPModel` of transformers. tokenize: texts -> the inputs of its text tower,
            a tensor or a mapping. templates: with `{}` in the place of the name.

    Raises:
        ConfigError: it is another kind of model.
    """
    embeddings, scale = text_embeddings(model, tokenize, classes, templates)
    return ClassHead(embeddings, scale=scale)


def prototypes(
    model: nn.Module, batches: Batches, num_classes: int | None = None, *, scale: float = 100.0
) -> ClassHead:
    """A head from labelled examples without training: `scale cos(f, m_c)`, m_c the mean of the class's embeddings, each
    of unit length (Snell et al. 2017, with cosines).

    Args:
        model: a model that returns embeddings, such as `encoder(model)`. num_classes: None = the largest label + 1.

    Raises:
        ConfigError: a class has no examples.
    """
    features, labels = gather(model, batches)
    hot = _hot(labels, num_classes).to(features)
    return ClassHead(hot.T @ F.normalize(features, dim=-1), scale=scale)


def trained_head(
    model: nn.Module, batches: Batches, num_classes: int | None = None, *, decay: float = 1e-3, iterations: int = 100
) -> ClassHead:
    """A linear head, trained on the model's unchanged embeddings: multinomial logistic regression with
    `decay / 2 ||W||^2`, by L-BFGS over all examples at once (so it is the same every time).

    Raises:
        ConfigError: a class has no examples.
    """
    features, labels = gather(model, batches)
    classes = _hot(labels, num_classes).shape[1]
    mean, spread = features.mean(0), features.std(0, unbiased=False).clamp(min=1e-6)
    x = (features - mean) / spread
    weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    w = weight.detach() / spread
    return ClassHead(w, bias.detach() - w @ mean)


def _hot(labels: Tensor, num_classes: int | None) -> Tensor:
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    if int(labels.max()) >= classes:
        raise ConfigError(f"labels: up to {int(labels.max())}, expected below num_classes, {classes}")
    hot = F.one_hot(labels, classes)
    empty = (hot.sum(0) == 0).nonzero().view(-1).tolist()
    if empty:
        raise ConfigError(
            f"class {empty[0]} has no examples ({len(empty)} such classes); a head needs some of every one"
        )
    return hot
