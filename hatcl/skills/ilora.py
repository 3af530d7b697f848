"""I-LoRA: a plastic adapter that learns, and a stable one that follows it slowly (Ren et al. 2024, arXiv
2402.18865)."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.hooks import RemovableHandle

from ..calls import device_of, moved
from ..config import number, one_of, whole
from ..errors import ConfigError, SkillError
from ..shards import check_whole
from . import ilora_files
from .hidden import Hidden, hidden_states_of, masked_mse
from .ilora_config import ILoRAConfig
from .reservoir import Reservoir
from .steps import at_steps
from .switch import adapter_buffers, add_copy, check_peft, of_adapters, pairs, using
from .tensors import active_adapter

log = logging.getLogger(__name__)

STABLE_ADAPTER = "stable"
ON = ("memory", "batch")


class ILoRA:
    """Continual fine-tuning with two LoRA adapters in one peft model:

        loss   = task loss + consistency_weight * mean over layers of MSE(h(plastic), h(stable))
        stable = alpha * stable + (1 - alpha) * plastic        after each step of the optimizer

    with h the hidden states at positions that are not padding, on examples from a memory of earlier tasks. Only the
    plastic adapter gets a gradient. The stable one computes in evaluation mode: its hidden states are those that
    `stable_active()` evaluates, without random numbers and without moving running statistics. The plastic one computes
    in the model's mode, including dropout.

        ilora = ILoRA(model, {"ema_alpha": 0.99})
        with ilora.watch(optimizer):
            for batch in ...:
                loss = model(**batch).loss + ilora.loss(batch)
                ...
        ilora.remember(examples)
        ilora.save("runs/first")

    The stable adapter also follows modules that peft trains fully in addition (classifiers in `modules_to_save`).

    Args:
        model: a peft model with LoRA on any base. config: `ILoRAConfig`, or a mapping of its options; None = the
            defaults.
        adapter: the plastic one; default: the active one, which it must be while learning.
        stable: the name of the stable adapter. It is added as a copy; an existing adapter of that name is continued.
        hidden_states: for models whose `forward(**batch, output_hidden_states=True)` does not return them (timm):
        (model, batch) -> one tensor per layer, or one `Hidden` per stack of layers. For tensors, the batch's
        `attention_mask` marks padding, if it has one.
        loss: the task's loss of a batch, `loss(model, batch)`, for `selective_update` and `replay`; default:
            `model(**batch).loss`.
        collate: makes a batch from a list of remembered examples; default: torch's (for an `ILoRATrainer` its own).
        on: the source of the examples for `loss`: `memory`, or the current `batch`.
        replay: weight of the task's own loss on the memory's examples, which `loss` then adds. The authors' code takes
        the mean of both losses plus the consistency: `replay=1` and twice the `consistency_weight`, over 2.
        batch_size: the number of examples drawn from the memory at a time. seed: the memory's seed.

    Raises:
        ConfigError: an option is outside its range. SkillError: the model or adapter is unsuitable, or the previous
            task's adapter is missing or does not fit (see `load`); the model is then as it was.
    """

    def __init__(
        self,
        model: Any,
        config: ILoRAConfig | Mapping[str, Any] | None = None,
        *,
        adapter: str | None = None,
        stable: str = STABLE_ADAPTER,
        hidden_states: Callable[[Any, Any], Sequence[Tensor] | Sequence[Hidden]] | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        on: str = "memory",
        replay: float = 0.0,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        one_of("on", on, ON)
        whole("batch_size", batch_size)
        number("replay", replay, 0)
        if replay and on == "batch":
            raise ConfigError(f"replay: got {replay!r} with on='batch', expected 0; replay uses the memory's examples")
        config = ILoRAConfig() if config is None else config
        self.config = config if isinstance(config, ILoRAConfig) else ILoRAConfig.from_dict(config)
        self.model, self.stable, self.on, self.batch_size, self.replay = model, stable, on, batch_size, replay
        self.steps = self.moves = 0
        self.terms: dict[str, Tensor] = {}  # terms of the last `loss`, before weighting
        self.memory = Reservoir(self.config.ilora_buffer_size, seed)
        self._hidden_states = hidden_states or hidden_states_of
        self._loss, self.collate = loss or _loss_of, collate
        self.first_task = self.config.prev_task_id is None and self.config.previous_task_model is None
        self.plastic = ""
        if not self.config.use_ilora:
            return
        check_whole(
            model, "ILoRA", "each process needs its two adapters in full: use DistributedDataParallel for this model"
        )
        check_peft(model)
        name = adapter or active_adapter(model)
        if name is None:
            raise SkillError(f"{type(model).__name__} has no LoRA adapter; add one with peft.get_peft_model")
        if name == stable:
            raise SkillError(f"the adapter {name!r} cannot be both plastic and stable; name another with stable=")
        loose = [n for n, p in model.named_parameters() if p.requires_grad and not of_adapters(n)]
        if loose:
            raise SkillError(
                f"{loose[0]} is trained outside the adapter ({len(loose)} such), so both adapters would share it; "
                "name it in LoraConfig(modules_to_save=...), or freeze it"
            )
        self.plastic = name
        added = stable not in model.peft_config
        try:
            if added:
                add_copy(model, name, stable)
            self._find()
            self._begin(added)
        except BaseException:
            if added and stable in model.peft_config:
                model.delete_adapter(stable)
            raise

    def _find(self) -> None:
        self._plastic, self._stable = pairs(self.model, self.plastic, self.stable)
        buffers = [adapter_buffers(self.model, name) for name in (self.plastic, self.stable)]
        self._buffers = [(b, buffers[1][n]) for n, b in buffers[0].items()]
        coarse = next((t for t in self._stable if t.dtype in (torch.float16, torch.bfloat16)), None)
        small = 1 - self.config.ema_alpha
        if coarse is not None and 0 < small < torch.finfo(coarse.dtype).eps:
            log.warning(
                "part of the stable adapter is in %s, where rounding removes steps of 1 - ema_alpha = %g; keep "
                "heads in float32",
                coarse.dtype,
                small,
            )
        for t in self._stable:
            t.requires_grad_(False)

    def _begin(self, added: bool) -> None:
        c = self.config
        if c.previous_task_model is not None:
            ilora_files.load(self, Path(c.previous_task_model), c.prev_task_id)
        elif c.prev_task_id is not None and added:
            if c.ema_adapter_path is None:
                raise SkillError(
                    f"prev_task_id is {c.prev_task_id!r}, but the place of its stable adapter is not given; give "
                    "previous_task_model (the folder it was saved in) or ema_adapter_path"
                )
            ilora_files.load_stable(self, Path(c.ema_adapter_path))

    @property
    def enabled(self) -> bool:
        """Whether I-LoRA is in use."""
        return self.config.use_ilora

    # ---- the moving average -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> bool:
        """Move the stable adapter towards the plastic one; call it after each step of the optimizer, or use `watch`.

        Returns:
            Whether it moved; `selective_update` may keep it in place.

        Raises:
            SkillError: with `selective_update`, the memory is empty after the first task, or the loss is not finite.
        """
        if not self.enabled:
            return False
        self.steps += 1
        if self.config.selective_update and not self._better():
            return False
        plastic: list[Tensor] = [
            p if p.dtype == s.dtype else p.to(s.dtype) for p, s in zip(self._plastic, self._stable, strict=True)
        ]
        torch._foreach_lerp_(list[Tensor](self._stable), plastic, 1 - self.config.ema_alpha)
        for theirs, ours in self._buffers:
            ours.copy_(theirs)
        self.moves += 1
        return True

    def watch(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Call `step` after each step of an optimizer, with a hook, so that it works in any loop. Steps that a
        GradScaler skips do not count.

        Returns:
            a handle: `.remove()`, or a context manager that removes at its end.

        Raises:
            SkillError: the optimizer has none of the plastic adapter's tensors.
        """
        if not self.enabled:
            return RemovableHandle(OrderedDict())
        return at_steps(optimizer, self._plastic, f"of the adapter {self.plastic!r}", lambda _: self.step())

    def _better(self) -> bool:
        if not self._has_memory():
            return True  # before the first task there is nothing that the stable adapter should keep
        batch = self.memory_batch()
        losses = []
        for name in (self.plastic, self.stable):
            with using(self.model, name, evaluate=True):
                loss = self._loss(self.model, batch)
            self._check_finite(name, loss)
            losses.append(float(loss))
        return losses[1] - losses[0] >= self.config.min_update_threshold

    # ---- the consistency --------------------------------------------------------------------------------------------

    def loss(self, batch: Any = None) -> Tensor:
        """The term to add to the task's loss: `consistency_weight * consistency + replay * loss`, on examples of the
        memory (0 during the first task, when it is empty) or, with `on="batch"`, on the current batch. Otherwise
        `batch` is ignored.

        Raises:
            SkillError: see `consistency`; or the memory is empty after the first task, or the loss on it is not finite.
                ConfigError: there is no batch.
        """
        self.terms = {}
        zero = torch.zeros((), device=device_of(self.model))
        if not self.enabled or not (self.config.consistency_weight or self.replay):
            return zero
        if self.on == "batch":
            if batch is None:
                raise ConfigError("batch: got none, but on='batch' compares the current batch's hidden states")
        elif self._has_memory():
            batch = self.memory_batch()
        else:
            return zero
        weight = self.config.consistency_weight
        total = zero
        if weight:
            apart = self.consistency(batch)
            self.terms["consistency"] = apart.detach()
            total = weight * apart
        if not self.replay:
            return total
        again = self._loss(self.model, batch)
        self._check_finite(self.plastic, again)
        self.terms["replay"] = again.detach()
        return total + self.replay * again

    def _check_finite(self, adapter: str, loss: Tensor) -> None:
        if not bool(torch.isfinite(loss)):
            raise SkillError(
                f"the loss of the adapter {adapter!r} on {self.batch_size} examples of the memory is "
                f"{float(loss.detach())}; are all their labels masked (-100), or has learning diverged?"
            )

    def consistency(self, batch: Any) -> Tensor:
        """The mean squared error between the plastic and the stable adapter's hidden states for a batch: over the
        positions that are not padding, then over the chosen layers, then over the stacks (encoder, decoder).

        Raises:
            SkillError: there are no hidden states or no such layer, the mask has another shape or there is only
                padding, or the plastic adapter is not active.
        """
        if not self.enabled:
            return torch.zeros((), device=device_of(self.model))
        if self.model.active_adapter != self.plastic:
            raise SkillError(
                f"the adapter {self.model.active_adapter!r} is active, expected {self.plastic!r}, which learns; call "
                f"set_adapter({self.plastic!r})"
            )
        batch = moved(batch, device_of(self.model))
        plastic = self._stacks(batch)
        with torch.no_grad(), using(self.model, self.stable, evaluate=True):
            stable = self._stacks(batch)
        terms = [
            masked_mse(p.states[i], s.states[i], p.mask)
            for p, s in zip(plastic, stable, strict=True)
            for i in self.config.hidden_state_layers
        ]
        return torch.stack(terms).mean()

    def _stacks(self, batch: Any) -> list[Hidden]:
        given = list(self._hidden_states(self.model, batch))
        stacks = [h for h in given if isinstance(h, Hidden)]
        if not given or (stacks and len(stacks) != len(given)):
            raise SkillError(
                f"hidden_states gave {len(given)} items, {len(stacks)} of them Hidden; expected all or none"
            )
        if not stacks:
            stacks = [
                Hidden(
                    [h for h in given if isinstance(h, Tensor)],
                    batch.get("attention_mask") if isinstance(batch, Mapping) else None,
                )
            ]
        for stack in stacks:
            for i in self.config.hidden_state_layers:
                if not -len(stack.states) <= i < len(stack.states):
                    raise SkillError(
                        f"hidden_state_layers: {i} is not among the {len(stack.states)} hidden states of this "
                        f"{type(self.model).__name__} (0 to {len(stack.states) - 1}, or -{len(stack.states)} to -1)"
                    )
        return stacks

    # ---- the memory -------------------------------------------------------------------------------------------------

    def remember(self, examples: Iterable[Any]) -> None:
        """Offer a learned task's examples to the memory, each once. The memory is a uniform sample of all examples ever
        offered.

        Args:
            examples: single examples, as from a data set (`collate` makes batches of them).

        Raises:
            SkillError: they are a batch, or a loader of batches.
        """
        batched = isinstance(examples, DataLoader) and examples.batch_size is not None
        if isinstance(examples, Mapping) or batched:
            what = "whose items are batches" if batched else "one batch"
            raise SkillError(
                f"remember: got a {type(examples).__name__}, {what}, expected single examples, such as the data set "
                "of a loader (loader.dataset)"
            )
        if self.enabled:
            for example in examples:
                self.memory.add(example)

    def memory_batch(self, n: int | None = None) -> Any:
        """A batch of examples from the memory, on the model's device (to learn them again, as in replay).

        Args:
            n: their number; default: `batch_size`.

        Raises:
            SkillError: the memory is empty, or its examples do not fit in one batch without a `collate`.
        """
        examples = self.memory.sample(n or self.batch_size)
        if self.collate is not None:
            return moved(self.collate(examples), device_of(self.model))
        try:
            return moved(default_collate(examples), device_of(self.model))
        except (RuntimeError, TypeError, KeyError) as error:
            raise SkillError(
                f"torch's default_collate cannot batch the memory's examples ({error}); pass collate=, such as "
                "the collator that pads your batches"
            ) from error

    def _has_memory(self) -> bool:
        if len(self.memory) or self.first_task:
            return len(self.memory) > 0
        raise SkillError(
            f"the memory is empty, although a task came before ({self.config.prev_task_id or 'without a name'}); "
            "remember() its examples, load the folder it was saved in (previous_task_model), or use on='batch'"
        )

    def next_task(self, task_id: str | int | None = None) -> None:
        """In a process that learns several tasks: the current task becomes the previous one, and `task_id` the current
        one."""
        if not self.enabled:
            return
        ids = {"prev_task_id": self.config.current_task_id, "current_task_id": task_id}
        self.config = dataclasses.replace(self.config, **ids)  # type: ignore[arg-type]  # numbers become names
        self.first_task = False

    # ---- using and saving the result -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def stable_active(self) -> Iterator[None]:
        """Inside, the model computes with the stable adapter (in its current mode). Afterwards everything is as
        before."""
        if not self.enabled:
            yield
            return
        with using(self.model, self.stable):
            yield

    def save(self, folder: str | os.PathLike[str]) -> Path | None:
        """Write the task's folder, all or nothing: `adapter` and `ema_adapter` in peft's own format, `memory.pt` and
        `ilora.json`, in `folder/current_task_id` (in `folder` itself without an id).

        Returns:
            The task's folder; None without `use_ilora`.

        Raises:
            SkillError: a tensor, which the text names, is not finite; examples are not tensors and plain values; or the
                folder holds something else, which would be lost.
        """
        return ilora_files.save(self, Path(folder)) if self.enabled else None

    def load(self, folder: str | os.PathLike[str], task_id: str | None = None) -> None:
        """Continue from a folder of `save`: the plastic and the stable adapter byte for byte, the memory, the counts.

        Args:
            task_id: the task; default: the one in the folder.

        Raises:
            SkillError: the base model, rank, targets, scaling or task differ from the saved ones (the text names them),
                or there is no stable adapter. IntegrityError: a file is damaged. In both cases nothing is changed.
        """
        if self.enabled:
            ilora_files.load(self, Path(folder), task_id)


def _loss_of(model: Any, batch: Any) -> Tensor:
    out = model(**batch) if isinstance(batch, Mapping) else None
    value = getattr(out, "loss", None)
    if value is None:
        raise SkillError(
            "model(**batch) returned no loss, which selective_update and replay need; pass loss=, or remember "
            "examples with labels"
        )
    return value
