"""Rebuild a plain model from its saved description."""

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
    """Decorator for a function that rebuilds a plain model from the description saved under `kind`.

    Args:
        recognise: returns the description to save for a plain model (JSON-able), or None if it is not of this kind.
        fit: changes a description to the sizes of another model, or returns None if it cannot.
        config: the entries that the kind's own library looks for in a folder's config.json.
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
    """The description from which a plain model can be rebuilt, if a registered source recognises it."""
    for kind, recognise in _RECOGNISERS.items():
        found = recognise(model)
        if found is not None:
            return {"kind": kind, **found}
    return None


def build_source(source: dict[str, Any]) -> nn.Module:
    """The plain model, random weights, from a saved source such as `{"kind": "timm", "name": "resnet18", ...}`."""
    return _SOURCES[source["kind"]](source)


def can_fit(source: dict[str, Any] | None) -> bool:
    """Whether this kind of source can describe models of other sizes."""
    return source is not None and source["kind"] in _FITTERS


def fitted_source(source: dict[str, Any], model: nn.Module) -> dict[str, Any] | None:
    """A source of the same kind that makes a model with exactly the sizes of `model`, if there is one."""
    return _FITTERS[source["kind"]](source, model)


def library_config(source: dict[str, Any] | None) -> dict[str, Any]:
    """The entries that a source's library looks for in a folder's config.json; empty if there are none."""
    return _CONFIGS[source["kind"]](source) if source is not None and source["kind"] in _CONFIGS else {}
