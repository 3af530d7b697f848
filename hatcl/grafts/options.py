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
        lr: by the natural rule the share of the loss that the first step would remove, to first order, if the k gates
            that matter most moved in proportion: rates of order 1 fit every model, loss and size. (In a few tries 1
            lowered the loss in every step; 2 ended lower, in one of them after it had overshot; 4 overshot more often.)
            By the plain rule the factor of its formula.
        steps: how often the logits move.
        accumulate: so many batches make one step, every example with the same weight; None = one pass over all. Masks
            are then compared on the first so many of one pass, so that batches in a telling order are to be shuffled.
        gamma: what the model computes with. hard: 0 or 1, with gradients as though it were gamma (straight-through),
            so that the loss is the graft's own. soft: sigmoid(L), as published; needs another copy of the candidates.
        rule: natural: `dL = -lr * 2 * bias * loss / squares * g * delta`. That is gradient descent divided by
            `sigmoid'(L)`, the Fisher information of a coin that shows 1 with probability gamma = sigmoid(L). What is
            before `g * delta` is settled in the first step: squares is the sum of `(g * delta)^2` over the k elements
            where it is largest, so that `loss / squares` is Polyak's step for the gates, and 2 * bias the way of a
            logit from one side to the other. (The loss is taken to be bounded by 0, such as a cross-entropy; another
            one needs another lr.)
            plain: `dL = -lr * g * delta * sigmoid'(L)`, as published. Its last factor is 5e-5 where L starts, and `g *
            delta` of a single element is a small part of the loss: hence the published rates near 1e7. Needs another
            float per element.
        size: fixed: the graft is the k elements of the highest logits. free: those with `L > 0`, as published
            (rounded gamma), of which there are k at the start only.
        optimizer: `sgd`, or `adam` on the rule's gradients, which moves every logit alike, however little its element
            matters; with rates near 0.1 (needs three more floats per element).
        momentum: of sgd (needs two more floats per element).
        bias: logits start at `bias - S` for members of the start and `S - bias` for the others, S in U[0, 1).
        seed: of S, and of the global random generator while learning (order of a DataLoader's batches).

    Raises:
        ConfigError: a value outside its range, or momentum that has no effect.
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
