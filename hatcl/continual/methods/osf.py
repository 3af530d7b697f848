"""OSF: each task changes the directions of the weights that matter least (Nayak et al. 2025, arXiv 2504.07097)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...calls import device_of, seeded
from ...config import number
from ...errors import SkillError
from ...integrations.peft_osf import keep_orthogonal, merge_weights, split_layers, split_weights
from ...lend import lent
from ...skills.tensors import adapters_of
from ..tasks import ContinualTask
from .registry import Batch, Method, continual_method


@continual_method("osf", paper="Nayak et al. 2025, arXiv 2504.07097")
class OSF(Method):
    """Orthogonal Subspace Fine-tuning with peft's implementation: no adapter is added; the linear layers' own weights
    learn. Before each task every weight is split by its singular values, `W = U_high S_high V_high + U_low S_low
    V_low`. The task learns the low part, kept orthogonal to the high one, so that `U_high^T W V_high^T = S_high` stays.
    After the task the parts are merged into one weight, which the next task splits again.

    Everything else is frozen except an image model's head. A task's folder has the weights at the end of the task. The
    parameters are new for each task, and so is the optimizer, regardless of `fresh_optimizer`.

    Deviations: all layers have the same share, as in peft, while the paper's depends on each layer's importance (eq. 5
    and 6); after each step the factors are projected, in addition to the gradients, since Adam's step leaves the space
    of its gradient.
    """

    adapted, renews = False, True

    @dataclass(frozen=True)
    class Options:
        """Args:
        preserved: the share of each weight's directions that the first task may not change (peft's default: half).
        preserved_last: the same for the last task; tasks in between rise evenly. None = the first task's.
        """

        preserved: float = 0.5
        preserved_last: float | None = None

        def __post_init__(self) -> None:
            for name in ("preserved", "preserved_last"):
                if getattr(self, name) is not None or name == "preserved":
                    number(name, getattr(self, name), 0, 1, without="both", what="a share")

    def start(self, model: nn.Module, tasks: Sequence[ContinualTask], seed: int) -> None:
        if adapters_of(model) or any(True for _ in split_layers(model)):
            kind = "a LoRA adapter" if adapters_of(model) else "peft's own OSF layers"
            raise SkillError(
                f"osf learns the model's own weights, but the model has {kind}; give the model without them"
            )
        self.count = len(tasks)
        self.head = _head_of(model)
        self.names = [
            name
            for name, m in model.named_modules()
            if type(m) is nn.Linear and m not in (*self.head, *_tied(model)) and min(m.weight.shape) > 1
        ]
        if not self.names:
            raise SkillError(
                f"osf: {type(model).__name__} has no nn.Linear other than its head, so there is no weight to split; "
                "use a model made of such layers, as most transformers are, or another method"
            )
        for task in tasks[:1]:
            self._check_calls(model, task)
        self._train(model, [model.get_submodule(name).weight for name in self.names])

    def _check_calls(self, model: nn.Module, task: ContinualTask) -> None:
        """Raise if the model reads the weight of a layer without calling it, as BEiT does with its `qkv`: OSF's layer
        learns in its own forward, so nothing would be learned there."""
        layers = {name: model.get_submodule(name) for name in self.names}
        called: set[str] = set()
        hooks = [m.register_forward_hook(lambda *_, name=name: called.add(name)) for name, m in layers.items()]
        weights: list[Any] = [m.weight for m in layers.values()]
        try:
            with seeded(device=device_of(model)), lent(model, weights), torch.enable_grad():
                loss = task.loss(model, task.collate([task.train[i] for i in range(min(2, len(task.train)))]))
                grads = torch.autograd.grad(loss, weights, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        read = [n for n, g in zip(self.names, grads, strict=True) if g is not None and n not in called]
        if read:
            raise SkillError(
                f"osf: {type(model).__name__} reads the weights of {read[0]} ({len(read)} such layers) without calling "
                "the layer, so OSF would learn nothing there; use another method, such as tasl or hat"
            )

    def _train(self, model: nn.Module, weights: Sequence[Any]) -> None:
        """Mark the weights themselves as trained between tasks, so that a checkpoint holds them."""
        model.requires_grad_(False)
        for p in (*weights, *(p for m in self.head for p in m.parameters())):
            p.requires_grad_(True)

    def begin(self, model: nn.Module, stage: int) -> None:
        o = self.options
        last = o.preserved if o.preserved_last is None else o.preserved_last
        share = o.preserved + (last - o.preserved) * stage / max(self.count - 1, 1)
        split_weights(model, self.names, share)
        for p in (p for m in self.head for p in m.parameters()):
            p.requires_grad_(True)

    def after_step(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        keep_orthogonal(model)

    def end(self, model: nn.Module, stage: int) -> None:
        merge_weights(model)
        self._train(model, [model.get_submodule(name).weight for name in self.names])

    def leave(self, model: nn.Module) -> None:
        """Merge what was learned so far into the weights, as for a method that adds nothing."""
        self.end(model, -1)

    def state(self) -> dict[str, Any]:
        return {}


def _head_of(model: Any) -> list[nn.Module]:
    """timm's classifier, which each task trains fully."""
    name = getattr(model, "pretrained_cfg", {}).get("classifier")
    return [model.get_submodule(name)] if isinstance(name, str) else []


def _tied(model: Any) -> list[nn.Module]:
    """The layer that predicts the next word, whose weight most models share with the embeddings."""
    found = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [] if found is None else [found]
