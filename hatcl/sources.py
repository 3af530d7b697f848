"""How a plain model is made again from what was saved of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

SourceMaker = Callable[[dict[str, Any]], nn.Module]
Recogniser = Callable[[nn.Module], dict[str, Any] | None]
Fitter = Callable[[dict[str, Any], nn.Module], dict[str, Any] | None]
Describer = Callable[[dict[str, Any]], dict[str, Any]]
_SOURCES: dict[str, SourceMaker] = {}
_RECOGNISERS: dict[str, Recogniser] = {}
_FITTERS: dict[str, Fitter] = {}
_CONFIGS: dict[str, Describer] = {}


def register_source(
    kind: str, recognise: Recogniser | None = None, fit: Fitter | None = None, config: Describer | None = None
) -> Callable[[SourceMaker], SourceMaker]:
    """Decorator for a function that makes a plain model again from what was saved of it under `kind`.

    Args:
        recognise: says of a plain model what is to be saved of it (JSON-able), or None where it is not of this kind.
        fit: changes a source so that it makes a model of the sizes of another one, or None where it cannot.
        config: what the kind's own library looks for in the config.json of a folder.
    """

    def add(make: SourceMaker) -> SourceMaker:
        _SOURCES[kind] = make
        if recognise is not None:
            _RECOGNISERS[kind] = recognise
        if fit is not None:
            _FITTERS[kind] = fit
        if config is not None:
            _CONFIGS[kind] = config
        return make

    return add


def source_of(model: nn.Module) -> dict[str, Any] | None:
    """How to make a plain model again, where some registered source recognises it."""
    for kind, recognise in _RECOGNISERS.items():
        found = recognise(model)
        if found is not None:
            return {"kind": kind, **found}
    return None


def build_source(source: dict[str, Any]) -> nn.Module:
    """The plain model, random weights, from a saved source such as `{"kind": "timm", "name": "resnet18", ...}`."""
    return _SOURCES[source["kind"]](source)


def can_fit(source: dict[str, Any] | None) -> bool:
    """Are there sources of this kind for models of other sizes?"""
    return source is not None and source["kind"] in _FITTERS


def fitted_source(source: dict[str, Any], model: nn.Module) -> dict[str, Any] | None:
    """A source of the same kind that makes a model of just the sizes that `model` has, if there is one."""
    return _FITTERS[source["kind"]](source, model)


def library_config(source: dict[str, Any] | None) -> dict[str, Any]:
    """What the library that a source is of looks for in a folder's config.json; nothing where it looks for nothing."""
    return _CONFIGS[source["kind"]](source) if source is not None and source["kind"] in _CONFIGS else {}
