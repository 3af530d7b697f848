"""Attacks on the promise that the outputs of a sealed task do not change by a bit, in any way of training.

    python benchmarks/attacks.py [--model NAME] [--only TEXT] [--json]

The models are an MLP, a convolutional network with batch norm, a vision transformer, a language model with grouped
queries, and `own`: small networks that are attacks themselves. NAME is one of them, a timm name, or
`package.module:function`, which returns a model and inputs for its forward. Each model learns two tasks. Every attack
starts from a copy of the trained model and ends in one of three ways:

    exact      the outputs of every sealed task have the same bits as before, in evaluation with and without gradients,
               and hatcl.certify finds nothing
    refused    hatcl raised an error of its own, and the same holds
    BROKEN     anything else

The exit status is 1 if anything is broken. A new attack is one function below `@attack("what it does")`: it gets a
`Target`, attacks it, and raises `Broken` if it detects by itself that something is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import dataclasses
import importlib
import json
import logging
import os
import pickle
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import timm.optim
import timm.utils
import torch
from common import save
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import hatcl
from hatcl.calls import call, tensors_of
from hatcl.hat.gates import gates_of
from hatcl.hat.held import held

TASKS, STEPS, INTERRUPTIONS = 4, 6, 25
Outputs = dict[int, list[Tensor]]


class Broken(Exception):
    """The attack saw by itself that something is wrong."""


class Absent(Exception):
    """The model has nothing of the kind that is attacked."""


# ---- what is attacked, and what is demanded afterwards ---------------------------------------------------------------


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor: they tell the sign of a zero and the payload of a NaN, which `torch.equal` does not."""
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True)
    )


def difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> str:
    gaps = [(x.double() - y.double()).abs().max() for x, y in zip(a, b, strict=False) if x.shape == y.shape]
    return f"by up to {max(map(float, gaps), default=float('nan')):.2g}"


def outputs(model: nn.Module, x: Any, task: int, grad: bool = False) -> list[Tensor]:
    training = [(m, m.training) for m in model.modules()]
    with hatcl.task(model, task), torch.set_grad_enabled(grad):
        found = [y.detach().clone() for y in tensors_of(call(model.eval(), x))]
    for m, mode in training:
        m.training = mode
    if not found:
        raise Broken("its forward gives no tensor, and it was converted all the same")
    return found


class Target:
    """A converted model with tasks 0 and 1 sealed and room for two more, and what those tasks said."""

    def __init__(self, plain: nn.Module, x: Any, tasks: int = TASKS, sealed: int = 2, **options: Any) -> None:
        self.plain, self.x, self.tasks, self.options = plain, x, tasks, options
        self.model = self.fresh()
        for t in range(sealed):
            self.train(t)
        self.want = {grad: self.said(grad=grad) for grad in (False, True)}

    def again(self) -> Target:
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model)
        return other

    def fresh(self) -> nn.Module:
        torch.manual_seed(1)
        return hatcl.convert(self.plain, self.tasks, self.x, **self.options)

    def said(self, model: nn.Module | None = None, grad: bool = False) -> Outputs:
        model = self.model if model is None else model
        return {t: outputs(model, self.x, t, grad) for t in hatcl.tasks(model)}

    def loss(self, task: int, learning: Any = None, model: nn.Module | None = None) -> Tensor:
        found = [y for y in tensors_of(call(self.model if model is None else model, self.x)) if y.requires_grad]
        loss = torch.stack([(y.real.float() - task - 1).pow(2).mean() for y in found]).mean()
        return loss if learning is None else loss + learning.penalty()

    def train(
        self,
        task: int = 2,
        optimizer: Any = None,
        steps: int = STEPS,
        step: Callable[[], object] | None = None,
        model: nn.Module | None = None,
        promised: int | None = None,
    ) -> None:
        """The plain loop. step: called instead of the optimizer's. promised: the number of steps given to hatcl."""
        model = self.model if model is None else model
        optimizer = optimizer or adamw(model)
        with hatcl.learn(model, task, optimizer, steps=promised or steps) as learning:
            model.train()
            for _ in range(steps):
                optimizer.zero_grad()
                self.loss(task, learning, model).backward()
                (step or optimizer.step)()
        model.eval()

    def check(self, model: nn.Module | None = None, certify: bool = True) -> None:
        """Raises Broken where a sealed task of the target, or of what else has the same tasks, has moved."""
        model = self.model if model is None else model
        for grad, want in self.want.items():
            for t in want.keys() & set(hatcl.tasks(model)):
                got = outputs(model, self.x, t, grad)
                if not same(want[t], got):
                    how = "with gradients" if grad else "in evaluation"
                    raise Broken(f"task {t} moved {how} {difference(want[t], got)}")
        if lost := self.want[False].keys() - set(hatcl.tasks(model)):
            raise Broken(f"task {min(lost)} is no longer sealed")
        if certify and not (proof := hatcl.certify(model, self.x)).exact:
            raise Broken(f"certify says: {proof}")


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **{"lr": 0.05, "weight_decay": 0.1, **options})


@contextlib.contextmanager
def said(text: str) -> Iterator[None]:
    """Inside, hatcl has to warn of this."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        yield
    if not any(text in str(w.message) for w in heard):
        raise Broken(f"nothing was said of {text!r}")


def must(right: bool, what: str) -> None:
    if not right:
        raise Broken(what)


@dataclasses.dataclass(frozen=True)
class Attack:
    name: str
    run: Callable[..., None]
    own: bool


ATTACKS: list[Attack] = []


def attack(name: str, own: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register an attack on every model's `Target`; own: it brings its own network and takes nothing."""

    def add(run: Callable[..., None]) -> Callable[..., None]:
        ATTACKS.append(Attack(name, run, own))
        return run

    return add


@dataclasses.dataclass(frozen=True)
class Result:
    model: str
    attack: str
    result: str
    text: str = ""


def attempt(a: Attack, name: str, target: Target | None) -> Result | None:
    """One attack on a copy of a target; None where the model has nothing of the kind."""
    trial = None if target is None else target.again()
    text = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            a.run() if trial is None else a.run(trial)
        except Absent:
            return None
        except Broken as error:
            return Result(name, a.name, "BROKEN", str(error))
        except hatcl.HATError as error:
            text = re.sub(rf"{tempfile.gettempdir()}/\S+/", "", f"{type(error).__name__}: {error}")
        except Exception as error:
            return Result(name, a.name, "BROKEN", f"raises {type(error).__name__}: {error}")
        try:
            if trial is not None:
                trial.check()
        except Exception as error:
            return Result(name, a.name, "BROKEN", f"{error}{f' (after {text})' if text else ''}")
    return Result(name, a.name, "refused" if text else "exact", text)


# ---- steps -----------------------------------------------------------------------------------------------------------


class Interrupted(torch.optim.AdamW):
    """Moves everything, and then its step fails."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        with torch.no_grad():
            for p in params_of(self):
                p.add_(0.05)
        raise KeyboardInterrupt


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation in its usual form: two steps, neither of which is called `step`."""

    def __init__(self, params: Any, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base = torch.optim.AdamW(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for p in params_of(self):
            if p.grad is not None:
                self.state[p]["old"] = p.data.clone()
                p.add_(p.grad, alpha=self.defaults["rho"])

    @torch.no_grad()
    def second_step(self) -> None:
        for p in params_of(self):
            if p.grad is not None:
                p.data = self.state[p]["old"]
        self.base.step()


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (Defazio et al. 2024): `eval()` and `train()` write weights of its own into the parameters."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9, decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "decay": decay})
        self.count, self.training = 0, True

    @torch.no_grad()
    def switch(self, training: bool) -> None:
        beta = self.defaults["beta"]
        for p in params_of(self) if training != self.training else ():
            if "z" in self.state[p]:
                p.lerp_(self.state[p]["z"], 1 - beta if training else 1 - 1 / beta)
        self.training = training

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += 1
        for p in params_of(self):
            if p.grad is not None:
                z = self.state[p].setdefault("z", p.clone())
                grad, lr = p.grad + self.defaults["decay"] * p, self.defaults["lr"]
                p.lerp_(z, 1 / self.count).add_(grad, alpha=lr * (self.defaults["beta"] * (1 - 1 / self.count) - 1))
                z.sub_(grad, alpha=lr)


def params_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@attack("a step that moves everything and raises KeyboardInterrupt")
def interrupted(t: Target) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        t.train(2, Interrupted(t.model.parameters(), lr=0.05))
    t.check()
    t.train(2)


@attack("a hook that fails after the step")
def failing_hook(t: Target) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a hook of the user's")

    optimizer = adamw(t.model)
    optimizer.register_step_post_hook(fail)
    with contextlib.suppress(RuntimeError):
        t.train(2, optimizer)
    must(hatcl.tasks(t.model) == [0, 1], "a failed task was sealed")


@attack(f"SIGINT at {INTERRUPTIONS} random moments of training")
def signals(t: Target) -> None:
    if threading.current_thread() is not threading.main_thread() or os.name != "posix":
        raise Absent
    began = time.perf_counter()
    t.again().train(2, steps=2)
    length = 2 * (time.perf_counter() - began)
    draw, optimizer = random.Random(0), adamw(t.model)
    for _ in range(INTERRUPTIONS):
        sent: list[float] = []

        def later(seconds: float = draw.uniform(0, length), sent: list[float] = sent) -> None:
            time.sleep(seconds)
            sent.append(time.perf_counter())
            os.kill(os.getpid(), signal.SIGINT)

        def step(sent: list[float] = sent) -> None:
            optimizer.step()
            if sent and time.perf_counter() > sent[0] + 1:  # Python drops one that arrives while it frees an object
                raise KeyboardInterrupt

        sender = threading.Thread(target=later)
        try:
            sender.start()
            t.train(2, optimizer, steps=100_000, step=step)
        except KeyboardInterrupt:
            pass
        sender.join()
        must(hatcl.tasks(t.model) == [0, 1], "an interrupted task was sealed")
        must(gates_of(t.model)[0].learning is None, "the model was left as if it were learning")
        t.check(certify=False)


@attack("SAM: first_step and second_step")
def two_steps(t: Target) -> None:
    optimizer = SAM(t.model.parameters(), lr=0.05, weight_decay=0.1)
    with hatcl.learn(t.model, 2, optimizer, steps=STEPS) as learning:
        t.model.train()
        for _ in range(STEPS):
            for step in (optimizer.first_step, optimizer.second_step):
                optimizer.zero_grad()
                t.loss(2, learning).backward()
                step()
        must(learning.step == STEPS, f"{learning.step} of {STEPS} steps were counted")


@attack("optimizer.step bound before the block")
def bound(t: Target) -> None:
    optimizer = adamw(t.model)
    t.train(2, optimizer, step=optimizer.step)


@attack("another optimizer steps than the one given")
def another(t: Target) -> None:
    other = adamw(t.model)
    with hatcl.learn(t.model, 2, adamw(t.model), steps=STEPS) as learning:
        for _ in range(STEPS):
            other.zero_grad()
            t.loss(2, learning).backward()
            other.step()
        must(learning.step == STEPS, f"{learning.step} of {STEPS} steps were counted")


@attack("parameters swapped in param_groups")
def swapped(t: Target) -> None:
    optimizer = adamw(t.model)
    ours = params_of(optimizer)
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]

    def step() -> None:
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad
        optimizer.param_groups[0]["params"] = theirs
        optimizer.step()
        with torch.no_grad():
            for p, q in zip(ours, theirs, strict=True):
                p.copy_(q)
        optimizer.param_groups[0]["params"] = ours

    t.train(2, optimizer, step=step)


@attack("p -= lr * g by hand")
def by_hand(t: Target) -> None:
    optimizer = adamw(t.model)

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        for p in t.model.parameters():
            p -= 0.1 * p + (0 if p.grad is None else 0.1 * p.grad)

    with said("something else than a step of an optimizer wrote"):
        t.train(2, optimizer, step=step)


@attack("p.data = ... for every parameter")
def by_data(t: Target) -> None:
    optimizer = adamw(t.model)

    def step() -> None:
        optimizer.step()
        for p in t.model.parameters():
            p.data = p.data * 1.01 + 0.01

    with said("something else than a step of an optimizer wrote"):
        t.train(2, optimizer, step=step)


@attack("torch.nn.utils.vector_to_parameters inside the block")
def by_vector(t: Target) -> None:
    def step() -> None:
        vector = nn.utils.parameters_to_vector(t.model.parameters())
        nn.utils.vector_to_parameters(0.9 * vector, t.model.parameters())

    with said("something else than a step of an optimizer wrote"):
        t.train(2, step=step)


@attack("new nn.Parameter objects in the place of the old")
def new_parameters(t: Target) -> None:
    optimizer = adamw(t.model)

    def step() -> None:
        optimizer.step()
        for m in t.model.modules():
            if not isinstance(m, (nn.ParameterList, hatcl.hat.gates.Gates)):
                for name, p in [*m._parameters.items()]:
                    if p is not None:
                        m._parameters[name] = nn.Parameter(p.detach() + 0.1)

    t.train(2, optimizer, steps=1, step=step)


@attack("a write to buffers, statistics and gates inside the block")
def buffers(t: Target) -> None:
    optimizer = adamw(t.model)

    def step() -> None:
        optimizer.step()
        for name, b in t.model.named_buffers():
            if ".hat_tasks." in name or "masks" in name:
                b.zero_()

    t.train(2, optimizer, step=step)


@attack("a write to every buffer that is not saved, inside the block")
def unsaved_buffers(t: Target) -> None:
    unsaved = [m._buffers[n] for m in t.model.modules() for n in m._non_persistent_buffers_set]
    chosen = [b for b in unsaved if b is not None and b.is_floating_point() and b.numel() > 1]
    if not chosen:
        raise Absent
    optimizer = adamw(t.model)

    def step() -> None:
        optimizer.step()
        for b in chosen:
            b.mul_(1.01)

    t.train(2, optimizer, step=step)


@attack("Lookahead, which writes its slow weights after the block")
def lookahead(t: Target) -> None:
    optimizer = timm.optim.Lookahead(adamw(t.model), k=3)
    t.train(2, optimizer, steps=7)
    two = t.said()[2]
    optimizer.sync_lookahead()
    must(same(t.said()[2], two), "task 2 moved after it was sealed")


@attack("a schedule-free optimizer, whose eval() writes after the block")
def schedule_free(t: Target) -> None:
    optimizer = ScheduleFree(t.model.parameters())
    t.train(2, optimizer)
    two = t.said()[2]
    optimizer.switch(False)
    must(same(t.said()[2], two), "task 2 moved after it was sealed")
    optimizer.switch(True)
    t.train(3, optimizer)


@attack("momentum and weight decay kept across tasks, six optimizers")
def kept_momentum(t: Target) -> None:
    makers: list[Callable[[Any], torch.optim.Optimizer]] = [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
        lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.5, amsgrad=True, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.5, fused=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
        lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
        lambda p: timm.optim.create_optimizer_v2(p, "lion", lr=0.01, weight_decay=0.1),
    ]
    for make in makers:
        trial = t.again()
        optimizer = make(list(trial.model.parameters()))
        for task in (2, 3):
            trial.train(task, optimizer)
            trial.check(certify=False)
        trial.check()


@attack("LBFGS, which moves and evaluates within its step")
def lbfgs(t: Target) -> None:
    optimizer = torch.optim.LBFGS(t.model.parameters(), lr=0.1, max_iter=3)
    with hatcl.learn(t.model, 2, optimizer, steps=STEPS) as learning:
        for _ in range(STEPS):

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = t.loss(2, learning)
                loss.backward()
                return loss

            optimizer.step(closure)


@attack("gradients left over from before the block")
def old_gradients(t: Target) -> None:
    optimizer = torch.optim.SGD(t.model.parameters(), lr=0.1, weight_decay=0.1)
    for p in t.model.parameters():
        p.grad = torch.ones_like(p)
    with hatcl.learn(t.model, 2, optimizer, steps=1):
        optimizer.step()


@attack("a task that diverges at learning rate 1000")
def diverges(t: Target) -> None:
    t.train(2, torch.optim.SGD(t.model.parameters(), lr=1e3), steps=20)


@attack("bfloat16 autocast")
def autocast(t: Target) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        want = t.said()
    optimizer = adamw(t.model)
    with hatcl.learn(t.model, 2, optimizer, steps=STEPS) as learning:
        for _ in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = t.loss(2, learning)
            loss.backward()
            optimizer.step()
    with torch.autocast("cpu", torch.bfloat16):
        got = t.said()
    must(all(same(want[i], got[i]) for i in want), "a sealed task moved under autocast")


# ---- the block -------------------------------------------------------------------------------------------------------


@attack("3 of 1,000 steps")
def three_steps(t: Target) -> None:
    with said("3 of 1000 steps"):
        t.train(2, steps=3, promised=1000)


@attack("accelerate's accumulation: 40 calls, 10 steps")
def accumulation(t: Target) -> None:
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState
    except ImportError:
        raise Absent from None
    AcceleratorState._reset_state()  # it is one for the process, and keeps its first options
    GradientState._reset_state()
    helper = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, optimizer = helper.prepare(t.model, adamw(t.model))
    with hatcl.learn(model, 2, optimizer, steps=10) as learning:
        for _ in range(40):
            with helper.accumulate(model):
                helper.backward(t.loss(2, learning, model))
                optimizer.step()
                optimizer.zero_grad()
        must(learning.step == 10, f"{learning.step} of 10 steps were counted")


@attack("the last tenth of a task is the same graph")
def settling(t: Target) -> None:
    optimizer = adamw(t.model)
    with hatcl.learn(t.model, 2, optimizer, steps=20) as learning:
        t.model.train()
        for _ in range(20):
            optimizer.zero_grad()
            t.loss(2, learning).backward()
            must(all(g.embeddings[2].grad is not None for g in gates_of(t.model)), "the gates left the graph")
            optimizer.step()


def train_after_loading(t: Target, new: nn.Module, state: dict[str, Tensor], strict: bool = True) -> None:
    optimizer = adamw(new)
    with hatcl.learn(new, 2, optimizer, steps=STEPS) as learning:
        new.load_state_dict(state, strict=strict)
        for _ in range(STEPS):
            optimizer.zero_grad()
            t.loss(2, learning, new).backward()
            optimizer.step()


@attack("a state that brings sealed tasks, loaded inside the block")
def loaded_inside(t: Target) -> None:
    new = t.fresh()
    train_after_loading(t, new, copy.deepcopy(t.model.state_dict()))
    t.check(new)


@attack("a state in which the task is sealed already")
def loaded_sealed(t: Target) -> None:
    done = t.again()
    done.train(2)
    train_after_loading(t, t.model, copy.deepcopy(done.model.state_dict()))


@attack("a state in which nothing is sealed")
def loaded_fresh(t: Target) -> None:
    train_after_loading(t, t.model, t.fresh().state_dict())


@attack("a plain state with other values, loaded inside the block")
def loaded_plain(t: Target) -> None:
    train_after_loading(t, t.model, {k: v + 1 for k, v in t.plain.state_dict().items()}, strict=False)


@attack("a head replaced after conversion")
def replaced_head(t: Target) -> None:
    model = copy.deepcopy(t.model)
    if hasattr(model, "reset_classifier"):
        model.reset_classifier(2)
    else:
        path, old = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
        parent = model.get_submodule(path.rpartition(".")[0])
        setattr(parent, path.rpartition(".")[2], nn.Linear(old.in_features, old.out_features))
    t.train(2, model=model)
    raise Broken("it learned with a head that no gate knows")


@attack("set_input_size or resize_token_embeddings after conversion")
def resized(t: Target) -> None:
    model = copy.deepcopy(t.model)
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=48)
    elif hasattr(model, "resize_token_embeddings"):
        model.resize_token_embeddings(60)
    else:
        raise Absent
    t.train(2, model=model)
    raise Broken("it learned with parameters of another shape")


@attack("torch.nn.utils.prune after conversion")
def pruned(t: Target) -> None:
    hatcl.set_task(t.model, None)
    for m in [m for m in t.model.modules() if isinstance(m, nn.Linear) and "weight" in m._parameters]:
        with contextlib.suppress(AttributeError):  # torch's own error; it takes back what it did
            prune.l1_unstructured(m, "weight", 0.5)
    t.train(2)


@attack("torch.nn.utils.parametrize after conversion")
def parametrized_after(t: Target) -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model = copy.deepcopy(t.model)
    hatcl.set_task(model, None)
    for m in [m for m in model.modules() if isinstance(m, nn.Linear) and "weight" in m._parameters]:
        nn.utils.parametrize.register_parametrization(m, "weight", Twice())
    t.train(2, model=model)
    hatcl.certify(model, t.x)
    raise Broken("it learned with weights that are twice those that were sealed")


@attack("a cast to float64 and back inside the block")
def cast_inside(t: Target) -> None:
    def step() -> None:
        t.model.double().float()

    t.train(2, step=step)


@attack("a cast to bfloat16 and back inside the block")
def rounded_inside(t: Target) -> None:
    def step() -> None:
        t.model.bfloat16().float()

    t.train(2, step=step)


@attack("requires_grad_() on everything, inside the block")
def thawed(t: Target) -> None:
    optimizer = torch.optim.SGD(t.model.parameters(), lr=0.1, weight_decay=0.1)

    def step() -> None:
        t.model.requires_grad_(True)
        for p in t.model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()

    t.train(2, optimizer, step=step)


@attack("set_task to a sealed task inside the block")
def other_task_inside(t: Target) -> None:
    optimizer = adamw(t.model)
    with hatcl.learn(t.model, 2, optimizer, steps=STEPS):
        hatcl.set_task(t.model, 0)
        t.model.train()
        for _ in range(STEPS):
            loss = t.loss(2)
            if loss.requires_grad:
                loss.backward()
            optimizer.step()


@attack("add_tasks and forget_task inside the block")
def changed_inside(t: Target) -> None:
    optimizer = adamw(t.model)
    with hatcl.learn(t.model, 2, optimizer, steps=STEPS) as learning:
        for step in range(STEPS):
            optimizer.zero_grad()
            t.loss(2, learning).backward()
            optimizer.step()
            if step == 2:
                hatcl.add_tasks(t.model, 1)
                with contextlib.suppress(hatcl.HATError):
                    hatcl.forget_task(t.model, 0)
    t.train(4)


@attack("a write to a sealed task between two blocks")
def between(t: Target) -> None:
    model = copy.deepcopy(t.model)
    with torch.no_grad():
        for h in held(model):
            if h.task is None and not h.plain and h.plan is not None:
                h.param.add_(1e-3)
    t.train(2, model=model)
    raise Broken("it learned on a sealed task that had been written to")


@attack("a training forward of a sealed task, and random numbers in it")
def training_forward(t: Target) -> None:
    for m in (0, 1):
        with hatcl.task(t.model, m):
            t.loss(m, model=t.model.train()).backward()
    t.model.eval()


@attack("torch.compile (aot_eager): training and evaluation")
def compiled(t: Target) -> None:
    fast = torch.compile(t.model, backend="aot_eager")
    want = t.said(fast)
    t.train(2, adamw(t.model), model=fast)
    got = t.said(fast)
    torch.compiler.reset()
    must(all(same(want[i], got[i]) for i in want), "a sealed task of the compiled model moved")


# ---- activation checkpointing ----------------------------------------------------------------------------------------


def gradients(t: Target, forward: Callable[[], Any], other: int) -> list[Tensor]:
    """Of task 0, with another task active in backward."""
    t.model.zero_grad()
    torch.manual_seed(0)
    with hatcl.task(t.model, 0):
        loss = torch.stack([y.float().pow(2).mean() for y in tensors_of(forward()) if y.requires_grad]).sum()
    with hatcl.task(t.model, other):
        loss.backward()
    return [torch.zeros(()) if p.grad is None else p.grad.clone() for p in t.model.parameters()]


@attack("checkpoint(use_reentrant=False), another task active in backward")
def recomputed(t: Target) -> None:
    for training in (False, True):
        t.model.train(training)
        want = gradients(t, lambda: call(t.model, t.x), 0)
        got = gradients(t, lambda: checkpoint(call, t.model, t.x, use_reentrant=False), 1)
        must(same(want, got), f"the gradient is another task's, {difference(want, got)}")
    t.model.eval()


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body, self.head, self.reentrant, self.on = mlp()[0][:5], nn.Linear(24, 3), reentrant, False

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_() if self.on and self.reentrant else x
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant) if self.on else self.body(x))


def both_forms(reentrant: bool) -> None:
    t = Target(Checkpointed(reentrant), mlp()[1])
    for training in (True, False):
        t.model.train(training)
        results = []
        for t.model.on, other in ((False, 0), (True, 1)):
            results.append(gradients(t, lambda: t.model(t.x.clone()), other))
        must(same(*results), f"the gradient is another task's, {difference(*results)}")


@attack("checkpoint(use_reentrant=False) within a model", own=True)
def inner_checkpoint() -> None:
    both_forms(False)


@attack("checkpoint(use_reentrant=True) within a model", own=True)
def inner_reentrant() -> None:
    both_forms(True)


# ---- threads and asyncio ---------------------------------------------------------------------------------------------


@attack("eight threads serve two tasks")
def threads(t: Target) -> None:
    def wrong(task: int) -> bool:
        return not same(outputs(t.model, t.x, task), t.want[False][task])

    t.model.eval()
    with ThreadPoolExecutor(8) as pool:
        count = sum(pool.map(wrong, [0, 1] * 40))
    must(count == 0, f"{count} of 80 answers are another task's")


@attack("asyncio serves two tasks")
def coroutines(t: Target) -> None:
    async def wrong(task: int) -> int:
        count = 0
        for _ in range(20):
            with hatcl.task(t.model, task):
                await asyncio.sleep(0)  # not within no_grad, which belongs to the thread
                with torch.no_grad():
                    count += not same(tensors_of(call(t.model, t.x)), t.want[False][task])
        return count

    async def both() -> int:
        return sum(await asyncio.gather(wrong(0), wrong(1)))

    t.model.eval()
    count = asyncio.run(both())
    must(count == 0, f"{count} of 40 answers are another task's")


@attack("a thread evaluates while another trains")
def beside_training(t: Target) -> None:
    stop, wrong, seen = threading.Event(), 0, 0

    def evaluate() -> None:
        nonlocal wrong, seen
        while not stop.is_set():
            for task in (0, 1):
                with hatcl.task(t.model, task), torch.no_grad():
                    wrong += not same(tensors_of(call(t.model, t.x)), t.want[False][task])
                seen += 1

    t.model.eval()
    optimizer = adamw(t.model)
    thread = threading.Thread(target=evaluate)
    with hatcl.learn(t.model, 2, optimizer, steps=40) as learning:
        thread.start()
        astray = 0
        try:
            for _ in range(40):
                astray += gates_of(t.model)[0].task != 2
                optimizer.zero_grad()
                t.loss(2, learning).backward()
                optimizer.step()
        finally:
            stop.set()
            thread.join()
    must(wrong == 0 and astray == 0, f"{wrong} of {seen} answers and {astray} of 40 steps were another task's")


@attack("hatcl.forward: one batch, a task per row")
def mixed_batch(t: Target) -> None:
    x = t.x
    rows = next(len(v) for v in tensors_of(x) if v.dim())
    ids = torch.arange(rows) % 2

    def pick(at: Tensor) -> Any:
        return {k: v[at] for k, v in x.items()} if isinstance(x, dict) else x[at]

    got = [y for y in tensors_of(hatcl.forward(t.model, x, ids)) if y.dim() and len(y) == rows]
    for task in (0, 1):
        want = outputs(t.model, pick(ids == task), task)
        must(same(want, [y[ids == task] for y in got]), f"rows of task {task} differ {difference(want, got)}")


# ---- copies ----------------------------------------------------------------------------------------------------------


def averaged(t: Target, make: Callable[[nn.Module], Any], update: str, inside: bool) -> None:
    optimizer = adamw(t.model)
    average = None if inside else make(t.model)
    with hatcl.learn(t.model, 2, optimizer, steps=STEPS) as learning:
        average = average or make(t.model)
        for _ in range(STEPS):
            optimizer.zero_grad()
            t.loss(2, learning, t.model.train()).backward()
            optimizer.step()
            getattr(average, update)(t.model)
    t.check(average.module, certify=False)
    hatcl.seal(average.module)
    must(hatcl.tasks(average.module) == [0, 1, 2], "the copy is not sealed")
    t.check(average.module)


@attack("timm's ModelEmaV3, made before and inside the block")
def ema(t: Target) -> None:
    for inside in (False, True):
        averaged(t.again(), lambda m: timm.utils.ModelEmaV3(m, decay=0.5), "update", inside)


@attack("torch's AveragedModel, made before and inside the block")
def average(t: Target) -> None:
    for inside in (False, True):
        averaged(
            t.again(),
            lambda m: torch.optim.swa_utils.AveragedModel(m, avg_fn=lambda a, p, n: 0.3 * a + 0.7 * p),
            "update_parameters",
            inside,
        )


@attack("deepcopy and pickle inside the block; the copies learn on")
def copies(t: Target) -> None:
    optimizer = adamw(t.model)
    made: list[nn.Module] = []
    with hatcl.learn(t.model, 2, optimizer, steps=STEPS) as learning:
        for _ in range(STEPS):
            optimizer.zero_grad()
            t.loss(2, learning).backward()
            if not made:
                made = [copy.deepcopy(t.model), pickle.loads(pickle.dumps(t.model))]
            optimizer.step()
    for model in made:
        t.check(model)
        t.train(3, model=model)
        t.check(model)


# ---- what layers keep ------------------------------------------------------------------------------------------------


@attack("served in several orders, in inference mode, and then with gradients")
def orders(t: Target) -> None:
    t.model.eval()
    for task in (0, 1, 1, 0, 1):
        with hatcl.task(t.model, task), torch.inference_mode():
            y = tensors_of(call(t.model, t.x))
        must(same(y, t.want[False][task]), f"task {task} depends on what was served before it")


@attack("update_bn and reset_running_stats on a sealed task")
def statistics(t: Target) -> None:
    norms = [m for m in t.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms or not isinstance(t.x, Tensor):
        raise Absent
    with hatcl.task(t.model, 0):
        torch.optim.swa_utils.update_bn([t.x, t.x + 1], t.model)
        for m in norms:
            m.reset_running_stats()
            m.running_mean.zero_()
    t.model.eval()


def write_through(t: Target, model: nn.Module, own: bool, write: Callable[[Tensor], object]) -> None:
    """Write to the weights that layers read under task 0: those that tasks share, or those of its own."""
    layers = [m for m in model.eval().modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    chosen = [m for m in layers if m._hat.params["weight"].copied == own]
    if not chosen:
        raise Absent
    with hatcl.task(model, 0), torch.no_grad():
        call(model, t.x)
        for m in chosen:
            write(m.weight)


@attack("layer.weight.zero_() under a sealed task")
def written(t: Target) -> None:
    write_through(t, t.model, False, lambda w: w.zero_())


@attack("head.weight.zero_() under a sealed task that has a head of its own")
def written_head(t: Target) -> None:
    write_through(t, t.model, True, lambda w: w.zero_())


@attack("layer.weight.data.zero_(), which only certify can see")
def written_data(t: Target) -> None:
    write_through(t, t.model, False, lambda w: w.data.zero_())
    moved = not same(outputs(t.model, t.x, 0), t.want[False][0])
    proof = hatcl.certify(t.model, t.x)
    must(moved != proof.exact, f"outputs {'moved' if moved else 'are as they were'}, and certify says: {proof}")
    if moved:
        raise hatcl.IsolationError(f"certify: {proof}")


@attack("layer.weight.data.zero_() where one task alone is sealed", own=True)
def written_data_of_one() -> None:
    t = Target(*mlp(), sealed=1)
    write_through(t, t.model, False, lambda w: w.data.zero_())
    proof = hatcl.certify(t.model, t.x)
    t.check()  # certify has said so, and has taken the write back
    raise hatcl.IsolationError(f"certify: {proof}")


@attack("half precision with the largest finite foreign weights")
def half(t: Target) -> None:
    model = copy.deepcopy(t.model).half()
    x = {k: v for k, v in t.x.items()} if isinstance(t.x, dict) else t.x.half()
    try:
        want = [outputs(model, x, task) for task in (0, 1)]
    except RuntimeError:
        raise Absent from None
    for task in (0, 1):
        trial = copy.deepcopy(model)
        with torch.no_grad():
            for h in held(trial):
                if h.task is None and not h.plain and h.plan is not None:
                    h.param.copy_(torch.where(h.live(task), h.param, torch.finfo(h.param.dtype).max))
        got = outputs(trial, x, task)
        must(same(want[task], got), f"task {task} moved {difference(want[task], got)}")


# ---- forgetting ------------------------------------------------------------------------------------------------------


def reachable(x: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(x) in seen or isinstance(x, (type, types.ModuleType, str, int, float)):
        return
    seen.add(id(x))
    if isinstance(x, Tensor):
        yield x
        if x.grad is not None:
            yield x.grad
    children = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple, set)) else ()
    for child in [*children, vars(x) if hasattr(x, "__dict__") else None]:
        yield from reachable(child, seen)


@attack("after forgetting, the old values in caches, gates and gradients")
def forgotten(t: Target) -> None:
    for task in (0, 1, 1):
        outputs(t.model, t.x, task)
    for p in t.model.parameters():
        p.grad = p.detach().clone()
    secrets: dict[str, Tensor] = {}
    for h in held(t.model):
        if h.task is None and not h.plain and h.plan is not None:
            secrets[h.name] = h.param.detach()[h.live(1) & ~h.live(0)]
    hatcl.forget_task(t.model, 1)
    every = [x.detach().flatten() for x in reachable(t.model, set()) if x.numel() > 3 and x.is_floating_point()]
    for name, secret in secrets.items():
        distinct = secret.unique()
        distinct = distinct[(distinct != 0) & (distinct != 1)]  # a fresh bias or norm has these as well
        if len(distinct) > 3:
            left = max(float(torch.isin(distinct, x.to(distinct.dtype)).float().mean()) for x in every)
            must(left < 0.5, f"{left:.0%} of the values erased from {name} are still there")
    t.want = {grad: {0: want[0]} for grad, want in t.want.items()}


# ---- files -----------------------------------------------------------------------------------------------------------


def stored(t: Target, folder: Path) -> Path:
    return hatcl.save_pretrained(t.model, folder) / "model.safetensors"


def rewrite(file: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object], sign: bool = True) -> None:
    """Write a saved model's file again with other tensors and another header, signed like the true one."""
    from hatcl.hat.saving.pretrained import HEADER, _signed

    with safe_open(file, "pt") as f:
        meta = json.loads(f.metadata()[HEADER])
    tensors = load_file(file)
    change(tensors, meta)
    meta.pop("fingerprint", None)
    save_file(tensors, file, {"format": "pt", HEADER: _signed(meta) if sign else json.dumps(meta)})


def file_attack(name: str) -> Callable[[Callable[[Target, Path], None]], Callable[[Target], None]]:
    """An attack on the file of a saved model, which is loaded afterwards: what loads must be exact."""

    def add(change: Callable[[Target, Path], None]) -> Callable[[Target], None]:
        @attack(name)
        def run(t: Target) -> None:
            with tempfile.TemporaryDirectory() as folder:
                file = stored(t, Path(folder) / "model")
                change(t, file)
                t.check(hatcl.from_pretrained(file.parent, base=t.plain))

        return run

    return add


@file_attack("saved and loaded")
def round_trip(t: Target, file: Path) -> None:
    pass


def changed(tensors: dict[str, Tensor], meta: dict[str, Any], dtype: torch.dtype | None = None) -> list[str]:
    """Move every shared weight; the names of those that were moved."""
    names = [n for n, x in tensors.items() if x.is_floating_point() and "hat_" not in n]
    for n in names:
        tensors[n] = (tensors[n].to(dtype) if dtype else tensors[n]) + 1
        meta["dtypes"][n] = str(tensors[n].dtype).removeprefix("torch.")
    return names


@file_attack("a file with changed weights")
def changed_file(t: Target, file: Path) -> None:
    rewrite(file, lambda tensors, meta: changed(tensors, meta))


@file_attack("a file with changed weights as float64, which would pass for a cast")
def float64_file(t: Target, file: Path) -> None:
    rewrite(file, lambda tensors, meta: changed(tensors, meta, torch.float64))


@file_attack("a file with changed weights and without digests")
def no_digests(t: Target, file: Path) -> None:
    def change(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        changed(tensors, meta)
        meta["digests"] = {}

    rewrite(file, change)


@file_attack("a file with changed weights, without the digests of those weights")
def some_digests(t: Target, file: Path) -> None:
    def change(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        for n in changed(tensors, meta):
            for digests in meta["digests"].values():
                digests.pop(n, None)

    rewrite(file, change)


@file_attack("a file without a fingerprint")
def no_fingerprint(t: Target, file: Path) -> None:
    rewrite(file, lambda tensors, meta: None, sign=False)


@file_attack("a pickle in place of safetensors")
def pickled(t: Target, file: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(file.parent / "executed"),)

    torch.save(Evil(), file)
    with contextlib.suppress(Exception):
        hatcl.from_pretrained(file.parent, base=t.plain)
    must(not (file.parent / "executed").exists(), "code in the file was run")


@file_attack("a truncated file")
def truncated(t: Target, file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@file_attack("a header of 100,000 nested lists")
def deep(t: Target, file: Path) -> None:
    from hatcl.hat.saving.pretrained import HEADER

    save_file(load_file(file), file, {HEADER: "[" * 100_000 + "]" * 100_000})


@file_attack("a config.json that is a link to another file")
def linked(t: Target, file: Path) -> None:
    victim = file.parent.parent / "victim"
    victim.write_text("untouched")
    config = file.with_name("config.json")
    config.unlink()
    config.symlink_to(victim)
    hatcl.save_pretrained(t.model, file.parent)
    must(victim.read_text() == "untouched", "the link was followed")


def with_source(t: Target, name: str, **options: Any) -> None:
    def change(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        meta["source"] = {"kind": "timm", "name": name, "options": options}

    with tempfile.TemporaryDirectory() as folder:
        file = stored(t, Path(folder) / "model")
        rewrite(file, change)
        opened: list[str] = []
        sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "socket.connect" else None)
        hatcl.from_pretrained(file.parent)
        must(not opened, "it tried the network")


@attack("a source that is hf_hub:...")
def hub_source(t: Target) -> None:
    with_source(t, "hf_hub:someone/model")


@attack("a source that is local-dir:/etc")
def local_source(t: Target) -> None:
    with_source(t, "local-dir:/etc")


@attack("shards outside of the folder: ../, absolute, through a link", own=True)
def shards() -> None:
    plain = mlp()[0]
    state = plain.state_dict()
    texts = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        folder.mkdir()
        save_file(state, Path(name) / "x.safetensors")
        (folder / "link.safetensors").symlink_to(Path(name) / "x.safetensors")
        absolute = str(Path(name) / "x.safetensors")
        for where in ("../x.safetensors", absolute, "link.safetensors", "a/../../x.safetensors"):
            index = {"weight_map": dict.fromkeys(state, where)}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            try:
                len(hatcl.TaskVector.between(state, folder))
            except hatcl.HATError as error:
                texts.append(str(error))
            else:
                must(where.startswith("link"), f"{where} was read")  # a link lies in the folder, as in a hub's cache
    raise hatcl.IntegrityError(texts[0])


@attack("deep JSON as an index of shards", own=True)
def deep_index() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors.index.json").write_text('{"weight_map":' + "[" * 100_000)
        hatcl.TaskVector.between(mlp()[0].state_dict(), Path(folder))


# ---- networks that are attacks themselves ----------------------------------------------------------------------------


def own(net: nn.Module, x: Any = None, **options: Any) -> Target:
    """Convert, learn two tasks, train a third past settling, and check."""
    t = Target(net.eval(), mlp()[1] if x is None else x, **options)
    t.train(2, steps=20)
    t.check()
    return t


class Net(nn.Module):
    """The MLP's two halves, for what comes between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = mlp()[0][:5], nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x))


@dataclasses.dataclass
class Answer:
    logits: Tensor
    kept: Any = None


class Box:
    def __init__(self, logits: Tensor) -> None:
        self.inner = {"logits": [logits]}


@attack("an output that is a dataclass", own=True)
def dataclass_output() -> None:
    class Model(Net):
        def forward(self, x: Tensor) -> Answer:
            return Answer(super().forward(x))

    t = own(Model())
    must(t.want[False][0][0].shape == (16, 3), "the logits were not found")


@attack("an output that is an object with tensors deep inside", own=True)
def object_output() -> None:
    class Model(Net):
        def forward(self, x: Tensor) -> Answer:
            return Answer(torch.zeros(1), Box(super().forward(x)))

    t = own(Model())
    must(any(y.shape == (16, 3) for y in t.want[False][0]), "the logits were not found")


@attack("an output that nothing can look into", own=True)
def opaque_output() -> None:
    class Model(Net):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return iter([y])

    hatcl.convert(Model(), 2, mlp()[1])
    raise Broken("it was converted")


@attack("an output without a tensor", own=True)
def no_output() -> None:
    class Model(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x).detach().sum().item()

    hatcl.convert(Model(), 2, mlp()[1])
    raise Broken("it was converted")


@attack("an integer buffer that counts forwards", own=True)
def counter() -> None:
    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.tensor(0))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return super().forward(x) + 0.01 * self.count

    own(Model())


@attack("a plain int, a list and a dict that a forward changes", own=True)
def attributes() -> None:
    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.count, self.seen, self.mean = 0, [], {"x": torch.zeros(24)}

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            self.count += 1
            self.seen.append(float(h.detach().mean()))
            self.mean["x"] = 0.9 * self.mean["x"] + 0.1 * h.detach().mean(0)
            return self.head(h + self.mean["x"]) + self.count % 2 + self.seen[-1]

    own(Model())


CACHE: dict[str, Tensor] = {}


@attack("a cache of weights that is global to a module", own=True)
def global_cache() -> None:
    class Model(Net):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                CACHE.clear()
                return super().forward(x)
            if "table" not in CACHE:
                CACHE["table"] = (self.body[0].weight @ self.body[0].weight.T).detach()
            return self.head(self.body(x) + 0.1 * CACHE["table"].sum(0))

    CACHE.clear()
    own(Model())


@attack("levit's bias cache: tasks served in turns", own=True)
def levit() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 224, 224)
    t = Target(timm.create_model("levit_128s", num_classes=4).eval(), x)
    for order in ((0, 1), (1, 0)):
        trial = t.again()
        for task in order:
            want, got = t.want[False][task], outputs(trial.model, x, task)
            must(same(want, got), f"task {task} is off after others {difference(want, got)}")
        trial.check()


@attack("attributes of one's own named active, attach, folded, gate and task", own=True)
def names() -> None:
    class Body(nn.Sequential):
        active, gate, task = True, 0.5, 3

        def attach(self, x: Tensor) -> Tensor:
            return x + 1

        def folded(self, x: Tensor) -> Tensor:
            return x * 2

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return self.attach(self.folded(y)) * self.gate if self.active else y + self.task

    class Linear(nn.Linear):
        active = True

        def attach(self, x: Tensor) -> Tensor:
            return x

        def folded(self) -> Tensor:
            return self.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.attach(nn.functional.linear(x, self.folded(), self.bias)) if self.active else x

    model = Net()
    model.body = Body(*[Linear(8, 24), *model.body[1:]])
    t = own(model)
    fresh, plain = t.fresh().eval(), model.eval()
    hatcl.set_task(fresh, None)
    with torch.no_grad():
        must(same([fresh(t.x)], [plain(t.x)]), "without a task it computes something else than the source")


@attack("type(layer) is nn.Linear in a forward", own=True)
def exact_type() -> None:
    class Model(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (1 if type(self.head) is nn.Linear else 0)

    own(Model())


@attack("atan2 of two layers, which tells the sign of a zero", own=True)
def zero_signs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 24, bias=False), nn.Linear(8, 24, bias=False), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.atan2(self.a(x), self.b(x)))

    torch.manual_seed(0)
    t = own(Model())
    must(all(same(t.want[False][i], t.want[True][i]) for i in (0, 1)), "with gradients it computes something else")


@attack("dropout that stays on in evaluation", own=True)
def mc_dropout() -> None:
    class Model(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(nn.functional.dropout(self.body(x), 0.5, training=True))

    seeded(Model())


@attack("a variational autoencoder that samples in evaluation", own=True)
def vae() -> None:
    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spread = nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            return self.head(h) + torch.randn(len(x), 3) * self.spread(h).exp()

    seeded(Model())


def seeded(net: nn.Module) -> None:
    """A network that draws: compared under one seed, by the certificate and by hand."""
    x = mlp()[1]
    torch.manual_seed(0)
    model = hatcl.convert(net, 2, x)
    said = []
    for t in range(2):
        optimizer = adamw(model)
        with hatcl.learn(model, t, optimizer, steps=STEPS) as learning:
            for _ in range(STEPS):
                optimizer.zero_grad()
                (model(x).pow(2).mean() + learning.penalty()).backward()
                optimizer.step()
        torch.manual_seed(5)
        said.append(outputs(model, x, 0))
    must(same(*said), f"task 0 moved {difference(*said)}")
    must(hatcl.certify(model, x).exact, "certify says that it is not exact")


@attack("random numbers of a generator of its own", own=True)
def own_generator() -> None:
    class Model(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.from_numpy(GENERATOR.standard_normal((len(x), 3))).float()

    own(Model())


GENERATOR = np.random.default_rng(0)


@attack("the old torch.nn.utils.spectral_norm", own=True)
def spectral() -> None:
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.spectral_norm(model.body[0])
    own(model)


@attack("parametrizations: weight_norm and spectral_norm", own=True)
def parametrized() -> None:
    model = Net()
    nn.utils.parametrizations.weight_norm(model.body[0])
    nn.utils.parametrizations.spectral_norm(model.body[3])
    own(model)


@attack("vmap(grad(...)) in a forward", own=True)
def per_example() -> None:
    class Model(Net):
        def forward(self, x: Tensor) -> Tensor:
            slope = torch.func.vmap(torch.func.grad(lambda v: self.body(v).sum()))(x)
            return self.head(self.body(x)) + slope[:, :3]

    own(Model())


@attack("num_classes=[3, 7] on two heads", own=True)
def two_heads() -> None:
    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.boxes = nn.Linear(24, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.body(x)
            return self.head(h), self.boxes(h)

    t = Target(Model(), mlp()[1], tasks=2, num_classes={"head": [3, 7]})
    must([y.shape[1] for y in t.want[False][1]] == [7, 4], "another head was widened")
    t.check()
    model = hatcl.convert(Model(), 2, t.x, num_classes=[3, 7])
    with torch.no_grad():
        hatcl.set_task(model, None)
        widths = [m.hat_tasks[1].weight.shape[0] for m in (model.head, model.boxes)]
    must(widths == [7, 4], f"both heads were widened, to {widths}")


@attack("heads around a converted body, which are frozen whole", own=True)
def heads_around() -> None:
    x = mlp()[1]
    body = hatcl.convert(Net().body, 2, x)
    model = nn.ModuleDict({"body": body, "heads": nn.ModuleList(nn.Linear(24, 3) for _ in range(2))})
    for t, warned in ((0, contextlib.nullcontext()), (1, said("that no gate knows"))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with warned, hatcl.learn(model, t, optimizer, steps=1) as learning:
            (model["heads"][t](model["body"](x)).sum() + learning.penalty()).backward()
            optimizer.step()


@attack("complex parameters, learned, attacked and forgotten", own=True)
def complex_numbers() -> None:
    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.filter = nn.Parameter(torch.randn(24, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.view_as_real(self.body(x) * self.filter).sum(-1))

    t = own(Model())
    hatcl.forget_task(t.model, 1)
    t.want = {grad: {0: want[0]} for grad, want in t.want.items()}
    t.check()


@attack("batch norms: momentum=None, no affine, statistics of the batch", own=True)
def odd_norms() -> None:
    def half(**options: Any) -> list[nn.Module]:
        return [nn.Linear(24, 24), nn.BatchNorm1d(24, **options), nn.ReLU()]

    odd = [*half(momentum=None), *half(affine=False), *half(track_running_stats=False)]
    own(nn.Sequential(nn.Linear(8, 24), *odd, nn.Linear(24, 3)))


@attack("two models that share parameters", own=True)
def shared() -> None:
    t = Target(mlp()[0], mlp()[1])
    other = t.fresh()
    for (_, m), (_, theirs) in zip(t.model.named_modules(), other.named_modules(), strict=True):
        for name in ("weight", "bias"):
            if name in m._parameters and name in theirs._parameters:
                theirs._parameters[name] = m._parameters[name]
    t.train(0, model=other)
    t.check()


# ---- the models ------------------------------------------------------------------------------------------------------


def mlp() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    body = [nn.Linear(8, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)]
    return nn.Sequential(*body), torch.randn(16, 8)


def conv() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2),
        nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    return model, torch.randn(8, 3, 10, 10)


def test_vit() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=4), torch.randn(4, 3, 32, 32)


def llama() -> tuple[nn.Module, Any]:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise Absent from None
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config), {"input_ids": torch.randint(50, (4, 7))}


MODELS = {"mlp": mlp, "conv": conv, "test_vit": test_vit, "llama": llama}
OWN = "own"


def named(name: str) -> tuple[nn.Module, Any]:
    """A model and inputs: one of `MODELS`, `package.module:function`, or a timm name."""
    if name in MODELS:
        return MODELS[name]()
    if ":" in name:
        module, _, function = name.partition(":")
        sys.path.insert(0, os.getcwd())
        return getattr(importlib.import_module(module), function)()
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4)
    return model, torch.randn(2, *model.pretrained_cfg["input_size"])


def run(name: str, only: str = "", watch: Callable[[Result], None] = lambda r: None) -> list[Result]:
    """Every attack, or those with `only` in their names, on one model."""
    chosen = [a for a in ATTACKS if a.own == (name == OWN) and only.lower() in a.name.lower()]
    target = None
    if name != OWN and chosen:
        try:
            plain, x = named(name)
        except Absent:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target = Target(plain.eval(), x)
    results = []
    for a in chosen:
        if (result := attempt(a, name, target)) is not None:
            watch(result)
            results.append(result)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: all of the program's own")
    parser.add_argument("--only", default="", metavar="TEXT", help="only attacks with this in their names")
    parser.add_argument("--json", action="store_true", help="also write the results to benchmarks/results")
    args = parser.parse_args(arguments)
    width = shutil.get_terminal_size((160, 24)).columns

    def show(r: Result) -> None:
        line = f"{r.model:9} {r.attack:68} {r.result}{f': {r.text}' if r.text else ''}"
        print(line if r.result == "BROKEN" or len(line) <= width else f"{line[: width - 4]} ...", flush=True)

    names = [args.model] if args.model else [*MODELS, OWN]
    results = [r for name in names for r in run(name, args.only, show)]
    count = {kind: sum(r.result == kind for r in results) for kind in ("exact", "refused", "BROKEN")}
    print(f"{len(results)} attacks: " + ", ".join(f"{n} {kind}" for kind, n in count.items()))
    if args.json:
        name = "".join(c if c.isalnum() else "_" for c in args.model or "")
        found = {"count": count, "attacks": list(map(dataclasses.asdict, results))}
        save(f"attacks_{name}" if name else "attacks", found)
    return 1 if count["BROKEN"] else 0


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    sys.exit(main())
