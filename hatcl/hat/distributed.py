"""Several processes that train one model: replicas of it under `DistributedDataParallel` (DDP), or shards of it under
`fully_shard` (see `shards.py`).

DDP averages gradients of all parameters that it was made with, and waits for each of them in every backward pass. A
task's own parameters get one only while that task is learned, so DDP ignores all of them for all tasks, and the learned
task's own gradients are averaged here.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..errors import HATError, IntegrityError, TaskError
from ..shards import is_shard, reshard
from .digests import slot_of, table_of, task_digests
from .gates import gates_of
from .held import held, own_buffers
from .tasks import tasks

DDP_SKIPS = "_ddp_params_and_buffers_to_ignore"  # the attribute that DDP reads


def leave_out(model: nn.Module) -> None:
    """Make DDP ignore everything that belongs to a task, and the plain model's values of it."""
    mine = {id(x) for x in _of_tasks(model)}
    everything = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    names = {name for name, x in everything if id(x) in mine}
    names |= {f"_orig_mod.{name}" for name in names}  # DDP around torch.compile asks the model, with its own names
    names |= {f".{name}" for name in names if "." not in name}  # DDP's name for a root's own parameters
    setattr(model, DDP_SKIPS, {*getattr(model, DDP_SKIPS, ()), *names})


def _of_tasks(model: nn.Module) -> Iterator[Tensor]:
    for h in held(model):
        if h.plain or h.task is not None:
            yield h.param
    for g in gates_of(model):
        yield from g.buffers()
    for module in model.modules():
        copies = module._modules.get("hat_tasks")
        if copies is not None and module.__dict__.get("_hat") is not None:
            yield from copies.buffers()
            yield from (module._buffers[name] for name in module._hat_copied_buffers())  # type: ignore[operator,misc]


def ddp_of(model: nn.Module) -> Any:
    """The DDP that a model is or contains, else the one whose forward is running, else None."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    kind = nn.parallel.DistributedDataParallel
    return next((m for m in model.modules() if isinstance(m, kind)), kind._active_ddp_module)


def check_forward(model: nn.Module) -> None:
    """Raise `TaskError` if DDP trains the plain model, since it ignores a part of that."""
    if nn.parallel.DistributedDataParallel._active_ddp_module is None or not model.training:
        return
    if torch.is_grad_enabled() and gates_of(model)[0].task is None:
        raise TaskError(
            f"{type(model).__name__}: DistributedDataParallel trains it with no task active. It averages no gradients "
            "of what every task has a copy of (heads, norms), so the processes would drift apart; learn a task "
            "(hatcl.learn), or train the plain model before hatcl.convert"
        )


class Replicas:
    """The joint actions of processes that train one model while a task is learned. A single process does nothing.

    - When DDP is first seen, in the model given to `hatcl.learn` or in a forward, every process gets rank 0's values of
      everything that DDP ignores, and sealed tasks are compared.
    - Gradients of the task's own parameters are averaged at the end of every backward pass in which DDP averages.
    - Of a sharded model gradients are averaged by `fully_shard`, which must have all parameters that learn.
    - Before sealing, running statistics are averaged; what is sealed is the same in all processes, bit for bit.

    Args:
        joined: called after rank 0's values were received inside the block.
    """

    def __init__(self, model: nn.Module, task: int) -> None:
        self.model, self.task = model, task
        self.joined: Callable[[], None] | None = None
        self._ddp: Any = None
        self._group: Any = None  # None: one process
        self._device = torch.device("cpu")
        self._own: list[nn.Parameter] = []
        self._hooks: list[Any] = []
        self._expected = self._queued = False
        self._used = distributed.is_available() and distributed.is_initialized()
        ddp = ddp_of(model)
        if reshard(model):
            self._join_shards()
        elif ddp is not None:
            self._join(ddp)

    def __enter__(self) -> Replicas:
        if self._used:
            kind = nn.parallel.DistributedDataParallel
            seen = [m for m in self.model.modules() if isinstance(m, kind) or "hat_gates" in m._modules]
            for module in {id(m): m for m in (self.model, *seen)}.values():
                self._hooks.append(module.register_forward_pre_hook(self._before_forward))
        self._watch_gradients()
        return self

    def __exit__(self, *exc: object) -> None:
        for h in self._hooks:
            h.remove()
        self._hooks = []

    def __getstate__(self) -> dict[str, Any]:
        """State for a copy made inside the block, in which the hooks do nothing."""
        return {"model": None, "_ddp": None, "_group": None, "_own": [], "_hooks": []}

    # ---- joining ---------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    def _before_forward(self, module: nn.Module, _: Any) -> None:
        kind = nn.parallel.DistributedDataParallel
        ddp = module if isinstance(module, kind) else kind._active_ddp_module
        if ddp is None or self.model is None:
            return
        if self._ddp is None:
            self._join(ddp)
            self._watch_gradients()
            if self.joined is not None:
                self.joined()
        if ddp._join_config.enable:
            raise HATError(
                "DistributedDataParallel.join: a process without batches cannot take part in averaging what hatcl "
                "averages by itself; give every process the same number of batches (DistributedSampler)"
            )
        if torch.is_grad_enabled() and ddp.require_backward_grad_sync:
            self._expected = True  # like DDP, decide in the forward whether the next backward averages

    def _join(self, ddp: Any) -> None:
        self._ddp, self._group, self._device = ddp, ddp.process_group, ddp.device
        reduced = {id(p) for p in ddp._module_parameters if p.requires_grad}
        every = held(self.model)
        others = [h.name for h in every if (h.plain or h.task not in (None, self.task)) and id(h.param) in reduced]
        if others and not (ddp.find_unused_parameters or ddp.static_graph):
            raise HATError(
                f"DistributedDataParallel waits in every backward for {others[0]} and {len(others) - 1} more that have "
                "no gradient while another task is learned, because it was made around a module that contains the HAT "
                "model, not around the model itself. Wrap the converted model itself, or pass "
                "find_unused_parameters=True to DistributedDataParallel"
            )
        self._own = [h.param for h in every if h.task == self.task and id(h.param) not in reduced]
        self._be_equal([h.param for h in every if h.plain or h.task is not None])

    def _join_shards(self) -> None:
        params = dict(self.model.named_parameters())
        alone = [name for name, p in params.items() if p.requires_grad and not is_shard(p)]
        if alone:
            raise HATError(
                f"{alone[0]} and {len(alone) - 1} more parameters are not sharded, so nobody averages their gradients; "
                "call fully_shard on the converted model itself too, not on its blocks alone, and ignore none"
            )
        shard: Any = next(p for p in params.values() if is_shard(p))
        mesh = shard.device_mesh
        if mesh.ndim > 1 and mesh.size() != distributed.get_world_size():
            raise HATError(
                f"fully_shard: the mesh has {mesh.size()} of {distributed.get_world_size()} processes in {mesh.ndim} "
                "dimensions; hatcl needs all of them, or a mesh of one dimension"
            )
        self._group = mesh.get_group() if mesh.ndim == 1 else distributed.group.WORLD
        self._device = shard.to_local().device
        for g in gates_of(self.model):
            g.sharded = True
        self._be_equal([p for p in params.values() if not is_shard(p)])

    def _be_equal(self, tensors: list[Tensor]) -> None:
        """Give every process rank 0's values of these and of statistics, except for sealed tasks, which are
        compared."""
        self._check_sealed()
        sealed = set(tasks(self.model))
        kept = {id(h.param) for h in held(self.model) if h.task in sealed}
        tensors = [x for x in tensors if id(x) not in kept]
        for t in range(gates_of(self.model)[0].num_tasks):
            tensors += [b for _, b in own_buffers(self.model, t) if t not in sealed]
        self._from_rank_0(tensors)

    def _check_sealed(self) -> None:
        """Compare sealed tasks by a hash, which has the same size in every process even if their models differ."""
        state = hashlib.sha256(repr([(h.name, tuple(h.param.shape)) for h in held(self.model)]).encode())
        for g in gates_of(self.model):
            state.update(g.sealed.cpu().numpy().tobytes() + g.digest_table.cpu().numpy().tobytes())
            state.update(g.given.cpu().numpy().tobytes() + g.given_until.float().cpu().numpy().tobytes())
        mine = torch.frombuffer(bytearray(state.digest()), dtype=torch.uint8).to(self._device)
        if bool(self._differs(mine).any()):
            raise IntegrityError(
                "the processes hold different models or different sealed tasks (this one has "
                f"{tasks(self.model)}), or give tasks different gates; load the same saved model in each of them "
                "before hatcl.learn"
            )

    # ---- gradients -------------------------------------------------------------------------------------------------

    def _watch_gradients(self) -> None:
        mine = [p for p in self._own if p.requires_grad]
        self._hooks += [p.register_post_accumulate_grad_hook(self._after_gradient) for p in mine]

    def _after_gradient(self, _: Tensor) -> None:
        if self._expected and not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._average_gradients)

    @torch.no_grad()
    def _average_gradients(self) -> None:
        """Average the gradients accumulated so far, as DDP does. A process without a gradient counts as zero."""
        self._queued = self._expected = False
        own = [p for p in self._own if p.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
        share = torch.tensor([float(p.grad is not None) for p in own], device=self._device)
        self._average([*grads, share])
        if any(p.grad is None for p in own):
            for p, grad, some in zip(own, grads, share.tolist(), strict=True):
                p.grad = grad if some else None

    # ---- sealing ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """If one process raises inside, all raise, so that none waits for the others."""
        failed: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failed = error
        if self._group is not None:
            count = torch.tensor([float(failed is not None)], device=self._device)
            distributed.all_reduce(count, group=self._group)
            if failed is None and bool(count):
                failed = HATError(
                    f"task {self.task}: another process failed, and its own error says why; nothing was sealed"
                )
        if failed is not None:
            raise failed

    @torch.no_grad()
    def agree(self) -> None:
        """Average the task's running statistics, and check that the state to seal is the same everywhere.

        Raises:
            IntegrityError: it is not; the text names the differences.
        """
        if self._group is None:
            return
        buffers = [b for _, b in own_buffers(self.model, self.task)]
        self._average([b for b in buffers if b.is_floating_point()])
        self._from_rank_0(buffers)
        digests = task_digests(self.model, self.task)
        differs = self._differs(table_of(digests).to(self._device)).any(1)
        if bool(differs.any()):
            slots = set(differs.nonzero().flatten().tolist())
            differ = [name for name in digests if slot_of(name) in slots]
            raise IntegrityError(
                f"task {self.task}: the processes have learned different weights: {', '.join(differ[:5])}"
                f"{' ...' if len(differ) > 5 else ''}; nothing was sealed. Run every forward that is learned from "
                "through the DistributedDataParallel wrapper, and take the same steps in every process"
            )

    # ---- collectives -----------------------------------------------------------------------------------------------

    def of_rank_0(self, task: int | None) -> int | None:
        """The task that rank 0 chose by its own examples."""
        number = torch.tensor([-1 if task is None else task], device=self._device)
        if self._group is not None:
            self._from_rank_0([number])
        return None if int(number) < 0 else int(number)

    def _average(self, tensors: Iterable[Tensor]) -> None:
        size = distributed.get_world_size(self._group)

        def mean(x: Tensor) -> None:
            distributed.all_reduce(x.div_(size), group=self._group)

        _in_one(tensors, mean)

    def _from_rank_0(self, tensors: Iterable[Tensor]) -> None:
        first = distributed.get_global_rank(self._group, 0)
        _in_one(tensors, lambda x: distributed.broadcast(x, first, self._group))

    def _differs(self, x: Tensor) -> Tensor:
        """The elements in which the processes differ."""
        low, high = x.clone(), x.clone()
        distributed.all_reduce(low, distributed.ReduceOp.MIN, group=self._group)
        distributed.all_reduce(high, distributed.ReduceOp.MAX, group=self._group)
        return low != high


@torch.no_grad()
def _in_one(tensors: Iterable[Tensor], act: Callable[[Tensor], Any]) -> None:
    """Apply a function to many tensors at once, concatenated per dtype and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for x in tensors:
        groups.setdefault((x.dtype, x.device), []).append(x.detach())
    for group in groups.values():
        flat = torch.cat([x.reshape(-1) for x in group])
        act(flat)
        for x, new in zip(group, flat.split([x.numel() for x in group]), strict=True):
            x.copy_(new.view(x.shape))
