"""O-LoRA: each task learns its own adapter, orthogonal to the earlier ones (Wang et al. 2023, arXiv 2310.14152)."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...config import number
from ...errors import SkillError
from ...files import read_json
from ...map.lora import factor_in
from ...skills.ilora_files import write_peft
from ...skills.switch import check_peft
from ...skills.tensors import active_adapter, adapters_of, skill_tensors
from ..tasks import ContinualTask
from .registry import Batch, Method, continual_method

ADAPTERS = "adapters.json"


@continual_method("olora", paper="Wang et al. 2023, arXiv 2310.14152")
class OLoRA(Method):
    """The model uses the base and all adapters together, `W + s sum_i B_i A_i`. While task t is learned, the earlier
    adapters are frozen, and the loss gets the term

        orthogonality * sum_{i<t} sum |A_i A_t^T|  +  l2 * sum (||A_t||_F + ||B_t||_F)

    over all adapted layers, as in the paper's code. After a task its adapter is kept as `olora_0`, `olora_1`, ... and
    the trained adapter starts again with peft's own initialisation.

    `adapter/` in a task's folder is one adapter that gives the model as it was scored, the sum of all adapters so far:
    their factors are concatenated, `A = [A_0; A_1; ...]`, `B = [B_0, B_1, ...]`, which multiplies the rank, with the
    same scaling. The single adapters are in `adapter/olora_0` and so on.
    """

    lora = "alone"

    @dataclass(frozen=True)
    class Options:
        """Args:
        orthogonality: the paper's lambda_1. l2: lambda_2, which its scripts set to 0.
        """

        orthogonality: float = 0.5
        l2: float = 0.0

        def __post_init__(self) -> None:
            for name in ("orthogonality", "l2"):
                number(name, getattr(self, name), 0)

    def start(self, model: nn.Module, tasks: Sequence[ContinualTask], seed: int) -> None:
        check_peft(model)
        name = active_adapter(model)
        if name is None:
            raise SkillError(f"olora: {type(model).__name__} has no LoRA adapter; add one with peft.get_peft_model")
        factors = {id(p) for p in skill_tensors(model, name).values()}
        beside = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in factors]
        if beside:
            raise SkillError(
                f"olora: {beside[0]} is trained in addition to A and B ({len(beside)} such parameters), but "
                "adapters that are summed cannot each have their own; make the adapter without modules_to_save (a "
                "task_type for classification adds the head), bias, use_dora and single tokens, or use another "
                "method"
            )
        taken = [n for n in adapters_of(model) if n.startswith("olora_")]
        if taken:
            raise SkillError(f"olora: the model has adapters named {', '.join(taken)} already; delete or rename them")
        self.adapter, self.earlier = name, list[str]()

    def begin(self, model: nn.Module, stage: int) -> None:
        if stage:
            self._keep(model)
        self._activate(model)

    @torch.no_grad()
    def _keep(self, model: Any) -> None:
        """Move the learned adapter to a frozen one, and reinitialise it."""
        config = model.peft_config[self.adapter]
        kept = f"olora_{len(self.earlier)}"
        model.add_adapter(kept, config)
        fresh = {n: p.detach().clone() for n, p in skill_tensors(model, kept).items()}
        ours, theirs = skill_tensors(model, self.adapter), skill_tensors(model, kept)
        for n in ours:
            theirs[n].copy_(ours[n])
            ours[n].copy_(fresh[n])
        self.earlier.append(kept)

    def _activate(self, model: Any) -> None:
        model.base_model.set_adapter([*self.earlier, self.adapter])
        for name in self.earlier:
            for p in skill_tensors(model, name).values():
                p.requires_grad_(False)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss = batch.loss(model)
        ours = skill_tensors(model, self.adapter)
        if self.options.orthogonality:
            for name in self.earlier:
                theirs = skill_tensors(model, name)
                for n, a in ours.items():
                    if _is_a(n):
                        both = theirs[n].flatten(1) @ a.flatten(1).t()
                        loss = loss + self.options.orthogonality * both.abs().sum()
        if self.options.l2:
            loss = loss + self.options.l2 * sum(p.norm() for p in ours.values())
        return loss

    def state(self) -> dict[str, Any]:
        return {}

    def adapters(self, model: nn.Module) -> list[str]:
        return self.earlier or [self.adapter]

    def write(self, model: Any, folder: Path) -> None:
        """Replace the adapter that peft wrote by the sum of all, and write this task's adapter next to the earlier
        ones."""
        count = len(self.earlier) + 1
        ours = skill_tensors(model, self.adapter)
        every = [*(skill_tensors(model, name) for name in self.earlier), ours]
        summed = {n: torch.cat([t[n].detach() for t in every], int(not _is_a(n))) for n in ours}
        config = copy.copy(model.peft_config[self.adapter])
        # keeps alpha / r, or with rsLoRA alpha / sqrt(r)
        scale = math.sqrt(count) if config.use_rslora else count
        config.r, config.lora_alpha = config.r * count, config.lora_alpha * scale
        config.rank_pattern = {n: r * count for n, r in config.rank_pattern.items()}
        config.alpha_pattern = {n: a * scale for n, a in config.alpha_pattern.items()}
        write_peft(model, summed, config, folder / "adapter")
        if self.earlier:
            config = copy.copy(model.peft_config[self.adapter])
            write_peft(model, ours, config, folder / "adapter" / f"olora_{count - 1}")

    def save(self, folder: Path) -> None:
        (folder / ADAPTERS).write_text(json.dumps(self.earlier))

    def load(self, folder: Path, model: Any) -> None:
        self.earlier = read_json(folder / ADAPTERS, list)
        for name in self.earlier:
            model.add_adapter(name, model.peft_config[self.adapter])
        self._activate(model)


def _is_a(name: str) -> bool:
    """Whether it is the factor A, [r, in], which reads; B is [out, r]."""
    parts = name.split(".")
    at = factor_in(parts)
    return at is not None and parts[at].endswith("_A")
