"""Features of a task: the inputs of its head."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import call, device_of, moved
from ..errors import ConfigError, HATError, nearest
from ..lend import Evaluating
from .build import GATES
from .gates import gates_of
from .layers.gated import HATLayer
from .tasks import task as active

Features = str | Callable[[nn.Module, Any], Tensor] | None
"""Where features come from: None, the inputs of the map's heads; the path of another module whose input is used; or a
function of the model and a batch's inputs that gives them, `[B, F]`."""


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module of every head: the modules that write the classes according to the map; in a model assembled by
    hand, the layers with a weight per task.

    Raises:
        HATError: the model has no head.
    """
    root = _root(model)
    found: dict[str, nn.Module] = {}
    if root is not None:
        entries = gates_of(root)[0].unit_map.entries
        paths = [e.name.rpartition(".")[0] for e in entries.values() if e.head and len(e.shape) > 1]
        modules = {path: root.get_submodule(path) for path in paths}
        found = {path: m for path, m in modules.items() if not isinstance(m, nn.Embedding)}  # an embedding tied to it
    else:
        for path, module in model.named_modules():
            plan = module._hat.params.get("weight") if isinstance(module, HATLayer) and "_hat" in vars(module) else None
            if plan is not None and plan.copied and len(plan.view) > 1:
                found[path] = module
    found = {path: module for path, module in found.items() if _is_a_layer(module)}
    if not found:
        raise HATError(
            f"{type(model).__name__}: no head was found whose input could serve as features: a layer that writes the "
            "outputs and nothing else. Put the classifier into the model before hatcl.convert; "
            "where features= can be given, give a function of the model and a batch's inputs"
        )
    return found


def middle_block(model: nn.Module) -> str:
    """The path of the middle block in the longest stack of blocks. Its inputs serve to tell tasks on one pretrained
    base apart: early blocks represent the topic of a text, late ones the answer to its task.

    Raises:
        HATError: there is no stack of blocks.
    """
    root = _root(model) or model
    stacks = {
        path: len(m)
        for path, m in root.named_modules()
        if isinstance(m, nn.ModuleList) and not path.endswith("hat_tasks")
    }
    longest = max(stacks, key=lambda path: stacks[path], default=None)
    if longest is None:
        raise HATError(f"{type(root).__name__}: has no stack of blocks (a ModuleList), so none is in the middle")
    return f"{longest}.{stacks[longest] // 2}"


def _is_a_layer(module: nn.Module) -> bool:
    """Are all parameters of a module its own? If it contains layers, their inputs are not the module's input."""
    own = ("hat_tasks", GATES, "gates")
    return not any(any(True for _ in child.parameters()) for name, child in module.named_children() if name not in own)


def _root(model: nn.Module) -> nn.Module | None:
    """The converted model itself, without wrappers."""
    return next((m for m in model.modules() if GATES in m._modules), None)


def _readers(model: nn.Module, features: str | None) -> dict[str, nn.Module]:
    """Path -> module of the modules that read the features."""
    if features is None:
        return head_modules(model)
    root = _root(model) or model
    known = dict(root.named_modules())
    if features not in known:
        raise ConfigError(
            f"features: got {features!r}, and {type(root).__name__} has no module of that path; did you mean "
            f"{nearest(features, known)!r}?"
        )
    return {features: known[features]}


@contextlib.contextmanager
def watched(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Any]]]:
    """Inside the block, record the input and output of these modules, by path, at every forward of this thread."""
    seen: dict[str, tuple[Tensor, Any]] = {}
    mine = threading.get_ident()

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            if given is not None and threading.get_ident() == mine:
                seen[path] = given, out

        return hook

    hooks = [m.register_forward_hook(note(path), with_kwargs=True) for path, m in modules.items()]
    try:
        yield seen
    finally:
        for h in hooks:
            h.remove()


def features_of(model: nn.Module, inputs: Any) -> Tensor:
    """Only the features of `features_and_outputs`."""
    return features_and_outputs(model, inputs)[0]


def features_and_outputs(model: nn.Module, inputs: Any, features: Features = None) -> tuple[Tensor, Any]:
    """The inputs of the heads under the active task, `[B, F]`, and the model's output, from one forward. With several
    positions (`[B, N, F]` for a linear head, `[B, F, H, W]` for a convolution), the features are those of the position
    whose answer the model gives (a language model's last token), else the mean over positions, without padding if the
    inputs have an `attention_mask`. Features of several heads are concatenated. A unit that is off is 0.

    Args:
        features: other features than these, see `Features`.

    Raises:
        HATError: no head, or none that the forward calls. ConfigError: `features` names no module, or does not give
            `[B, F]`.
    """
    inputs = moved(inputs, device_of(model))
    plain = getattr(model, "_orig_mod", model)  # a compiled graph calls no hooks
    if callable(features):
        out = call(plain, inputs)
        given = features(model, inputs)
        if not isinstance(given, Tensor) or given.dim() != 2 or not given.is_floating_point():
            came = f"a tensor of shape {list(given.shape)}" if isinstance(given, Tensor) else repr(given)
            raise ConfigError(f"features: the function gives {came}, expected [B, F] real numbers")
        return given, out
    modules = _readers(model, features)
    with watched(modules) as seen:
        out = call(plain, inputs)
    parts: dict[int, Tensor] = {}  # an input that two heads read, such as a class and its score, counts once
    for path in [path for path in modules if path in seen]:
        read, said = seen[path]
        if isinstance(modules[path], nn.modules.conv._ConvNd):
            parts[id(read)] = read.flatten(2).mean(2)
        elif read.dim() > 2:
            parts[id(read)] = _at_the_answer(read.flatten(1, -2), said, out, inputs)
        else:
            parts[id(read)] = read
    if not parts:
        raise HATError(
            f"{type(model).__name__}: its forward does not call {', '.join(modules)} as a module, so what enters its "
            "head is not seen; where features= can be given, give a function of the model and a batch's inputs"
        )
    return torch.cat(list(parts.values()), 1), out


def _at_the_answer(x: Tensor, said: Any, out: Any, inputs: Any) -> Tensor:
    """From positions `[B, N, F]`, the one where the head's output equals the model's; else the mean over positions
    that are not padding, since the padding depends on the other examples in the batch."""
    answer = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if isinstance(said, Tensor) and isinstance(answer, Tensor) and answer.dim() == 2:
        each = said.flatten(1, -2)
        if each.shape == (*x.shape[:2], answer.shape[1]) and len(answer) == len(x):
            same = (each == answer[:, None]).all(-1)
            if bool(same.any(1).all()):
                return x[torch.arange(len(x), device=x.device), same.int().argmax(1)]
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if not isinstance(mask, Tensor) or mask.shape != x.shape[:2]:
        return x.mean(1)
    weight = mask.unsqueeze(-1).to(x)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


def features_under(model: nn.Module, batches: Iterable[Any], task: int | None) -> Tensor:
    """Features of many inputs under a task, `[B, F]`: in evaluation mode, without gradients, in float32 on the CPU."""
    with active(model, task), Evaluating(model), torch.no_grad():
        return torch.cat([features_of(model, x).float().cpu() for x in batches])
