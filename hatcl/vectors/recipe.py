"""mergekit's recipes (Goddard et al. 2024, arXiv 2403.13257): read one, and find the models' tensors that make each
tensor of the result. `mergekit.py` runs them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..config import flag, known_options, whole
from ..errors import ConfigError, VectorError, nearest
from .merging.layers import layer_of
from .tensors import Kind

# tensors outside the layers that precede them (those of the inputs); others belong to the last slice
BEFORE = re.compile(r"embed(?!_out)|wte|wpe|(^|\.)shared\.|patch|token_type", re.IGNORECASE)
NOT_HERE = {
    "modules": "recipes with several modules are not supported, since only mergekit's tables list each module's "
    "tensors. Merge each module's files with a separate recipe",
    "residual_weight": "mergekit itself does not use it; leave it out",
}
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class SliceSource:
    """One model in a slice.

    Attributes:
        model: its path. layer_range: its layers from the first to before the second; None = all. parameters: the
            method's options for this model.
    """

    model: str
    layer_range: tuple[int, int] | None = None
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Consecutive layers of the result, made from as many layers of each source."""

    sources: tuple[SliceSource, ...]
    base_model: str | None = None
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class TokenSource:
    """The embedding that a token gets if a model lacks it.

    Attributes:
        model: its path; None = zeros. token: another token of it instead; or token_id, a row. force: in all models.
    """

    model: str | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True)
class MergekitRecipe:
    """A recipe in mergekit's format.

    Attributes:
        merge_method: mergekit's name. slices: with `models` there is one, with all layers.
        dtype: the type for reading tensors. out_dtype: the type for writing them. tokenizer_source: `base`, `union`, a
            model, or None: the base's tokenizer, and embeddings as they are. pad_to_multiple_of: for the vocabulary's
                size. tokens: tokens with specified embeddings; those that no model has are added.
        chat_template: the result's, `auto` (that of most models), or None: the tokenizer's own.
        parameters: those of the whole recipe. module: those of the only module in a recipe with `modules`; they take
            precedence.
    """

    merge_method: str
    slices: tuple[Slice, ...]
    base_model: str | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    pad_to_multiple_of: int | None = None
    tokens: Mapping[str, TokenSource] = field(default_factory=dict)
    chat_template: str | None = None
    parameters: Settings = field(default_factory=dict)
    module: Settings = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """All named models in their order, the base first."""
        named = [self.base_model, *(s.base_model for s in self.slices)]
        named += [source.model for s in self.slices for source in s.sources]
        return list(dict.fromkeys(m for m in named if m is not None))

    @property
    def donor(self) -> str:
        """The model whose config the result gets."""
        return self.base_model or self.models[0]


def read_recipe(content: Mapping[str, Any]) -> MergekitRecipe:
    """A recipe from the content of its file.

    Raises:
        ConfigError: a key is unknown or not supported here, or a value has another type.
    """
    given = dict(content)
    own = [f.name for f in fields(MergekitRecipe) if f.name not in ("pad_to_multiple_of", "tokens", "module")]
    known = ["models", "modules", "tokenizer", *own]
    unknown = next((key for key in given if key not in known), None)
    if unknown is not None:
        raise ConfigError(f"recipe: no key {unknown!r}; did you mean {nearest(str(unknown), known)!r}?")
    if given.get("modules") is not None:
        given |= _only_module(given)
    given.pop("modules", None)
    models, tokenizer = given.pop("models", None), given.pop("tokenizer", None)
    if (models is None) == (given.get("slices") is None):
        raise ConfigError("recipe: expected either models or slices")
    if not isinstance(given.get("merge_method"), str):
        raise ConfigError(f"merge_method: got {given.get('merge_method')!r}, expected the name of a method")
    for key in ("base_model", "dtype", "out_dtype", "tokenizer_source", "chat_template"):
        if given.get(key) is not None and not isinstance(given[key], str):
            raise ConfigError(f"{key}: got {given[key]!r}, expected a text")
    if tokenizer is not None:
        if given.get("tokenizer_source") is not None:
            raise ConfigError("tokenizer: given together with tokenizer_source; leave one of them out")
        tokenizer = dict(_mapping("tokenizer", tokenizer))
        asked = _mapping("tokenizer.tokens", tokenizer.pop("tokens", None) or {})
        given["tokens"] = {str(token): _read_token(str(token), content) for token, content in asked.items()}
        given["tokenizer_source"] = tokenizer.pop("source", "union")
        multiple = tokenizer.pop("pad_to_multiple_of", None)
        given["pad_to_multiple_of"] = whole("tokenizer.pad_to_multiple_of", multiple, low=0, optional=True)
        if tokenizer:
            raise ConfigError(f"tokenizer: got {', '.join(tokenizer)}, expected source, tokens and pad_to_multiple_of")
    given["parameters"] = _read_parameters(given.get("parameters"))
    if models is not None:
        sources = [_read_source(s, "models", layers=False) for s in _items("models", models)]
        base = given.get("base_model")
        if base is not None and base not in [s.model for s in sources]:
            sources.append(SliceSource(base))
        given["slices"] = (_checked(Slice(tuple(sources))),)
    else:
        given["slices"] = tuple(_read_slice(s) for s in _items("slices", given["slices"]))
    return MergekitRecipe(**given)


def _only_module(given: Mapping[str, Any]) -> dict[str, Any]:
    """The models or slices of a recipe's one module, as mergekit writes recipes, with its parameters."""
    modules = _mapping("modules", given["modules"])
    if len(modules) != 1:
        raise ConfigError(f"modules: got {', '.join(map(str, modules)) or 'none'}: {NOT_HERE['modules']}")
    twice = next((key for key in ("models", "slices") if given.get(key) is not None), None)
    if twice is not None:
        raise ConfigError(f"{twice}: given together with modules; leave one of them out")
    ((name, content),) = modules.items()
    inside = dict(_mapping(f"modules.{name}", content))
    settings = _read_parameters(inside.pop("parameters", None))
    unknown = next((key for key in inside if key not in ("models", "slices")), None)
    if unknown is not None:
        raise ConfigError(f"modules.{name}: no key {unknown!r}; it has models or slices, and parameters")
    return {**inside, "module": settings}


def _read_token(token: str, content: Any) -> TokenSource:
    key = f"tokenizer.tokens.{token}"
    given = dict(_mapping(key, content))
    source, force = given.pop("source", None), given.pop("force", False)
    flag(f"{key}.force", force)
    if isinstance(source, str) and not given:
        return TokenSource(source, force=force)
    if isinstance(source, Mapping) and not given:
        inside = dict(source)
        kind = inside.pop("kind", None)
        if kind == "zero" and not inside:
            return TokenSource(force=force)
        if kind == "model_token" and set(inside) in ({"model", "token"}, {"model", "token_id"}):
            whole(f"{key}.source.token_id", inside.get("token_id"), 0, optional=True)
            return TokenSource(**inside, force=force)
    raise ConfigError(
        f"{key}: got {content!r}, expected force, and a source: a model, {{kind: zero}}, or {{kind: model_token, "
        "model, token or token_id}"
    )


def _read_slice(content: Any) -> Slice:
    given = dict(_mapping("slices", content))
    _refuse_keys(given, "residual_weight")
    known_options(Slice, given)
    sources = tuple(_read_source(s, "sources", layers=True) for s in _items("sources", given.get("sources")))
    lengths = {s.layer_range[1] - s.layer_range[0] for s in sources if s.layer_range is not None}
    if len(lengths) > 1:
        raise ConfigError(f"slices: sources of {sorted(lengths)} layers, expected as many layers of each")
    return _checked(Slice(sources, given.get("base_model"), _read_parameters(given.get("parameters"))))


def _read_source(content: Any, where: str, *, layers: bool) -> SliceSource:
    given = dict(_mapping(where, content))
    known_options(SliceSource, given)
    if not isinstance(given.get("model"), str):
        raise ConfigError(f"{where}: got the model {given.get('model')!r}, expected a path")
    span = given.get("layer_range")
    if layers:
        pair = span if isinstance(span, (list, tuple)) and all(type(i) is int for i in span) else []
        if len(pair) != 2 or not 0 <= pair[0] < pair[1]:
            raise ConfigError(f"layer_range: got {span!r}, expected [FIRST, LAST + 1], such as [0, 16]")
        span = (pair[0], pair[1])
    elif span is not None:
        raise ConfigError("layer_range is for slices; list the models under slices instead of models")
    return SliceSource(given["model"], span, _read_parameters(given.get("parameters")))


def _checked(part: Slice) -> Slice:
    models = [s.model for s in part.sources]
    twice = next((m for m in models if models.count(m) > 1), None)
    if twice is not None:
        raise ConfigError(f"sources: {twice} twice in one slice, expected each model once")
    return part


def _refuse_keys(given: Mapping[str, Any], *keys: str) -> None:
    for key in keys:
        if given.get(key) is not None:
            raise ConfigError(f"{key}: {NOT_HERE[key]}")


def _items(key: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{key}: got {value!r}, expected a list that is not empty")
    return value


def _mapping(key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}: got {value!r}, expected a mapping")
    return value


def _read_parameters(value: Any) -> Settings:
    return {} if value is None else {k: _with_numbers(v) for k, v in _mapping("parameters", value).items()}


def _with_numbers(setting: Any) -> Any:
    """Convert texts to numbers, since YAML reads 1e-5 as a text and no parameter of a method is a text."""
    if isinstance(setting, str):
        try:
            return float(setting)
        except ValueError:
            return setting
    if isinstance(setting, list):
        return [_with_numbers(s) for s in setting]
    if isinstance(setting, Mapping):
        return {k: v if k == "filter" else _with_numbers(v) for k, v in setting.items()}
    return setting


# ---- the tensors to make -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the result.

    Attributes:
        name: its name. inputs: model -> the name of the tensor that it gives. base: the model that counts as the base.
        place: the position in its slice, from 0 to 1 (see `layers.places`); 0 outside layers. part: the slice whose
            parameters apply.
    """

    name: str
    inputs: Mapping[str, str]
    base: str | None
    place: float
    part: Slice


def tensors_to_make(recipe: MergekitRecipe, kinds: Mapping[str, Mapping[str, Kind]]) -> list[TensorPlan]:
    """All tensors of the result: those before the layers, from the first slice; the layers, slice after slice; and
    those after them, from the last slice.

    Args:
        kinds: model -> its tensors.

    Raises:
        VectorError: a model lacks a tensor or a layer. ConfigError: slices use a model with several stacks of layers.
    """
    out = []
    for names, part in ((True, recipe.slices[0]), (False, recipe.slices[-1])):
        own = [n for n in kinds[part.sources[0].model] if layer_of(n) is None and bool(BEFORE.search(n)) == names]
        base = part.base_model or recipe.base_model
        out.append([TensorPlan(n, dict.fromkeys(_models(part), n), base, 0.0, part) for n in own])
    whole = recipe.slices[0].sources[0].layer_range is None
    layers = list(_whole_models(recipe, kinds) if whole else _sliced(recipe, kinds))
    made = [*out[0], *layers, *out[1]]
    for one in made:
        lacking = next((m for m, n in one.inputs.items() if n not in kinds[m]), None)
        if lacking is not None:
            raise VectorError(
                f"{lacking} has no tensor {one.inputs[lacking]}, which the result's {one.name} needs; do the models "
                "have the same architecture and tied weights?"
            )
    made_of = {(m, n) for one in made for m, n in one.inputs.items()}
    for model in _models(recipe.slices[0]) if whole else ():
        extra = next((n for n in kinds[model] if (model, n) not in made_of), None)
        if extra is not None:
            raise VectorError(
                f"{model} has the tensor {extra}, which {recipe.slices[0].sources[0].model} lacks; do the models "
                "have the same architecture and tied weights?"
            )
    return made


def _models(part: Slice) -> list[str]:
    return [s.model for s in part.sources]


def _whole_models(recipe: MergekitRecipe, kinds: Mapping[str, Mapping[str, Kind]]) -> Iterator[TensorPlan]:
    part = recipe.slices[0]
    names = kinds[part.sources[0].model]
    stacks: dict[str, int] = {}
    for n in names:
        if (at := layer_of(n)) is not None:
            stacks[at[0]] = max(stacks.get(at[0], 0), at[1])
    for n in names:
        if (at := layer_of(n)) is not None:
            place = at[1] / stacks[at[0]] if stacks[at[0]] else 1.0
            yield TensorPlan(n, dict.fromkeys(_models(part), n), recipe.base_model, place, part)


def _sliced(recipe: MergekitRecipe, kinds: Mapping[str, Mapping[str, Kind]]) -> Iterator[TensorPlan]:
    written = 0
    for part in recipe.slices:
        first = part.sources[0]
        start, stop = first.layer_range or (0, 0)
        stacks = {at[0] for n in kinds[first.model] if (at := layer_of(n)) is not None}
        if len(stacks) != 1:
            raise ConfigError(
                f"slices: {first.model} has {len(stacks)} stacks of layers ({', '.join(sorted(stacks))}), expected one"
            )
        for i in range(stop - start):
            names = [n for n in kinds[first.model] if (at := layer_of(n)) is not None and at[1] == start + i]
            if not names:
                raise VectorError(f"{first.model} has no layer {start + i}, which layer_range {[start, stop]} names")
            for n in names:
                inputs = {s.model: _in_layer(n, (s.layer_range or (0, 0))[0] + i) for s in part.sources}
                place = i / (stop - start - 1) if stop - start > 1 else 1.0
                yield TensorPlan(_in_layer(n, written), inputs, part.base_model or recipe.base_model, place, part)
            written += 1


def _in_layer(name: str, layer: int) -> str:
    return re.sub(r"(^|\.)\d+\.", lambda m: f"{m[1]}{layer}.", name, count=1)
