"""Merging methods by name.

    merged = hatcl.merge([v1, v2, v3], method="ties", density=0.2)
    model = merged.apply_to(pretrained)

A method is a function from task vectors and keyword options to a task vector. The decorator `@merge_method(name, ...)`
makes it findable. `layers.py` gives every method options that differ from layer to layer.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from ...config import one_of
from ...errors import ConfigError, VectorError, nearest
from ..task_vector import TaskVector
from .layers import by_layers, differs

MergeFunction = TypeVar("MergeFunction", bound=Callable[..., TaskVector])


@dataclass(frozen=True)
class MergeMethod:
    """A registered method.

    Attributes:
        function: takes the vectors and the options. paper: its source. needs: option -> its description, for required
            data. instead: an option that replaces these. symmetric: whether the result is the same for any order of the
            vectors. options: option -> default; `inspect.Parameter.empty` if it has none.
    """

    name: str
    function: Callable[..., TaskVector]
    paper: str
    needs: Mapping[str, str]
    instead: str
    symmetric: bool
    options: Mapping[str, Any]


_MERGES: dict[str, MergeMethod] = {}
# names in other libraries -> the method here
ALIASES = {
    "linear": "mean",
    "average": "mean",
    "soup": "mean",
    "task_arithmetic": "arithmetic",
    "ties_merging": "ties",
    "tsv_m": "tsv",
    "wudi_merging": "wudi",
    "layerwise_adamerging": "adamerging",
    "tall_masks": "consensus",
    "emr_merging": "emr",
    "isotropic": "iso_c",
    "knots_ties": "knots",
    "regmean++": "regmean_plusplus",
}


def merge_method(
    name: str,
    *,
    paper: str,
    needs: Mapping[str, str] | None = None,
    instead: str = "",
    symmetric: bool = True,
) -> Callable[[MergeFunction], MergeFunction]:
    """Function decorator: `merge` finds the function under this name.

    Args:
        paper: its source. needs: option -> its description, for required data. instead: an option that replaces these.
            symmetric: whether the order of the vectors does not matter.

    Raises:
        ConfigError: the name is taken, or the function has no option for some required data.
    """

    def add(function: MergeFunction) -> MergeFunction:
        keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        options = {p.name: p.default for p in keywords}
        if name in _MERGES:
            raise ConfigError(f"merge_method: {name!r} is taken by {_MERGES[name].function.__qualname__}")
        lacking = [o for o in [*(needs or {}), *([instead] if instead else [])] if o not in options]
        if lacking:
            raise ConfigError(
                f"merge_method: {name!r} needs {lacking[0]!r}, which is not a keyword option of its function"
            )
        _MERGES[name] = MergeMethod(name, function, paper, dict(needs or {}), instead, symmetric, options)
        return function

    return add


def list_merges() -> list[str]:
    """The names of all methods."""
    return sorted(_MERGES)


def merge_info(method: str) -> MergeMethod:
    """The method of a name or of an alias in `ALIASES`. Raises `ConfigError` if there is none."""
    method = ALIASES.get(method, method)
    one_of("method", method, list_merges())
    return _MERGES[method]


def merge(vectors: Sequence[TaskVector], method: str = "ties", **options: Any) -> TaskVector:
    """Merge task vectors into one without training. `docs/merging.md` explains the choice of a method and its needs.

    With methods that need no data, vectors stay in their files: the result computes a tensor on demand (each time
    again; `in_memory()` keeps them).

    Args:
        vectors: of one model. method: one of `list_merges()`, or one of `ALIASES`. options: the method's own. An option
            that differs from layer to layer is `{"layers": SETTING}` (see `layers.py`), for methods that need no data.

    Raises:
        VectorError: there are no vectors, or they differ in base, names or shapes. ConfigError: the method or an option
            is unknown, or required data is missing or given twice.
    """
    if isinstance(vectors, TaskVector):
        raise VectorError("merge: got one task vector, expected a list of them; pass [v1, v2, ...]")
    vectors = list(vectors)
    if not vectors:
        raise VectorError("merge: no task vectors; pass at least one")
    for i, v in enumerate(vectors):
        if not isinstance(v, TaskVector):
            raise VectorError(
                f"merge: vector {i} is a {type(v).__name__}; make one by TaskVector.between(pretrained, finetuned)"
            )
    chosen = merge_info(method)
    for option in options:
        if option not in chosen.options:
            raise ConfigError(
                f"{option}: no option of {method}, which has {', '.join(chosen.options) or 'none'}"
                + (f"; did you mean {nearest(option, chosen.options)!r}?" if chosen.options else "")
            )
    if options.get(chosen.instead) is not None:
        for option in chosen.needs:
            if options.get(option) is not None:
                raise ConfigError(
                    f"{option}: given together with {chosen.instead}, which replaces it; pass only one of them"
                )
    else:
        for option, what in chosen.needs.items():
            if options.get(option) is None:
                raise ConfigError(
                    f"{method} needs {option}: pass {option}={what}"
                    + (f", or {chosen.instead}= instead" if chosen.instead else "")
                )
    # raises if they do not belong together, before a method reads anything
    vectors[0]._map(lambda _, d, *others: d, *vectors[1:])
    model = options.get("model")
    if model is not None and not isinstance(model, nn.Module):
        raise ConfigError(
            f"model: got a {type(model).__name__}, expected the pretrained model as a module, which can be run"
        )
    if "convs" in chosen.options and "convs" not in options:
        _say_what_is_averaged(chosen.name, vectors[0])
    if not any(differs(value) for value in options.values()):
        merged = chosen.function(vectors, **options)
    elif chosen.needs:
        raise ConfigError(f"layers: {method} works on the whole model; give each option one value")
    else:
        merged = by_layers(vectors, chosen.function, options)
    if not isinstance(merged, TaskVector):
        raise VectorError(
            f"merge: {method} gave a {type(merged).__name__}, expected a TaskVector; make one by arithmetic on the "
            "vectors that it gets, or by vector.map(function)"
        )
    return merged


def _say_what_is_averaged(method: str, vector: TaskVector) -> None:
    """Warn if most elements are filters, for which a method for matrices is little more than the mean."""
    kinds = vector.kinds.values()
    filters = sum(math.prod(k.shape) for k in kinds if len(k.shape) in (3, 4, 5))
    total = sum(math.prod(k.shape) for k in kinds)
    if 2 * filters > total:
        warnings.warn(
            f"{method} is a method for matrices, and {100 * filters / total:.0f} % of the elements are in filters of "
            "convolutions, which it averages; pass convs=True to merge them as matrices, or convs=False for the mean",
            stacklevel=3,
        )
