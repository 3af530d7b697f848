"""A gate for each input feature of a converted model: each task chooses the inputs that it uses (HAT-CL's masker in
front of a model)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import HATConfig
from ..errors import ConfigError, ConversionError, TaskError
from ..map.units import UnitMap
from ..sources import build_source, can_fit, fitted_source, register_source, source_of
from .binding import Binding
from .tasks import check_task

MASK = "masked_inputs"  # the name of the layer in front


class InputFeatures(nn.Conv1d):
    """`y = w * x` with one fixed weight of 1 per feature: a depthwise convolution of width 1. On the map its channels
    are separate units, and their gates multiply them."""

    def __init__(self, features: int) -> None:
        super().__init__(features, features, 1, groups=features, bias=False)
        self.weight.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Reset the weights to one, also when a task is forgotten."""
        nn.init.ones_(self.weight)


class MaskedInputs(nn.Module):
    """A model behind a gate for each of its input features; `hatcl.convert(..., mask_inputs=True)` converts it. The
    features are the elements of a row of the first floating-point tensor among the inputs of the model's forward, in
    the order of its parameters, even if a call names them in another order.

    Args:
        model: the plain model. features: number of elements in a row of its input.
    """

    def __init__(self, model: nn.Module, features: int) -> None:
        super().__init__()
        self.features = features
        some = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        self.masked_inputs = InputFeatures(features).to(some)
        self.model = model
        self._order = tuple(inspect.signature(model.forward).parameters)
        self.training = self.masked_inputs.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward, with its features multiplied by the active task's gates."""
        key = _masked_key(self._order, args, kwargs)
        if isinstance(key, int):
            args = (*args[:key], self._masked(args[key]), *args[key + 1 :])
        elif key is not None:
            kwargs = {**kwargs, key: self._masked(kwargs[key])}
        else:
            names = [*map(str, range(len(args))), *kwargs]
            raise ConfigError(
                f"mask_inputs: none of the inputs {', '.join(names) or '()'} is a floating-point tensor, whose "
                "features could be masked"
            )
        return self.model(*args, **kwargs)

    def _masked(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or math.prod(x.shape[1:]) != self.features:
            raise ConfigError(
                f"mask_inputs: got an input of shape {list(x.shape)}, expected rows of {self.features} features, as "
                "those that the model was converted with"
            )
        y: Tensor = self.masked_inputs(x.flatten(1).unsqueeze(2)).view(x.shape)
        if x.is_contiguous():
            return y
        strides = x.stride()
        order = sorted(range(x.dim()), key=lambda d: -strides[d])  # keep the layout: torch chooses kernels by it
        return y.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])

    def features_of(self, task: int) -> Tensor:
        """`[features]` bool: the input features that a sealed task uses.

        Raises:
            TaskError: the task is not sealed, or the model is not converted.
        """
        hat: Binding | None = self.masked_inputs.__dict__.get("_hat")
        if hat is None:
            raise TaskError("features_of: the model is not converted, so no task has learned which features it needs")
        task = check_task(self, task, sealed=True)
        return hat.params["weight"].main.units.hard(task).clone()


def _masked_key(order: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | str | None:
    """The position or the name of the input that is masked."""
    named = sorted(kwargs, key=lambda name: order.index(name) if name in order else len(order))
    values: list[tuple[int | str, Any]] = [*enumerate(args), *((name, kwargs[name]) for name in named)]
    return next((k for k, x in values if isinstance(x, Tensor) and x.is_floating_point()), None)


def mask_inputs_of(model: nn.Module, example_inputs: Any, config: HATConfig) -> MaskedInputs:
    """The model behind gates for its input features.

    Raises:
        ConfigError: options under which tasks could not use the same inputs. ConversionError: the example inputs
            contain no floating-point tensor with rows.
    """
    for name, value in (("reuse", "none"), ("masks", "array")):
        if str(getattr(config, name)).startswith(value):
            raise ConfigError(
                f"mask_inputs: got {name}={getattr(config, name)!r}, under which tasks share no units, and so could "
                "not look at the same input features; leave one of the two out"
            )
    order = tuple(inspect.signature(model.forward).parameters)
    named = example_inputs if isinstance(example_inputs, Mapping) else {}
    placed = example_inputs if isinstance(example_inputs, (list, tuple)) else () if named else (example_inputs,)
    key = _masked_key(order, placed, named)
    x = None if key is None else named[key] if isinstance(key, str) else placed[key]
    if x is None or x.dim() < 2:
        raise ConversionError(
            "mask_inputs: got no floating-point tensor with rows among the example inputs; where inputs are numbers of "
            "words, a task needs no gate for each of them. Leave mask_inputs out"
        )
    return MaskedInputs(model, math.prod(x.shape[1:]))


def check_masked(unit_map: UnitMap) -> None:
    """Raise `ConversionError` if the input features of a network are not units on its map."""
    if not any(name == f"{MASK}.weight" for name, *_ in unit_map.layers):
        raise ConversionError(
            "mask_inputs: on the map of this model no input feature is a unit (of a model with an adapter, only the "
            "adapter's pairs are); put hatcl.HATMask in front of the converted model instead"
        )


def behind_mask(plain: nn.Module, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """The plain model in the form that was converted: behind a mask if these parameters (name -> shape) include one."""
    shape = shapes.get(f"{MASK}.weight")
    return plain if shape is None or isinstance(plain, MaskedInputs) else MaskedInputs(plain, shape[0])


def _recognise_masked(model: nn.Module) -> dict[str, Any] | None:
    inner = source_of(model.model) if isinstance(model, MaskedInputs) else None
    return None if inner is None else {"features": model.features, "model": inner}


def _fit_masked(source: dict[str, Any], model: nn.Module) -> dict[str, Any] | None:
    if not isinstance(model, MaskedInputs) or not can_fit(source["model"]):
        return None
    inner = fitted_source(source["model"], model.model)
    return None if inner is None else {**source, "model": inner}


@register_source("masked inputs", _recognise_masked, _fit_masked)
def _make_masked(source: dict[str, Any]) -> nn.Module:
    return MaskedInputs(build_source(source["model"]), source["features"])
