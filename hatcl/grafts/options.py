"""How grafts are learned."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Changeable, number, one_of, whole, without_effect

GRAFT_OPTIMIZERS = ("sgd", "adam")
GAMMAS = ("hard", "soft")
LOGIT_RULES = ("natural", "plain")
SIZES = ("fixed", "free")


@dataclass(frozen=True)
class GraftOptions(Changeable):
    """How `learn_graft` moves the logits L of `gamma = sigmoid(L)`.

    Args:
        lr: for the natural rule, the share of the loss that the first step would remove, to first order, if the k most
        important gates moved in proportion: rates of order 1 fit every model, loss and size. (In a few trials 1 lowered
        the loss in every step; 2 ended lower, once after overshooting; 4 overshot more often.) For the plain rule, the
        factor in its formula.
        steps: the number of times that the logits move.
        accumulate: the number of batches per step, with the same weight for every example; None = one pass over all.
        Masks are then compared on that many first batches of one pass, so shuffle batches whose order carries
        information.
        gamma: the mask that the model computes with. hard: 0 or 1, with gradients as if it were gamma
        (straight-through), so that the loss is the graft's own. soft: sigmoid(L), as published; needs another copy of
        the candidates.
        rule: natural: `dL = -lr * 2 * bias * loss / squares * g * delta`. That is gradient descent divided by
            `sigmoid'(L)`, the Fisher information of a coin that shows 1 with probability gamma = sigmoid(L). The factor
            before `g * delta` is fixed in the first step: squares is the sum of the k largest `(g * delta)^2`, so that
            `loss / squares` is Polyak's step for the gates, and 2 * bias is the distance of a logit from one side to
            the other. (The loss is assumed to be bounded below by 0, like a cross-entropy; other losses need another
            lr.)
            plain: `dL = -lr * g * delta * sigmoid'(L)`, as published. Its last factor is 5e-5 where L starts, and `g *
            delta` of a single element is a small part of the loss: hence the published rates near 1e7. Needs another
            float per element.
        size: fixed: the graft is the k elements with the highest logits. free: the elements with `L > 0`, as published
        (rounded gamma), of which there are k only at the start.
        optimizer: `sgd`, or `adam` on the rule's gradients, which moves every logit equally, even if its element
        matters little; use rates near 0.1 (needs three more floats per element).
        momentum: for sgd (needs two more floats per element).
        bias: logits start at `bias - S` for members of the start and `S - bias` for the others, S in U[0, 1).
        seed: seeds S, and the global random generator while learning (order of a DataLoader's batches).

    Raises:
        ConfigError: a value is outside its range, or momentum has no effect.
    """

    lr: float = 2.0
    steps: int = 10
    accumulate: int | None = None
    gamma: str = "hard"
    rule: str = "natural"
    size: str = "fixed"
    optimizer: str = "sgd"
    momentum: float = 0.0
    bias: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        number("lr", self.lr, 0, without="low")
        number("bias", self.bias, 1)  # S goes up to 1
        number("momentum", self.momentum, 0, 1, without="high")
        whole("steps", self.steps)
        whole("accumulate", self.accumulate, optional=True)
        whole("seed", self.seed, 0)
        one_of("gamma", self.gamma, GAMMAS)
        one_of("rule", self.rule, LOGIT_RULES)
        one_of("size", self.size, SIZES)
        one_of("optimizer", self.optimizer, GRAFT_OPTIMIZERS)
        if self.optimizer != "sgd":
            without_effect(self, ["momentum"], f"optimizer={self.optimizer!r}", "pass optimizer='sgd'")


PUBLISHED = GraftOptions(lr=1e7, gamma="soft", rule="plain", size="free")
"""The published procedure, with the rate of its repository for RoBERTa."""
