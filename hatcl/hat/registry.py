"""The registry of HAT layers: which layer replaces which module class.

`@register_layer(nn.Linear)` above a class registers it for instances of `nn.Linear` and its subclasses. A subclass
keeps its own forward: the HAT class precedes it in the method resolution order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

from torch import nn

from ..errors import ConfigError, ConversionError, nearest

Layer = TypeVar("Layer", bound=type)
_LAYERS: dict[tuple[type[nn.Module], str], type] = {}


def register_layer(*bases: type[nn.Module], kind: str = "") -> Callable[[Layer], Layer]:
    """Class decorator: the decorated HAT layer replaces instances of `bases` when a model is converted.

    Args:
        kind: restrict it to instances that the trace recognised as this kind, such as norms of unregistered classes
            (`rms`, `centred`).

    Raises:
        ConfigError: the decorated class is no HAT layer, or has an attribute `hat_...` that no HAT layer has.
    """

    def add(layer: Layer) -> Layer:
        _check_layer(layer)
        for base in bases:
            _LAYERS[base, kind] = layer
            _resolve.cache_clear()
        return layer

    return add


def _check_layer(layer: Any) -> None:
    """Check the names of `hat_...` attributes: a typo would otherwise silently leave the default in place."""
    name = getattr(layer, "__qualname__", layer)
    above = [c for c in getattr(layer, "__mro__", ())[1:] if any(n.startswith("hat_") for n in vars(c))]
    if not above and _LAYERS:  # the class registered first is the base of all others
        raise ConfigError(f"register_layer: {name} is no HAT layer; derive it from hatcl.HATLayer")
    known = {n for c in above for n in vars(c) if n.startswith("hat_")}
    unknown = [n for n in vars(layer) if n.startswith("hat_") and n not in known]
    if above and unknown:
        raise ConfigError(
            f"register_layer: {name} has {unknown[0]!r}, which no HAT layer has; did you mean "
            f"{nearest(unknown[0], sorted(known))!r}?"
        )


def layer_for(cls: type[nn.Module], kind: str = "") -> type[Any]:
    """The registered HAT layer of the nearest base of `cls`."""
    found: type[Any] = _resolve(cls, kind)  # type: ignore[arg-type]
    return found


@cache
def _resolve(cls: Any, kind: str) -> type[Any]:
    for base in cls.__mro__:
        if (base, kind) in _LAYERS:
            return _LAYERS[base, kind]
    raise ConversionError(f"{cls.__qualname__}: got a class that is no torch.nn.Module; only modules have HAT layers")


def registered(kind: str = "") -> dict[type[nn.Module], type]:
    """All registered pairs (base class, HAT layer) of a kind."""
    return {base: layer for (base, k), layer in _LAYERS.items() if k == kind}


@cache
def derive(layer: type, cls: Any, attributes: tuple[tuple[str, Callable[[str], Any]], ...]) -> type:
    """The class that a converted instance of `cls` gets: `layer` in front of `cls`. attributes: the task-aware ones,
    (name, function that makes the property)."""
    missing = {n: make(n) for n, make in attributes if not isinstance(getattr(layer, n, None), property)}
    if issubclass(layer, cls) and not missing:
        return layer
    bases: Sequence[type] = (layer,) if issubclass(layer, cls) else (layer, cls)
    body = {**missing, "__module__": cls.__module__, "_hat_source": (layer, cls, attributes)}
    return type(f"HAT{cls.__name__}", tuple(bases), body)


class Derived:
    """Base of derived classes that lets their instances be copied and pickled."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        source = getattr(type(self), "_hat_source", None)
        if source is None:
            return super().__reduce_ex__(protocol)
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # Python 3.10 has none
        return _rebuild, source, dict(state)


def _rebuild(layer: type, cls: type, attributes: tuple) -> nn.Module:
    made = derive(layer, cls, attributes)
    return nn.Module.__new__(made)


def plain_class(cls: type) -> type:
    """The class from which a HAT class was derived."""
    while issubclass(cls, Derived):
        source = cls.__dict__.get("_hat_source")
        cls = source[1] if source is not None else next(c for c in cls.__mro__ if not issubclass(c, Derived))
    return cls
